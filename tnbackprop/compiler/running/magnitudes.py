"""How large tensors and their differences are, in pieces that stay in the cache: gradients may fill the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 1 << 16
"""Elements."""


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN where one is, and 0 of nothing."""
    if not tensor.numel():
        return 0.0
    if not tensor.is_floating_point():
        return float(tensor.double().abs().max())
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high)) if high == high else math.nan


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest magnitude in a - b, of as many elements; NaN where one is, as of two infinities."""
    found = [largest(one - other) for one, other in zip(_pieces(a), _pieces(b), strict=True)]
    return math.nan if any(math.isnan(each) for each in found) else max(found, default=0.0)


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Σ tensor², in float64."""
    parts = [piece.double().square().sum() for piece in _pieces(tensor)]
    return torch.stack(parts).sum() if parts else tensor.new_zeros((), dtype=torch.float64)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    return iter(torch.split(flat, PIECE if tensor.device.type == "cpu" else max(1, flat.numel())))
