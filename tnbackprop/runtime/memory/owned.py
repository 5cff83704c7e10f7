"""Owned: every result in memory of its own, so that writing into one changes nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...compiler.translate.torch_internals import get_unwrapped, is_functorch_wrapped_tensor
from ...results import Values

Terms = list[tuple[int, int, int]]


class Owner:
    """Hands out tensors that share no element with another one it handed out, nor with what was read.

    A copy is made where one would: of factors that two parameters have in common, say. Slices of one tensor that do
    not meet are left where they are.
    """

    def __init__(self, read: Iterable[Tensor]) -> None:
        """`read`   parameters, inputs and constants"""
        self._read = {_memory(tensor) for tensor in read}
        self._given: dict[int, list[Tensor]] = {}

    def own(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it."""
        if not tensor.numel():
            return tensor
        memory = _memory(tensor)
        others = self._given.get(memory, [])
        if memory in self._read or not _without_overlap(tensor) or any(_meet(tensor, other) for other in others):
            tensor = tensor.clone()
            memory = _memory(tensor)
        self._given.setdefault(memory, []).append(tensor)
        return tensor


    def values(self, by: Values) -> dict[str, dict[str, Any]]:
        """All results, by quantity and parameter; a value may be several tensors."""
        def each(value: Tensor | tuple[Tensor, ...]) -> Any:
            return self.own(value) if isinstance(value, Tensor) else tuple(map(self.own, value))

        return {quantity: {name: each(value) for name, value in own.items()} for quantity, own in by.items()}


def _memory(tensor: Tensor) -> int:
    while is_functorch_wrapped_tensor(tensor):  # a program inside a transform of something else
        tensor = get_unwrapped(tensor)
    return tensor.untyped_storage().data_ptr()


def _without_overlap(tensor: Tensor) -> bool:
    """Whether no two elements are in one place, as they are in what was expanded."""
    if tensor.is_contiguous():
        return True
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in one memory have an element in common."""
    terms: dict[int, tuple[int, int]] = {}  # stride -> the least and the most that it is taken, one minus other
    for tensor, sign in ((one, 1), (other, -1)):
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
            low, high = terms.get(stride, (0, 0))
            terms[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    distance = int(other.storage_offset()) - int(one.storage_offset())
    return _reached(distance, [(stride, *terms[stride]) for stride in sorted(terms, reverse=True) if stride])


def _reached(distance: int, terms: Terms) -> bool:
    """Whether distance = Σ k · stride for some low ≤ k ≤ high of each term, the largest stride first."""
    if not terms:
        return distance == 0
    (stride, low, high), rest = terms[0], terms[1:]
    least, most = sum(s * k for s, k, _ in rest), sum(s * k for s, _, k in rest)
    first, last = max(low, -((most - distance) // stride)), min(high, (distance - least) // stride)
    return any(_reached(distance - k * stride, rest) for k in range(first, last + 1))
