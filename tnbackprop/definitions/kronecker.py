"""Kronecker factors by their definition: dense Jacobians of single lines, columns at the output, tie and cut.

A line z with a parameter p has the Jacobian ∂z[t, o]/∂p[p_B, p_A] = C[o, p_B] a_n[t, p_A]: all data are in a, and the
legs t of z are the positions. With b_n = Cᵀ s_n for the columns s_n that reach z,

    expand  A = Σ_nt a aᵀ / (N T)   B = Σ_nt b bᵀ        reduce  A = Σ_n ā āᵀ / (N T²)   B = Σ_n b̄ b̄ᵀ,

ā and b̄ the sums over t (Eschenhagen et al. 2023, arXiv:2311.00636). Which legs of p belong together, and to B, is what
the program says, and which of A and B are cut into axes: those are partial traces of the whole. C, a and t are found in
the numbers of the Jacobian, at the data and at other values of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..quantities.factors import Factors
from .lines import Line, Sample
from .report import TOLERANCE, NotDefined

Columns = Sequence[Mapping[str, Tensor]]
"""For every sample the columns that reach each value, [V, elements]."""


PROBES = 2


@dataclass(frozen=True)
class Use:
    """A parameter in one line: ∂line/∂parameter of every sample, [N, *line's legs, P]; `probes` at other data."""

    line: Line
    jacobian: Tensor
    probes: Tensor


Cut = tuple[tuple[tuple[int, ...], bool], ...]
"""The legs of each factor of a component, the one with its scale first, and whether it is a diagonal."""


@dataclass(frozen=True)
class Structure:
    """Sizes of the parameter's legs, and which of them are blocks, which of each component, B's first, and its cut."""

    legs: tuple[int, ...]
    blocks: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]
    cuts: tuple[Cut, ...]
    only_diagonal: bool = False
    averaged: bool = False  # the columns are those of one matrix at each value: nothing is known between two of them

    @property
    def own(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The legs of B, and all others that are no blocks."""
        return self.factors[0], tuple(leg for factor in self.factors[1:] for leg in factor)

    def size(self, which: Sequence[int]) -> int:
        return prod(self.legs[k] for k in which)


@dataclass(frozen=True)
class Pieces:
    """C [blocks, o, p_B], a [blocks, N, t, p_A], and the positions: those of `a`, and those that nothing depends on."""

    C: Tensor
    a: Tensor
    tied: tuple[int, ...]
    alone: tuple[int, ...]


def uses_of(samples: Sequence[Sample], parameter: str) -> Iterator[Use]:
    """Every line with the batch that reads the parameter, or something that is made of parameters alone."""
    first = samples[0]
    made = {parameter: (torch.eye(first.env[parameter].numel(), dtype=torch.float64), False)}
    for k, line in enumerate(first.lines):
        for name in (name for name in line.reads if name in made):
            inner, opaque = made[name]
            if line.sampled:
                each = [sample.jacobian(sample.lines[k], name) @ inner for sample in samples]
                probes = [first.probe(line, name, seed) @ inner for seed in range(PROBES)]
                whole = replace(line, opaque=line.opaque or opaque)
                yield Use(whole, *(torch.stack(D).reshape(len(D), *line.sizes, -1) for D in (each, probes)))
            else:
                before = made[line.name][0] if line.name in made else 0
                made[line.name] = (before + first.jacobian(line, name) @ inner, opaque or line.opaque)


def structure_of(factors: Factors, loss: int) -> Structure:
    """What the program says of a parameter's legs; `loss` is the factor that is B."""
    placed = {*factors.blocks, *(leg for legs in factors.legs for leg in legs)}  # not a single element's
    parameter = [leg for leg in factors.parameter if leg in placed]
    place = {leg: k for k, leg in enumerate(parameter)}
    own = [tuple(place[leg] for leg in legs) for legs in factors.legs]
    leads, kept = factors.leads or (0,), factors.diagonal
    components = sorted(set(leads), key=lambda lead: (lead != leads[loss], lead))
    parts = [[lead, *(k for k in range(len(own)) if leads[k] == lead != k)] for lead in components]
    return Structure(
        tuple(int(leg.size) for leg in parameter),
        tuple(place[b] for b in factors.blocks),
        tuple(tuple(sorted(leg for k in part for leg in own[k])) for part in parts),
        tuple(tuple((own[k], kept[k]) for k in part) for part in parts),
        not factors.leads,
    )


def block(
    samples: Sequence[Sample], columns: Columns, parameter: str, structure: Structure, reduce: bool, joined: bool
) -> Tensor:
    """The dense block [P, P] that the definition gives.

    joined  the block of [weight, bias], a matrix [out, in + 1]

    Raises `NotDefined` where the Jacobian does not factor as above.
    """
    uses = list(uses_of(samples, parameter))
    if not uses:
        elements = samples[0].env[parameter].numel()
        return torch.zeros(elements, elements, dtype=torch.float64)
    if structure.only_diagonal:
        return _diagonal(uses, columns, structure.averaged)
    found = [_factors(use, structure, columns, reduce, joined) for use in uses]
    B, A = torch.stack([B for B, _ in found]).sum(0), torch.stack([A for _, A in found]).mean(0)
    if joined:
        structure = Structure((B.shape[-1], A.shape[-1]), (), ((0,), (1,)), ())
    elif any(len(cut) > 1 or cut[0][1] for cut in structure.cuts):
        B, A = _in_axes(B, structure, 0), _in_axes(A, structure, 1) if len(structure.factors) > 1 else A
    return _dense(structure, B, A)


def _diagonal(uses: Sequence[Use], columns: Columns, averaged: bool) -> Tensor:
    """The diagonal of Σ_n Σ_v (Σ_use Jᵀs) (Σ_use Jᵀs)ᵀ, [P, P]; `averaged`: of the uses in each line alone."""
    lines: dict[str, Tensor] = {}
    for use in uses:
        s, key = _reaching(use, columns).flatten(2), use.line.name if averaged else ""
        lines[key] = lines.get(key, 0) + torch.einsum("nvo,nop->nvp", s, use.jacobian.flatten(1, -2))
    return torch.stack([rows.square().sum((0, 1)) for rows in lines.values()]).sum(0).diag()


def _in_axes(M: Tensor, structure: Structure, which: int) -> Tensor:
    """[g, d, d] of a component as the product of its factors: partial traces, the first with the scale."""
    if len(structure.factors) > 2:
        raise NotDefined("its factors are those of several pieces, cut into axes")
    own, sizes = structure.factors[which], [structure.legs[k] for k in structure.factors[which]]
    rows, columns, g = [*range(len(own))], [len(own) + k for k in range(len(own))], 2 * len(own)
    total = M.diagonal(dim1=1, dim2=2).sum(1)
    terms: list[Any] = []
    for k, (legs, flat) in enumerate(structure.cuts[which]):
        kept, size = [own.index(leg) for leg in legs], structure.size(legs)
        ends = [g, *kept, *(columns[j] for j in kept)]
        other = [columns[j] if j in kept else j for j in rows]
        part = torch.einsum(M.reshape(-1, *sizes, *sizes), [g, *rows, *other], ends).reshape(-1, size, size)
        part = size * part / (M.shape[1] if k == 0 else torch.where(total == 0, 1.0, total).reshape(-1, 1, 1))
        part = part * torch.eye(size, dtype=M.dtype) if flat else part
        terms += [part.reshape(-1, *(sizes[j] for j in (*kept, *kept))), ends]
    whole: Tensor = torch.einsum(*terms, [g, *rows, *columns])
    return whole.reshape(M.shape)


def _factors(use: Use, structure: Structure, columns: Columns, reduce: bool, joined: bool) -> tuple[Tensor, Tensor]:
    """B [blocks, b, b'] and A [blocks, a, a'] of one use."""
    if len(structure.factors) == 1:
        return _whole(use, columns, reduce)
    pieces = _separated(use, structure)
    N, sizes = len(use.jacobian), use.line.sizes
    count = prod(sizes[k] for k in pieces.tied)
    if len(structure.factors) > 2 and N * count * prod(sizes[k] for k in pieces.alone) > 1:
        raise NotDefined(
            f"its {len(structure.factors)} factors are those of the rule's pieces: without the rule they are known "
            "for one sample and one position only"
        )
    s = _arranged(_reaching(use, columns), sizes, (*pieces.alone, *pieces.tied))  # [N, V, positions, o]
    b = torch.einsum("nvto,goc->gnvtc", s, pieces.C)
    a = torch.cat([pieces.a, torch.ones_like(pieces.a[..., :1])], -1) if joined else pieces.a
    if reduce:
        a, b = a.sum(2, keepdim=True), b.sum(3, keepdim=True)
    B = torch.einsum("gnvtb,gnvtc->gbc", b, b)
    A = torch.einsum("gnta,gntc->gac", a, a) / (N * count ** (2 if reduce else 1))
    return B, A


def _whole(use: Use, columns: Columns, reduce: bool) -> tuple[Tensor, Tensor]:
    """One factor: the samples are not taken to be independent. What the Jacobian does not depend on is a position."""
    sizes = use.line.sizes
    alone = () if use.line.opaque else _constant(torch.cat([use.jacobian, use.probes]), len(sizes))
    s = _arranged(_reaching(use, columns), sizes, alone)
    D = _narrowed(use.jacobian, alone).reshape(len(use.jacobian), s.shape[-1], -1)
    b = torch.einsum("nvto,nop->nvtp", s, D)
    b = b.sum(2, keepdim=True) if reduce else b
    B = torch.einsum("nvtp,nvtq->pq", b, b).unsqueeze(0)
    return B, torch.ones(1, 1, 1, dtype=B.dtype)


def _reaching(use: Use, columns: Columns) -> Tensor:
    """The columns at the line's value, [N, V, *legs]."""
    s = torch.stack([each[use.line.name] for each in columns])
    return s.reshape(*s.shape[:2], *(use.line.sizes or (1,)))


def _arranged(s: Tensor, sizes: tuple[int, ...], positions: tuple[int, ...]) -> Tensor:
    """[N, V, positions, other legs]."""
    others = [k for k in range(len(sizes)) if k not in positions]
    moved = s if not sizes else s.permute(0, 1, *(2 + k for k in (*positions, *others)))
    return moved.reshape(*s.shape[:2], prod(sizes[k] for k in positions), -1)


def _constant(D: Tensor, legs: int) -> tuple[int, ...]:
    """The legs of the line along which its Jacobian does not vary, those of size 1 left out."""
    flat = [k for k in range(legs) if D.shape[1 + k] > 1]
    return tuple(k for k in flat if _same(D, D.narrow(1 + k, 0, 1).expand_as(D)))


def _narrowed(D: Tensor, alone: tuple[int, ...]) -> Tensor:
    for k in alone:
        D = D.narrow(1 + k, 0, 1)
    return D


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= TOLERANCE * other.abs().max()).all())


def _separated(use: Use, structure: Structure) -> Pieces:
    """The fewest positions for which ∂z/∂p is C times a. Raises `NotDefined` where there are none."""
    legs, D = len(use.line.sizes), torch.cat([use.jacobian, use.probes])
    alone = _constant(D, legs)
    D = _narrowed(D, alone).flatten(1 + legs)
    D = D.reshape(*D.shape[: 1 + legs], *structure.legs)
    others = [k for k in range(legs) if k not in alone]
    for count in range(len(others) + 1):
        for tied in combinations(others, count):
            found = _of_rank_one(D, tied, tuple(k for k in range(legs) if k not in tied), structure)
            if found is not None:
                C, a = found
                return Pieces(C, a[:, : len(use.jacobian)], tied, alone)
    raise NotDefined("its Jacobian in one line is not the product of a constant and of a part with the data")


def _of_rank_one(
    D: Tensor, tied: tuple[int, ...], rest: tuple[int, ...], structure: Structure
) -> tuple[Tensor, Tensor] | None:
    """C [blocks, o, p_B] and a [blocks, N, t, p_A] with D = C a, the largest entry of C being 1."""
    at, own = 1 + len(tied) + len(rest), structure.own
    order = [*(at + k for k in structure.blocks), *(1 + k for k in rest), *(at + k for k in own[0]), 0]
    order += [*(1 + k for k in tied), *(at + k for k in own[1])]
    G, p_B, p_A = (structure.size(which) for which in (structure.blocks, *own))
    positions = prod(D.shape[1 + k] for k in tied)
    M = D.permute(order).reshape(G, -1, len(D) * positions * p_A)
    best = M.abs().flatten(1).argmax(1)
    row, column = best // M.shape[2], best % M.shape[2]
    each = torch.arange(G)
    a, C = M[each, row], M[each, :, column]
    largest = a[each, column].unsqueeze(1)
    C = torch.where(largest == 0, 0.0, C / torch.where(largest == 0, 1.0, largest))
    if not _same(C.unsqueeze(2) * a.unsqueeze(1), M):
        return None
    return C.reshape(G, -1, p_B), a.reshape(G, len(D), positions, p_A)


def _dense(structure: Structure, B: Tensor, A: Tensor) -> Tensor:
    """Block-diagonal over the blocks, B ⊗ A inside, for the row-major parameter."""
    eye = torch.eye(len(B), dtype=B.dtype)
    whole = torch.einsum("gbc,gad,gh->gbahcd", B, A, eye)
    order = (*structure.blocks, *structure.own[0], *structure.own[1])
    sizes = [structure.legs[k] for k in order]
    back = sorted(range(len(order)), key=order.__getitem__)
    P = prod(sizes)
    return whole.reshape((*sizes, *sizes)).permute((*back, *(len(order) + k for k in back))).reshape(P, P)
