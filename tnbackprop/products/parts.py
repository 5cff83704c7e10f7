"""Parts of the data: what their losses tell of how the matrices of batches join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Reduction(Enum):
    """What a loss is of those of its samples."""

    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True, eq=False)
class Parts:
    """The samples of a batch.

    values  the model's output and y, with the samples on axis 0 of every tensor
    loss    of such values
    """

    values: tuple[Any, Any]
    loss: Callable[[Any, Any], Tensor]
    size: int

    def some(self, first: int, last: int) -> Parts:
        """Those from `first` on, before `last`."""
        return Parts(pytree.tree_map(lambda leaf: leaf[first:last], self.values), self.loss, last - first)

    def ways(self, before: tuple[Any, Any] | None = None) -> set[Reduction]:
        """What the loss may be of those of its samples, told by two parts, and by the values of one `before`.

        Empty where it is neither, as it is with class weights or `ignore_index` that are not the same for all.
        """
        cut = self.size // 3 or 1
        pairs = [(self.some(0, cut), self.some(cut, self.size))] if self.size > 1 else []
        pairs += [(Parts(before, self.loss, 1), self)] if before is not None else []
        return set(Reduction).intersection(*(self._told(one, other) for one, other in pairs))

    def _told(self, one: Parts, other: Parts) -> set[Reduction]:
        """What it may be. Samples that do not fit into one batch may have a sum: a mean would count them by more."""
        joined = _joined(one.values, other.values)
        if joined is None:
            return {Reduction.SUM}
        with torch.no_grad():
            whole, *halves = (float(self.loss(*each)) for each in (joined, one.values, other.values))
        size = one.size + other.size
        ways = {Reduction.MEAN: (one.size * halves[0] + other.size * halves[1]) / size, Reduction.SUM: sum(halves)}
        slack = 100 * torch.finfo(self._dtype).eps * sum(map(abs, (whole, *halves)))
        return {way for way, value in ways.items() if abs(whole - value) <= slack}

    @property
    def _dtype(self) -> torch.dtype:
        found: Tensor = next(leaf for leaf in pytree.tree_leaves(self.values) if leaf.is_floating_point())
        return found.dtype


def _joined(one: tuple[Any, Any], other: tuple[Any, Any]) -> Any:
    """The values of both in one batch; None where they do not fit."""
    leaves, spec = pytree.tree_flatten(one)
    others: list[Tensor] = pytree.tree_leaves(other)
    if any((a.shape[1:], a.dtype) != (b.shape[1:], b.dtype) for a, b in zip(leaves, others, strict=True)):
        return None
    return pytree.tree_unflatten([torch.cat(pair) for pair in zip(leaves, others, strict=True)], spec)
