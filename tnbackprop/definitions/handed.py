"""Definitions of quantities that read operands or come in phases, from individual gradients and GGNs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..linalg import KroneckerFactors
from ..quantities import (
    AxisMoments,
    ClippedGrad,
    Clipping,
    DirectionalCurvature,
    DirectionalGrad,
    NaturalGradientSMW,
    Quantity,
    WeightedGrad,
)
from ..runtime import Program
from . import oracle
from .oracle import Problem
from .report import NotDefined

Values = dict[str, Tensor | NotDefined]


def expected(program: Program, problem: Problem, quantity: Any, got: Mapping[str, Any]) -> Values:
    """What the quantity must be, with the operands that `Program.some_operands` gives."""
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
            return {name: _dense(got[name], g, quantity.individual) for name, g in G.items()}
    blocks = oracle.ggn_blocks(problem)
    if isinstance(quantity, DirectionalCurvature):
        d = {name: operands["direction"][name].flatten() for name in blocks}
        return {name: torch.einsum("npq,p,q->n", block, d[name], d[name]) for name, block in blocks.items()}
    raise NotDefined(f"{type(quantity).__name__} has a definition with the factors of another program only")


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


def _dense(got: KroneckerFactors, g: Tensor, individual: bool) -> Tensor | NotDefined:
    """The Kronecker product of the moments of all axes."""
    rows = g if individual else g.mean(0, keepdim=True)
    found = torch.ones(1, 1, dtype=g.dtype)
    for k, size in enumerate(rows.shape[1:]):
        flat = rows.movedim(k + 1, 1).reshape(len(rows), size, -1)
        if size > 1 or rows[0].numel() == 1:
            found = torch.kron(found, torch.einsum("nax,nbx->ab", flat, flat) / len(rows))
    return found if found.shape == got.to_dense().shape else NotDefined("an axis is too long")


HANDED: tuple[type[Quantity], ...] = (
    AxisMoments, ClippedGrad, DirectionalCurvature, DirectionalGrad, NaturalGradientSMW, WeightedGrad,
)  # fmt: skip
