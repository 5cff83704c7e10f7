"""Definitions of quantities that read operands or come in phases, from individual gradients and GGNs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from ..compiler.program.inputs import of_loss
from ..diagram.reading import Reading
from ..linalg import KroneckerFactors
from ..phased import ClippedGrad, Clipping, NaturalGradientSMW
from ..quantities import (
    KFAC,
    AxisMoments,
    DirectionalCurvature,
    DirectionalGrad,
    DirectionalRoot,
    Fisher,
    InputGrad,
    Labels,
    ProjectedFactors,
    Quantity,
    RotatedSecondMoment,
    Sketch,
    Structure,
    WeightedGrad,
)
from ..runtime import Program
from . import oracle
from .defined import Defined, columns, factors
from .report import NotDefined

Values = dict[str, Tensor | NotDefined]


def expected(case: Defined, key: str, quantity: Any, got: Mapping[str, Any]) -> Values:
    """What the quantity must be, with the operands that `Program.some_operands` gives."""
    program, problem = case.program, case.problem
    if isinstance(quantity, InputGrad):
        return _by_inputs(case, got)
    operands = program.some_operands(problem.x, problem.y)
    G = {name: g / problem.scale for name, g in oracle.individual(problem).items()}
    match quantity:
        case DirectionalGrad():
            return {name: (g * operands["direction"][name]).reshape(len(g), -1).sum(1) for name, g in G.items()}
        case WeightedGrad():
            return _weighted(operands["weights"], G)
        case ClippedGrad(mode=Clipping.PER_PARAMETER):
            return {name: _weighted(quantity._weights(_norms({name: g})), {name: g})[name] for name, g in G.items()}
        case ClippedGrad():
            return _weighted(quantity._weights(_norms(G)), G)
        case NaturalGradientSMW():
            return _natural(G, quantity.damping)
        case AxisMoments():
            return {name: _dense(got[name], g, 0 if quantity.individual else problem.scale) for name, g in G.items()}
        case Sketch():
            return {name: _sketch(program, name, g, operands) for name, g in G.items()}
        case ProjectedFactors():
            return _projected(case, key, quantity, got, operands)
    if isinstance(quantity, RotatedSecondMoment):
        rows = columns(case, key, quantity.root)
        return {name: _turned(program, name, V.flatten(0, 1), operands).square().sum(0) for name, V in rows.items()}
    blocks = oracle.ggn_blocks(problem)
    d = {name: operands["direction"][name].flatten() for name in blocks}
    return {name: torch.einsum("npq,p,q->n", block, d[name], d[name]) for name, block in blocks.items()}


def _read(program: Program, key: str, name: str) -> list[Reading]:
    """The operands of a parameter that belong to the sides of its factors, in their order."""
    found = program.compiled.derived.readings.values()
    return [each for each in found if each.parameter == name and each.key.rpartition("_")[0] == key]


def _contracted(readings: list[Reading], rows: Tensor, operands: Any, keep: bool) -> Tensor:
    """Rows [n, *p] times an operand for each side: its last axis in the place of the side, or for all the same."""
    if not readings:
        return rows
    own = readings[0].own
    letters = {leg.name: k for k, leg in enumerate(own)}
    args: list[Any] = [rows.reshape(len(rows), *(int(leg.size) for leg in own)), [50, *range(len(own))]]
    out = dict.fromkeys(range(len(own)))
    for reading in readings:
        *sides, last = reading.axes
        legs = [leg for axis in sides for leg in axis]
        new = [letters.setdefault(leg.name, len(letters)) for leg in last]
        tensor = operands[reading.key][reading.parameter]
        args += [tensor.reshape(*(int(leg.size) for leg in reading.legs)), [*(letters[leg.name] for leg in legs), *new]]
        if keep:
            out = {(new[sides[-1].index(own[k])] if k < len(own) and own[k] in sides[-1] else k): None for k in out}
    shown = [*out] if keep else [letters[leg.name] for leg in readings[0].axes[-1]]
    return torch.einsum(*args, [50, *shown])


def _sketch(program: Program, name: str, g: Tensor, operands: Any) -> Tensor:
    return _contracted(_read(program, "sketch", name), g, operands, keep=False)


def _turned(program: Program, name: str, V: Tensor, operands: Any) -> Tensor:
    return _contracted(_read(program, "basis", name), V, operands, keep=True).reshape(V.shape)


def _projected(case: Defined, key: str, quantity: ProjectedFactors, got: Mapping[str, Any], operands: Any) -> Values:
    """The diagonal of the block, times the squares of the projections."""
    if quantity.structure is not Structure.DIAGONAL or not isinstance(quantity.root, Labels):
        raise NotDefined("compared is what diagonal matrices project, of the gradients of the labels")
    blocks = factors(case, key, KFAC(fisher=Fisher.EMPIRICAL, sharing=quantity.sharing), got)
    found: Values = {}
    for name, block in blocks.items():
        weights = torch.ones_like(case.problem.theta[name])[None]
        for reading in _read(case.program, "projection", name):
            sizes = [int(leg.size) if leg in reading.legs else 1 for leg in reading.own]
            own = [int(leg.size) for leg in reading.own]
            order = [leg for leg in reading.legs if leg in reading.own]
            tensor = operands[reading.key][name].reshape([int(leg.size) for leg in order])
            tensor = tensor.permute([order.index(leg) for leg in reading.own if leg in order])
            weights = (weights.reshape(1, *own) * tensor.reshape(sizes)).reshape(weights.shape)
        diagonal = weights.flatten().square()
        found[name] = block if isinstance(block, NotDefined) else (block.diagonal() * diagonal).diag()
    return found


def _by_inputs(case: Defined, got: Mapping[str, Any]) -> Values:
    problem = case.problem
    leaves, spec = pytree.tree_flatten(problem.x)
    moving = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def loss(some: list[Tensor]) -> Tensor:
        whole = list(leaves)
        for k, leaf in zip(moving, some, strict=True):
            whole[k] = leaf
        assert problem.loss is not None
        found: Tensor = problem.loss(problem.forward(problem.theta, pytree.tree_unflatten(whole, spec)), problem.y)
        return found

    graph = case.program.compiled.graph
    x = [name for name in graph.inputs if name not in of_loss(graph)]
    names = [name for name in x if graph.values[name].dtype.is_floating_point]
    found = zip(names, grad(loss)([leaves[k] for k in moving]), strict=True)
    return {name: each for name, each in found if name in got}


def _norms(G: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in G.values()]).sum(0).sqrt()


def _weighted(weights: Tensor, G: Mapping[str, Tensor]) -> Values:
    return {name: torch.einsum("n,n...->...", weights, g) for name, g in G.items()}


def _natural(G: Mapping[str, Tensor], damping: float) -> Values:
    """(F + λ)⁻¹ ∇L, by the singular values of all individual gradients."""
    flat = torch.cat([g.reshape(len(g), -1) for g in G.values()], 1)
    U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
    scale = S / (S.square() / len(flat) + damping) / len(flat)
    step = (U.sum(0) * scale) @ Vh
    sizes = [g[0].numel() for g in G.values()]
    return {name: part.reshape(g.shape[1:]) for (name, g), part in zip(G.items(), step.split(sizes), strict=True)}


def _dense(got: KroneckerFactors, g: Tensor, scale: float) -> Tensor | NotDefined:
    """The Kronecker product of the moments of all axes, of each sample or, with a scale of the loss, of their sum."""
    rows = g.sum(0, keepdim=True) * scale if scale else g
    found = torch.ones(1, 1, dtype=g.dtype)
    for k, size in enumerate(rows.shape[1:]):
        flat = rows.movedim(k + 1, 1).reshape(len(rows), size, -1)
        if size > 1 or rows[0].numel() == 1:
            found = torch.kron(found, torch.einsum("nax,nbx->ab", flat, flat) / len(rows))
    return found if found.shape == got.to_dense().shape else NotDefined("an axis is too long")


HANDED: tuple[type[Quantity], ...] = (
    AxisMoments, ClippedGrad, DirectionalCurvature, DirectionalGrad, DirectionalRoot, InputGrad, NaturalGradientSMW,
    ProjectedFactors, RotatedSecondMoment, Sketch, WeightedGrad,
)  # fmt: skip
