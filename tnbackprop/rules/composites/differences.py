"""Finite differences on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...table import Table

TABLE = Table()
aten = torch.ops.aten


@TABLE.composite(
    aten.gradient.scalarint, aten.gradient.scalararray, aten.gradient.array, aten.gradient.scalarrayint,
    aten.gradient.scalarrayarray, aten.gradient.tensorarrayint, aten.gradient.tensorarray,
)  # fmt: skip
def gradient(x: Tensor, *, spacing: Any = None, dim: Any = None, edge_order: int = 1) -> Sequence[Tensor]:
    """Central differences inside, one-sided ones of first or second order at the ends (Fornberg 1988).

    spacing  of the grid, one or one for each axis, or its coordinates along each
    """
    dims = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    steps = list(spacing) if isinstance(spacing, tuple | list) else [1.0 if spacing is None else spacing] * len(dims)
    return [_along(x.movedim(d, -1), h, edge_order).movedim(-1, d) for d, h in zip(dims, steps, strict=True)]


def _along(x: Tensor, spacing: Any, edge_order: int) -> Tensor:
    """Along the last axis, by the parabola through three neighbours; at the ends through them or through two."""
    if isinstance(spacing, Tensor) and spacing.ndim:
        h = spacing.diff().to(x.dtype)
    else:
        h = torch.full((x.shape[-1] - 1,), 1.0, dtype=x.dtype, device=x.device) * spacing
    slopes = x.diff(dim=-1) / h
    left, right, before, after = slopes[..., :-1], slopes[..., 1:], h[:-1], h[1:]
    inside = (left * after + right * before) / (before + after)
    first, last = slopes[..., :1], slopes[..., -1:]
    if edge_order == 2:
        first = first + (slopes[..., :1] - slopes[..., 1:2]) * (h[0] / (h[0] + h[1]))
        last = last + (slopes[..., -1:] - slopes[..., -2:-1]) * (h[-1] / (h[-1] + h[-2]))
    return torch.cat([first, inside, last], -1)
