"""Norms of matrices. What PyTorch makes of them asks whether sizes are equal, which leaves one batch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...table import Composite, Table

TABLE = Table()
aten = torch.ops.aten
TABLE.rule(aten.linalg_norm.ord_str)(Composite())
TABLE.rule(aten.linalg_matrix_norm.str_ord)(Composite())


@TABLE.composite(aten.linalg_matrix_norm.default)
def matrix_norm(
    A: Tensor, ord: float, dim: Sequence[int] = (-2, -1), keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The largest (smallest, of a negative order) singular value, for 2, or sum of a column, for 1, or of a row."""
    A = A if dtype is None else A.to(dtype)
    rows, columns = (axis % A.ndim for axis in dim)
    if abs(ord) == 2:
        values = torch.linalg.svdvals(A.movedim((rows, columns), (-2, -1)))
        found: Tensor = values.amax(-1) if ord > 0 else values.amin(-1)
        for axis in sorted((rows, columns)) if keepdim else ():
            found = found.unsqueeze(axis)
        return found
    sums = A.abs().sum(rows if abs(ord) == 1 else columns, keepdim=True)
    return sums.amax((rows, columns), keepdim) if ord > 0 else sums.amin((rows, columns), keepdim)


@TABLE.composite(aten.linalg_norm.default)
def norm(
    x: Tensor,
    ord: float | None = None,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Of vectors, where one axis is given, or no order; else of matrices."""
    axes = [dim] if isinstance(dim, int) else dim
    if ord is not None and (x.ndim == 2 if axes is None else len(axes) == 2):
        matrices: Tensor = matrix_norm(x, ord, (0, 1) if axes is None else axes, keepdim, dtype=dtype)
        return matrices
    order = 2.0 if ord is None else ord
    found: Tensor = torch.linalg.vector_norm(x, order, None if axes is None else list(axes), keepdim, dtype=dtype)
    return found
