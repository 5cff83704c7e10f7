"""Kronecker factors by tie and cut: derived from the diagram of Jᵀ S, not declared per layer.

The GGN block is (JᵀS)(JᵀS)ᵀ. Its legs n (and v) and the positions over which JᵀS is summed are cut; the parameter's
legs then fall into components. *Expand* ties the positions of the two copies of a component, *reduce* sums each copy
over them first (Eschenhagen et al. 2023, arXiv:2311.00636). Every cut leg contributes 1/size once, to each component
but the one with the cotangent, which carries all scale of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import reduce
from math import prod

import sympy

from ..diagram.algebra import Cotangents, Uses, diagonal, inline
from ..diagram.core import BATCH, COLUMN, Diagram, Leg, Operand, Product, Tensor, operand_tensors
from ..diagram.jacobian import Jacobian, Unit
from ..diagram.simplify import simplify
from ..errors import UnsupportedError

Legs = tuple[Leg, ...]


class Sharing(Enum):
    """What a layer's weight that is used at many positions is taken to be: one use each, or one use of their sum."""

    EXPAND = "expand"
    REDUCE = "reduce"


@dataclass(frozen=True)
class Factors:
    """Diagrams of the factors, in the order of the parameter's axes: [blocks, d, d'], or [blocks, d] if diagonal."""

    diagrams: tuple[Diagram, ...]
    blocks: Legs  # legs that all factors share: the block is block-diagonal along them
    legs: tuple[Legs, ...]  # the parameter's legs of each factor
    parameter: Legs  # all of them, row-major
    assumption: str
    means: tuple[Diagram | None, ...] = ()  # [blocks, d]: the mean of one copy of a factor without the cotangent
    diagonal: tuple[bool, ...] = ()  # which factors are kept as their diagonal (a one-hot input); none if it is empty

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """[blocks, d, d] or [blocks, d] of each factor, its legs and the blocks as one axis each."""
        blocks = (prod(int(leg.size) for leg in self.blocks),) if self.blocks else ()
        sizes = [prod(int(leg.size) for leg in legs) for legs in self.legs]
        kept = self.diagonal or (False,) * len(sizes)
        return tuple((*blocks, d) if flat else (*blocks, d, d) for d, flat in zip(sizes, kept, strict=True))


@dataclass(frozen=True)
class _Component:
    operands: tuple[Operand, ...]
    own: Legs  # the parameter's legs
    units: tuple[int, ...] = ()  # those of its axes of size 1 that are here

    @property
    def separate(self) -> bool:
        """Whether it has an axis of the parameter."""
        return bool(self.own or self.units)


@dataclass(frozen=True)
class _Parameter:
    """Its legs, and its axes of size 1, which have none: they are with the cotangent or with what they are met by."""

    legs: Legs
    units: tuple[Unit, ...]

    def of(self, operands: tuple[Operand, ...], loss: bool) -> _Component:
        """These operands with the axes that are theirs."""
        own = _legs(operands)
        names = {t.name for op in operands for t in operand_tensors(op)}
        units = (unit.axis for unit in self.units if (unit.output if loss else unit.met & names and not unit.output))
        return _Component(operands, tuple(leg for leg in self.legs if leg in own), tuple(units))

    def place(self, component: _Component, own: Legs) -> list[int]:
        """Where its axes are among all axes, to sort by."""
        axes = [k for k in range(len(self.legs) + len(self.units)) if k not in {unit.axis for unit in self.units}]
        return sorted([*(axes[self.legs.index(leg)] for leg in own), *component.units]) or [-1]


def kronecker(J: Uses, g: Cotangents, sharing: Sharing, scale: sympy.Expr, means: bool = False) -> Factors:
    """Factors of (Jᵀg)(Jᵀg)ᵀ·scale. Raises `UnsupportedError`, with the reason, where the cut does not separate.

    means  also the means of the factors' halves, which join a weight with the bias behind it
    """
    gradient = inline(J.T @ g)
    if not gradient.products:
        return _nothing(J)
    parameter = _Parameter(J.legs, J.jacobians[0].units if len({j.units for j in J.jacobians}) == 1 else ())
    each = [_of_use(product, parameter, g, sharing) for product in gradient.products]
    first = each[0]
    structures = {(f.blocks, f.legs, tuple(_has_cotangent(d, g.names) for d in f.diagrams)) for f in each}
    if len(structures) > 1:
        raise UnsupportedError(
            f"the uses of the parameter have different Kronecker structure, and do not add up: {gradient}\n"
            "  Untie or freeze it (requires_grad_(False)), or ask for what needs no factors: DiagGGN, GGNTrace."
        )
    if len(each) > 1 and sharing is Sharing.REDUCE:
        raise UnsupportedError(
            f"the parameter is used {len(each)} times, and the reduce approximation of several uses is not defined "
            "here.\n  Ask for Sharing.EXPAND, which takes the uses as positions."
        )
    diagrams = []
    for k, diagram in enumerate(first.diagrams):
        total = _total([f.diagrams[k] for f in each])
        tied_to_loss = _has_cotangent(diagram, g.names)
        diagrams.append(simplify(total * scale if tied_to_loss else total / len(each)))
    diagonals = [_diagonal(diagram, own) for diagram, own in zip(diagrams, first.legs, strict=True)]
    diagrams = [short or diagram for short, diagram in zip(diagonals, diagrams, strict=True)]
    averages: tuple[Diagram | None, ...] = ()
    if means:
        halves = [[mean for f in each if (mean := f.means[k]) is not None] for k in range(len(first.means))]
        averages = tuple(simplify(_total(half) / len(half)) if half else None for half in halves)
    flat = tuple(short is not None for short in diagonals)
    uses = f"; {len(each)} uses taken as positions" if len(each) > 1 else ""
    told = first.assumption + uses
    return replace(first, diagrams=tuple(diagrams), means=averages, diagonal=flat, assumption=told)


def _diagonal(diagram: Diagram, own: Legs) -> Diagram | None:
    """The diagonal of a factor that has nothing else, [d]; None for any other, and for one with blocks."""
    if not own or not diagram.products or len(diagram.legs) != 2 * len(own):
        return None
    return diagonal(Jacobian(diagram, diagram.legs[: len(own)], diagram.legs[len(own) :]))


def _total(diagrams: list[Diagram]) -> Diagram:
    return reduce(lambda a, b: a + b, diagrams)


def _has_cotangent(diagram: Diagram, names: frozenset[str]) -> bool:
    return any(_is_cotangent(op, names) for p in diagram.products for op in p.operands)


def _is_cotangent(op: Operand, names: frozenset[str]) -> bool:
    return any(t.name in names for t in operand_tensors(op))


def _of_use(product: Product, parameter: _Parameter, g: Cotangents, sharing: Sharing) -> Factors:
    """The factors of one product of Jᵀg."""
    names = g.names
    seeds = [op for op in product.operands if _is_cotangent(op, names)]
    free = {leg for leg in product.legs if leg in parameter.legs or leg == BATCH or leg.name == COLUMN}
    summed = [leg for op in seeds for leg in op.legs if leg not in free]
    others = _legs(tuple(op for op in product.operands if op not in seeds))
    candidates = [leg for leg in dict.fromkeys(summed) if leg in others]
    cut = _minimal_cut(product, parameter, candidates, names)
    components = _components(product, parameter, cut, names)
    # Positions that only the cotangent has are positions as well: a bias is used at each of them.
    alone = [leg for leg in dict.fromkeys(summed) if leg not in candidates]
    positions = (*cut, *alone)
    blocks = tuple(leg for leg in parameter.legs if sum(leg in _legs(c.operands) for c in components) > 1)
    owned = [tuple(leg for leg in c.own if leg not in blocks) for c in components]
    order = sorted(range(len(components)), key=lambda k: parameter.place(components[k], owned[k]))
    diagrams: list[Diagram] = []
    means: list[Diagram | None] = []
    for k in order:
        loss = any(_is_cotangent(op, names) for op in components[k].operands)
        averaged = names if g.averaged else frozenset()
        factor = _tied(components[k].operands, owned[k], blocks, positions, sharing, averaged)
        uses = sympy.Mul(*(leg.size for leg in cut)) ** (2 if sharing is Sharing.REDUCE else 1)
        diagrams.append(factor * (product.scale**2 if loss else 1 / (BATCH.size * uses)))
        half = Diagram((*blocks, *owned[k]), (Product(sympy.Integer(1), components[k].operands),))
        means.append(None if loss else half / sympy.Mul(BATCH.size, *(leg.size for leg in cut)))
    assumption = _assumption(positions, g, sharing, len(components))
    legs = tuple(owned[k] for k in order)
    return Factors(tuple(diagrams), blocks, legs, parameter.legs, assumption, tuple(means))


def _assumption(positions: Legs, g: Cotangents, sharing: Sharing, count: int) -> str:
    tied = "tied" if sharing is Sharing.EXPAND else "summed"
    shown = f"{', '.join(map(str, positions))} {tied}" if positions else "no positions"
    matrix = "one averaged matrix of cotangents for all samples; " if g.averaged else ""
    if count > 1:
        return f"{matrix}the factors are independent over the samples; {shown} ({sharing.value})"
    if positions and sharing is Sharing.EXPAND:
        return f"{matrix}one factor, without what is between different positions: {shown} ({sharing.value})"
    return matrix + ("" if matrix else "none: ") + "one factor, the block itself"


def _minimal_cut(product: Product, parameter: _Parameter, candidates: list[Leg], names: frozenset[str]) -> Legs:
    """The candidates that must be cut to get as many components with parameter legs as possible."""

    def separated(cut: Legs) -> int:
        return sum(component.separate for component in _components(product, parameter, cut, names))

    # Of two cuts that separate as much, the one along positions: those are the legs that data share, not parameters.
    data = _legs(tuple(op for op in product.operands if BATCH in op.legs and not _is_cotangent(op, names)))
    candidates = sorted(candidates, key=lambda leg: leg in data)
    cut = tuple(candidates)
    most = separated(cut)
    for leg in candidates:
        rest = tuple(other for other in cut if other != leg)
        if separated(rest) == most:
            cut = rest
    return cut


def _components(product: Product, parameter: _Parameter, cut: Legs, names: frozenset[str]) -> list[_Component]:
    """Operands joined by legs that are not cut; the parameter's legs do not join the cotangent with the others."""
    groups = [[op] for op in product.operands]
    merged = True
    while merged:
        merged = False
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                if _joined(groups[i], groups[j], parameter.legs, cut, names):
                    groups[i] += groups.pop(j)
                    merged = True
                    break
            if merged:
                break
    loss = [any(_is_cotangent(op, names) for op in group) for group in groups]
    found = [parameter.of(tuple(group), seed) for group, seed in zip(groups, loss, strict=True)]
    kept = [k for k, c in enumerate(found) if c.separate or loss[k]]
    for one in (c for k, c in enumerate(found) if k not in kept):  # a norm's deviation, a mask: with what it scales
        shared = [set(_legs(one.operands)).isdisjoint(_legs(found[k].operands)) for k in kept]
        k = kept[min(range(len(kept)), key=lambda j: (loss[kept[j]], shared[j], j))]
        found[k] = replace(found[k], operands=(*found[k].operands, *one.operands))
    return [found[k] for k in kept]


def _joined(one: list[Operand], other: list[Operand], parameter: Legs, cut: Legs, names: frozenset[str]) -> bool:
    shared = set(_legs(tuple(one))) & set(_legs(tuple(other)))
    seeds = [any(_is_cotangent(op, names) for op in group) for group in (one, other)]
    if seeds[0] != seeds[1]:
        shared -= set(parameter)
    return any(leg not in cut and leg != BATCH and leg.name != COLUMN for leg in shared)


def _legs(operands: tuple[Operand, ...]) -> Legs:
    return tuple(dict.fromkeys(leg for op in operands for leg in op.legs))


def _tied(
    operands: tuple[Operand, ...], own: Legs, blocks: Legs, positions: Legs, sharing: Sharing, averaged: frozenset[str]
) -> Diagram:
    """Two copies of a component with n (and tied positions) in common: legs [blocks, own, own'].

    averaged  tensors that stand for one side of a matrix for the whole batch: their two copies are that matrix
    """
    tied = {BATCH, *blocks, *(positions if sharing is Sharing.EXPAND else ())}
    every = _legs(operands)
    tied |= {leg for leg in every if leg.name == COLUMN}
    copy = {leg: Leg(f"{leg.name}_copy", leg.size) for leg in every if leg not in tied}
    twin = tuple(op.rename(copy) for op in operands)
    primed = tuple(copy[leg] for leg in own)
    legs = (*(leg for leg in blocks if leg in set(every)), *own, *primed)
    sides = [k for k, op in enumerate(operands) if isinstance(op, Tensor) and op.name in averaged]
    matrices = tuple(_matrix(operands[k], twin[k]) for k in sides)
    rest = tuple(op for pair in (operands, twin) for k, op in enumerate(pair) if k not in sides)
    mean = 1 / BATCH.size if sides and BATCH in _legs(rest) else sympy.Integer(1)
    return simplify(Diagram(legs, (Product(mean, (*matrices, *rest)),)))


def _matrix(one: Operand, other: Operand) -> Tensor:
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return Tensor(one.name, tuple(leg for leg in (*one.legs, *other.legs) if leg != BATCH))


def _nothing(J: Uses) -> Factors:
    zero = Diagram((*J.legs, *(Leg(f"{leg.name}_copy", leg.size) for leg in J.legs)), ())
    return Factors((zero,), (), (J.legs,), J.legs, "the parameter has no use: zero", diagonal=(False,))

