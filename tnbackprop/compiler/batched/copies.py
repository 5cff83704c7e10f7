"""Copies along the batch, and batches in a row: by an axis of their own, which is merged with that of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from ...diagram.core import N, Size
from ..translate.graph import Value
from .axes import batch_axis

aten = torch.ops.aten
Shape = tuple[Size, ...]
Append = Callable[[Any, dict[str, Any], Shape], Value]
"""Append a call of an operator, with the shape of its output."""


def over_batch(target: Any, arguments: dict[str, Any], shape: Shape, append: Append) -> tuple[Any, dict[str, Any]]:
    """The call, as one of tensors in which the batch is an axis of its own where it needs that."""
    copy = copy_of_batch(target, arguments, shape)
    if copy is not None:
        source, (axis, index) = arguments["input"], copy
        split = (*source.shape[:axis], *source.axes[axis], *source.shape[axis + 1 :])
        source = append(aten.reshape.default, {"input": source, "shape": split}, split)
        return aten.select.int, {"input": source, "dim": axis, "index": index}
    every = each_of_several(target, arguments, shape)
    if every is not None:
        split, axis, index = every
        source = append(aten.reshape.default, {"input": arguments["input"], "shape": split}, split)
        return aten.select.int, {"input": source, "dim": axis, "index": index}
    along = batches_in_a_row(target, arguments)
    if along is not None:
        tensors = arguments["tensors"]
        stacked = (*shape[:along], len(tensors), *tensors[0].shape[along:])
        source = append(aten.stack.default, {"tensors": tensors, "dim": along}, stacked)
        return aten.reshape.default, {"input": source, "shape": shape}
    inner = copies_in_batch(target, arguments)
    if inner is not None:
        place, count = inner
        source = arguments["input"]
        split = (*source.shape[:place], 1, *source.shape[place:])
        wide = (*split[:place], count, *split[place + 1 :])
        source = append(aten.reshape.default, {"input": source, "shape": split}, split)
        source = append(aten.expand.default, {"input": source, "size": wide, "implicit": False}, wide)
        return aten.reshape.default, {"input": source, "shape": shape}
    spread = spread_over_batch(target, arguments)
    if spread is None:
        return target, arguments
    split, place, rest = spread
    wide = (*split[:place], N, *split[place + 1 :])
    source = append(aten.reshape.default, {"input": arguments["input"], "shape": split}, split)
    source = append(aten.expand.default, {"input": source, "size": wide, "implicit": False}, wide)
    if all(size == 1 for size in rest):
        return aten.reshape.default, {"input": source, "shape": shape}
    merged = (*wide[:place], N * wide[place + 1], *wide[place + 2 :])
    source = append(aten.reshape.default, {"input": source, "shape": merged}, merged)
    return aten.repeat.default, {"input": source, "repeats": rest}


def copy_of_batch(target: Any, arguments: dict[str, Any], shape: tuple[Size, ...]) -> tuple[int, int] | None:
    """(axis, k) where the call takes the k-th of several batches that were concatenated, axis (copies, N)."""
    source = arguments.get("input")
    if target is not aten.slice.Tensor or not isinstance(source, Value):
        return None
    dim = arguments["dim"] % len(source.axes)
    place = sympy.sympify(arguments["start"] or 0) / N
    if source.axes[dim][1:] != (N,) or shape[dim] != N or not place.is_Integer or arguments["step"] != 1:
        return None
    return dim, int(place)


def each_of_several(
    target: Any, arguments: dict[str, Any], shape: tuple[Size, ...]
) -> tuple[tuple[Size, ...], int, int] | None:
    """Where the call takes every s-th of k entries of each sample, that stand side by side, s a divisor of k.

    The shape with an axis of s, its place, and which of them.
    """
    source = arguments.get("input")
    if target is not aten.slice.Tensor or not isinstance(source, Value):
        return None
    dim, start, step = arguments["dim"] % len(source.axes), arguments["start"] or 0, arguments["step"]
    axis = source.axes[dim]
    if axis[:1] != (N,) or len(axis) != 2 or not isinstance(start, int) or not isinstance(step, int) or step < 2:
        return None
    if not isinstance(axis[1], int) or axis[1] % step or not 0 <= start < step or shape[dim] != N * (axis[1] // step):
        return None
    return (*source.shape[:dim], shape[dim], step, *source.shape[dim + 1 :]), dim + 1, start


def copies_in_batch(target: Any, arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Where a call copies the axis with the batch: the place of an axis for the copies, how many."""
    source = arguments.get("input")
    if not isinstance(source, Value) or (batch := batch_axis(source)) is None:
        return None
    if target is aten.repeat_interleave.self_int and arguments["dim"] is not None:
        dim, count = arguments["dim"] % len(source.shape), arguments["repeats"]
        return (dim + 1, count) if dim == batch and isinstance(count, int) else None
    if target is not aten.repeat.default or len(arguments["repeats"]) != len(source.shape):
        return None
    count = arguments["repeats"][batch]
    others = any(size != 1 for k, size in enumerate(arguments["repeats"]) if k != batch)
    return (batch, count) if isinstance(count, int) and not others else None


def spread_over_batch(target: Any, arguments: dict[str, Any]) -> tuple[tuple[Size, ...], int, tuple[Size, ...]] | None:
    """Where a call repeats an axis N times: the shape with an axis of one for that, its place, the other repeats."""
    source = arguments.get("input")
    if not isinstance(source, Value) or batch_axis(source) is not None:
        return None
    if target is aten.repeat_interleave.self_int and arguments["repeats"] == N and arguments["dim"] is not None:
        place = arguments["dim"] % len(source.shape) + 1
        return (*source.shape[:place], 1, *source.shape[place:]), place, ()
    if target is not aten.repeat.default or N not in arguments["repeats"]:
        return None
    repeats = arguments["repeats"]
    place = repeats.index(N)
    shape = (*(1,) * (len(repeats) - len(source.shape)), *source.shape)
    rest = tuple(1 if k == place else size for k, size in enumerate(repeats))
    return (*shape[:place], 1, *shape[place:]), place, rest


def batches_in_a_row(target: Any, arguments: dict[str, Any]) -> int | None:
    """The batch axis of tensors that are concatenated along it."""
    if target not in (aten.cat.default, aten.concat.default) or len(arguments["tensors"]) < 2:
        return None
    dim = arguments["dim"] % len(arguments["tensors"][0].axes)
    return dim if all(v.axes[dim : dim + 1] == ((N,),) for v in arguments["tensors"]) else None
