"""Where the batch sits in each axis of a captured value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from ...diagram.core import N, Size
from ...errors import UnsupportedError
from ..translate.graph import Value
from ..translate.names import op_name
from ..translate.operators import Copies, row_of

Axes = tuple[tuple[Size, ...], ...]
PARTS = frozenset("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk slice narrow".split())
"""Operators that take parts of an axis."""

ADVICE = "Derivatives are taken per sample, so no op may mix samples: "


def value_axes(target: Any, arguments: Mapping[str, Any], shape: tuple[Size, ...], where: str) -> Axes:
    """The factors of each output axis, the batch last known from the inputs; refuses what mixes samples."""
    inputs = [v for v in _flat(arguments) if isinstance(v, Value)]
    _check_orders(inputs, where)
    multiples = [_multiple(size, target, where, shape) for size in shape]
    if sum(k != 0 for k in multiples) > 1:
        raise UnsupportedError(
            f"{where} makes a tensor of shape {show(shape)} with two batch axes{_from(inputs)}: it compares samples "
            f"with each other. {ADVICE}compute this outside of the model"
        )
    if not any(multiples):
        return tuple((size,) for size in shape)
    if (row_of(target).uniform or row_of(target).counts) and not inputs:
        return tuple((size,) if k == 0 else _grouped(1, k) for size, k in zip(shape, multiples, strict=True))
    if row_of(target).reshapes:
        return _reshaped(inputs[0], shape, multiples, where)
    return tuple(
        (size,) if k == 0 else (N,) if k == 1 else _carried(target, inputs, shape, axis, where)
        for axis, (size, k) in enumerate(zip(shape, multiples, strict=True))
    )


def _check_orders(inputs: list[Value], where: str) -> None:
    """Axes of one size k·N have batch and other indices in one order, or else samples meet."""
    orders = {axis for v in inputs for axis in v.axes if N in axis and len(axis) > 1}
    for axis in orders:
        for other in orders - {axis}:
            if _same(_product(list(axis)), _product(list(other))):
                first, second = sorted("·".join(map(str, each)) for each in (axis, other))
                raise UnsupportedError(
                    f"{where} takes axes of one size in which batch and other indices stand in different orders, "
                    f"{first} and {second}: it would pair samples with others. Keep the batch as an axis of its own: "
                    "x.unflatten(0, …)"
                )


def batch_axis(value: Value) -> int | None:
    """The axis that holds the batch, if any."""
    return next((k for k, axis in enumerate(value.axes) if N in axis), None)


def show(shape: tuple[Size, ...]) -> str:
    """[N, 3, 8, 8]"""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def batch_multiple(size: Size) -> int | None:
    """k where size = k·N with an integer k (0: no batch); None where the size is something else in N."""
    if isinstance(size, int):
        return 0
    quotient = sympy.expand(size / N)
    return int(quotient) if quotient.is_Integer else None


def _multiple(size: Size, target: Any, where: str, shape: tuple[Size, ...]) -> int:
    k = batch_multiple(size)
    if k is None and op_name(target) in PARTS:
        raise UnsupportedError(
            f"{where} cuts the batch: a part of it has {size} of the N samples, so what parts there are depends on the "
            "batch size.\n  Give the layers the whole batch: each sample goes through by itself. Where memory is "
            "short, compile with memory_limit=."
        )
    if k is None:
        raise UnsupportedError(
            f"{where} makes a tensor of shape {show(shape)}: the axis of size {size} is no multiple of the batch size "
            f"N. {ADVICE}slice, pad and concatenate along other axes"
        )
    return k


def _reshaped(source: Value, shape: tuple[Size, ...], multiples: list[int], where: str) -> Axes:
    """N keeps its row-major place: as many elements before and after it as in the input."""
    flat = [factor for axis in source.axes for factor in axis]
    place = flat.index(N)
    before, after = _product(flat[:place]), _product(flat[place + 1 :])
    axis = next(k for k, multiple in enumerate(multiples) if multiple)
    left, right = _product(list(shape[:axis])), _product(list(shape[axis + 1 :]))
    if before * after == 0 and shape[axis] == N:  # nothing is there to be mixed
        return tuple((size,) for size in shape)
    if not left or not right or before % left or after % right or before * after == 0:
        factors = ", ".join("·".join(str(f) for f in a) or "1" for a in source.axes)
        raise UnsupportedError(
            f"{where} reshapes {source.name} [{factors}] to {show(shape)}, which mixes samples: {before} element(s) "
            f"stand before the batch index and {after} after it, but the new shape has {left} before and {right} after "
            "its batch axis. Transpose first so that the batch axis keeps its place, or keep it as an axis of its own"
        )
    inner = _grouped(before // left, after // right)
    return tuple(inner if k == axis else (size,) for k, size in enumerate(shape))


def _carried(target: Any, inputs: list[Value], shape: tuple[Size, ...], axis: int, where: str) -> tuple[Size, ...]:
    """The factor order of an axis k·N of an op that is no reshape: that of the input axis of the same size."""
    size, copies = shape[axis], row_of(target).copies
    sources = {v.axes[place] for v in inputs if (place := axis - len(shape) + len(v.axes)) >= 0}
    if copies is not None and sources <= {(1,)}:
        return _grouped(1, batch_multiple(size) or 1)
    if copies in (Copies.OUTER, Copies.INNER) and len(sources) == 1:
        (source,) = sources
        multiple = batch_multiple(size) or 0
        return _outer(source, multiple) if copies is Copies.OUTER else _inner(source, size)
    found = {a for v in inputs for a in v.axes if _same(_product(list(a)), size)}
    if not found and row_of(target).uniform:
        return _grouped(1, batch_multiple(size) or 1)
    if len(found) != 1:
        orders = " or ".join("·".join(str(f) for f in a) for a in sorted(found, key=str)) or "none"
        raise UnsupportedError(
            f"{where} has an output axis of size {size}, and its inputs do not say in which order batch and other "
            f"indices stand in it (candidates: {orders}). Keep the batch as an axis of its own: x.unflatten(0, …)"
        )
    return found.pop()


def _inner(source: tuple[Size, ...], size: Size) -> tuple[Size, ...]:
    """Copies of each element side by side: the number of copies is the innermost factor."""
    copies = size / _product(list(source))
    return source if copies == 1 else (*source, int(copies) if copies.is_Integer else copies)


def _outer(source: tuple[Size, ...], multiple: int) -> tuple[Size, ...]:
    """Copies of an axis one after the other: the number of copies is the outermost factor."""
    after = _product(list(source[source.index(N) + 1 :]) if N in source else list(source))
    return _grouped(multiple // after, after)


def _grouped(before: Any, after: Any) -> tuple[Size, ...]:
    return tuple(f for f in (before, N, after) if f != 1)


def _same(a: Size, b: Size) -> bool:
    return bool(sympy.expand(a - b) == 0)


def _product(factors: list[Size]) -> Any:
    result: Any = 1
    for factor in factors:
        result = result * factor
    return result


def _from(inputs: list[Value]) -> str:
    return " from " + ", ".join(f"{v.name} {show(v.shape)}" for v in inputs) if inputs else ""


def _flat(arguments: Mapping[str, Any]) -> list[Any]:
    flat: list[Any] = []
    for value in arguments.values():
        flat.extend(value if isinstance(value, tuple) else (value,))
    return flat
