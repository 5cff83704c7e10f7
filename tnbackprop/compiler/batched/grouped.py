"""Convolutions with a group for each sample: kernels of its own, as a matrix product with the patches of its input."""

from __future__ import annotations

from functools import partial
from typing import Any

import sympy
import torch

from ...diagram.core import N, Size
from ..translate.graph import Value
from ..translate.spellings import call_of
from .copies import Append, Shape

aten = torch.ops.aten
FORWARD = {getattr(getattr(aten, f"conv{k}d"), name): k for k in (1, 2) for name in ("default", "padding")}
TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2}
"""The number of axes of positions, by operator."""


def own_kernels(target: Any, given: dict[str, Any], shape: Shape, append: Append) -> tuple[Any, Any] | None:
    """The call, where the channels are those of all samples in a row and its groups are N·g; None for other calls."""
    count = FORWARD.get(target) or TRANSPOSED.get(target)
    source, kernels, bias = given.get("input"), given.get("weight"), given.get("bias")
    if count is None or not isinstance(source, Value) or not isinstance(kernels, Value):
        return None
    groups, padding = sympy.sympify(given["groups"]) / N, _padding(given, kernels.shape[2:])
    rows = [source, kernels, *([bias] if isinstance(bias, Value) else [])]
    sides = source.axes[1], *(value.axes[0] for value in rows[1:])
    if padding is None or not groups.is_Integer or source.shape[0] != 1 or any(side[0] != N for side in sides):
        return None
    reshape = partial(_reshaped, append)
    flat = (1,) * (2 - count)  # an axis of one in front of a line of positions
    image, size = (*flat, *source.shape[2:]), (*flat, *kernels.shape[2:])
    places = (*flat, *shape[2:])
    options = {
        "kernel_size": size,
        "dilation": (*flat, *given["dilation"]),
        "padding": (*(0 for _ in flat), *padding),
        "stride": (*flat, *given["stride"]),
    }
    g, inside, entries = int(groups), _rest(source.axes[1]), size[0] * size[1]
    if target in FORWARD:
        into = _rest(kernels.axes[0]) // g
        x = reshape(source, (N, inside, *image))
        wide = (N, inside * entries, places[0] * places[1])
        x = append(*call_of(aten.im2col.default, {"input": x, **options}), wide)
        x = reshape(x, (N, g, inside // g * entries, wide[2]))
        w = reshape(kernels, (N, g, into, inside // g * entries))
        made = append(aten.matmul.default, {"input": w, "other": x}, (N, g, into, wide[2]))
        made = reshape(made, (N, g * into, *shape[2:]))
    else:
        into, positions = kernels.shape[1], image[0] * image[1]
        x = reshape(source, (N, g, inside // g, positions))
        w = reshape(kernels, (N, g, inside // g, into * entries))
        w = append(aten.transpose.int, {"input": w, "dim0": 2, "dim1": 3}, (N, g, into * entries, inside // g))
        made = append(aten.matmul.default, {"input": w, "other": x}, (N, g, into * entries, positions))
        made = reshape(made, (N, g * into * entries, positions))
        folded = call_of(aten.col2im.default, {"input": made, "output_size": places, **options})
        made = reshape(append(*folded, (N, g * into, *places)), (N, g * into, *shape[2:]))
    if isinstance(bias, Value):
        shift = reshape(bias, (N, g * into, *(1,) * count))
        made = append(aten.add.Tensor, {"input": made, "other": shift, "alpha": 1}, made.shape)
    return aten.reshape.default, {"input": made, "shape": shape}


def _padding(given: dict[str, Any], size: Shape) -> tuple[int, ...] | None:
    """That of each axis, which may be said in a word; None where it is not the same on both sides."""
    if not isinstance(given["padding"], str):
        return tuple(given["padding"])
    both = [0 if given["padding"] == "valid" else d * (k - 1) for d, k in zip(given["dilation"], size, strict=True)]
    return None if any(each % 2 for each in both) else tuple(each // 2 for each in both)


def _reshaped(append: Append, value: Value, shape: tuple[Size, ...]) -> Value:
    return append(aten.reshape.default, {"input": value, "shape": shape}, shape)


def _rest(axis: tuple[Size, ...]) -> Any:
    """How many entries of an axis each sample has."""
    result: Any = 1
    for factor in axis[1:]:
        result = result * factor
    return result
