"""Copies along the batch, and batches in a row: by an axis of their own, which is merged with that of the batch."""

from __future__ import annotations

from math import prod
from typing import Any

import sympy
import torch

from ...diagram.core import N
from ..translate.graph import Value
from .axes import batch_axis
from .calls import Append, Rewritten, Shape, reshaped

aten = torch.ops.aten


def over_batch(target: Any, arguments: dict[str, Any], shape: Shape, append: Append) -> Rewritten:
    """The call, as one of tensors in which the batch is an axis of its own where it needs that."""
    arguments = _along_an_axis(target, arguments, append)
    one = copy_of_batch(target, arguments, shape) or each_of_several(target, arguments, shape)
    if one is not None:
        split, axis, index = one
        return aten.select.int, {"input": reshaped(append, arguments["input"], split), "dim": axis, "index": index}
    along = batches_in_a_row(target, arguments)
    if along is not None:
        tensors = arguments["tensors"]
        stacked = (*shape[:along], len(tensors), *tensors[0].shape[along:])
        source = append(aten.stack.default, {"tensors": tensors, "dim": along}, stacked, tensors[0].dtype)
        return aten.reshape.default, {"input": source, "shape": shape}
    inner = copies_in_batch(target, arguments)
    if inner is not None:
        place, count = inner
        size = arguments["input"].shape
        source = _spread(append, arguments["input"], (*size[:place], 1, *size[place:]), place, count)
        return aten.reshape.default, {"input": source, "shape": shape}
    spread = spread_over_batch(target, arguments)
    if spread is None:
        return target, arguments
    split, place, rest = spread
    source = _spread(append, arguments["input"], split, place, N)
    if all(size == 1 for size in rest):
        return aten.reshape.default, {"input": source, "shape": shape}
    merged = (*split[:place], N * split[place + 1], *split[place + 2 :])
    return aten.repeat.default, {"input": reshaped(append, source, merged), "repeats": rest}


def _along_an_axis(target: Any, arguments: dict[str, Any], append: Append) -> dict[str, Any]:
    """Elements that are repeated without dim= are those of the flattened tensor."""
    if target is not aten.repeat_interleave.self_int or arguments["dim"] is not None:
        return arguments
    source = arguments["input"]
    return arguments | {"input": reshaped(append, source, (prod(source.shape),)), "dim": 0}


def _spread(append: Append, source: Value, split: Shape, place: int, count: Any) -> Value:
    """Copies along an axis of one in `split`."""
    wide = (*split[:place], count, *split[place + 1 :])
    source = reshaped(append, source, split)
    return append(aten.expand.default, {"input": source, "size": wide, "implicit": False}, wide, source.dtype)


def copy_of_batch(target: Any, arguments: dict[str, Any], shape: Shape) -> tuple[Shape, int, int] | None:
    """Where the call takes one of several batches that were concatenated: its axes, the place of the copies, which."""
    source = arguments.get("input")
    if target is not aten.slice.Tensor or not isinstance(source, Value):
        return None
    dim = arguments["dim"] % len(source.axes)
    place = sympy.sympify(arguments["start"] or 0) / N
    if source.axes[dim][1:] != (N,) or shape[dim] != N or not place.is_Integer or arguments["step"] != 1:
        return None
    return (*source.shape[:dim], *source.axes[dim], *source.shape[dim + 1 :]), dim, int(place)


def each_of_several(target: Any, arguments: dict[str, Any], shape: Shape) -> tuple[Shape, int, int] | None:
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
    if target is aten.repeat_interleave.self_int:
        dim, count = arguments["dim"] % len(source.shape), arguments["repeats"]
        return (dim + 1, count) if dim == batch and isinstance(count, int) else None
    if target is not aten.repeat.default or len(arguments["repeats"]) != len(source.shape):
        return None
    count = arguments["repeats"][batch]
    others = any(size != 1 for k, size in enumerate(arguments["repeats"]) if k != batch)
    return (batch, count) if isinstance(count, int) and not others else None


def spread_over_batch(target: Any, arguments: dict[str, Any]) -> tuple[Shape, int, Shape] | None:
    """Where a call repeats an axis N times: the shape with an axis of one for that, its place, the other repeats."""
    source = arguments.get("input")
    if not isinstance(source, Value) or batch_axis(source) is not None:
        return None
    if target is aten.repeat_interleave.self_int and arguments["repeats"] == N:
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
