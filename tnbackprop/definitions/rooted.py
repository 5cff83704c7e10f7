"""Gauss-Newton quantities of other columns than all of a root: of drawn ones, or of the gradients of the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..quantities import Quantity
from ..quantities.roots import OtherAlong, OtherCurvature, OtherDiag, OtherGram, OtherSqrt, OtherTrace
from .defined import Defined, Values, columns

Formula = Callable[[Any, Tensor, Any], Tensor]
"""From the quantity, V [V, N, P] of a parameter and the direction [P] that it is handed."""


def _gram(quantity: Any, V: Tensor, d: Any) -> Tensor:
    return torch.einsum("vnp,wmp->vnwm", V, V)


FORMULAS: Mapping[type[Quantity], Formula] = {
    OtherSqrt: lambda q, V, d: V,
    OtherDiag: lambda q, V, d: V.square().sum(0) if q.per_sample else V.square().sum((0, 1)),
    OtherTrace: lambda q, V, d: V.square().sum((0, 2)),
    OtherGram: _gram,
    OtherAlong: lambda q, V, d: V @ d,
    OtherCurvature: lambda q, V, d: (V @ d).square().sum(0),
}


def rooted(case: Defined, key: str, quantity: Any, got: Mapping[str, Any]) -> Values:
    """The quantity of V = J_nᵀ s_vn, in the shape that it has: the gradients of the labels have no leg of columns."""
    program, problem = case.program, case.problem
    directions = program.some_operands(problem.x, problem.y).get("direction", {})
    found = {}
    for name, each in columns(case, key, quantity.root).items():
        V = each.reshape(*each.shape[:2], -1)
        d = directions[name].flatten() if name in directions else None
        found[name] = FORMULAS[type(quantity)](quantity, V, d).reshape(got[name].shape)
    return found
