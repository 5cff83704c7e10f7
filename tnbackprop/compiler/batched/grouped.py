"""Samples side by side as channels: convolutions with a group for each, and batch norms that are of one sample then.

Kernels of its own are a matrix product with the patches of a sample's input; statistics are those of an instance norm.
"""

from __future__ import annotations

from math import prod
from typing import Any

import sympy
import torch

from ...diagram.core import N
from ..translate.graph import Value
from ..translate.spellings import call_of
from .calls import Append, Rewritten, Shape, reshaped

aten = torch.ops.aten
FORWARD = {getattr(getattr(aten, f"conv{k}d"), name): k for k in (1, 2) for name in ("default", "padding")}
TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2}
"""The number of axes of positions, by operator."""


def own_kernels(target: Any, given: dict[str, Any], shape: Shape, append: Append) -> Rewritten | None:
    """The call, where the channels are those of all samples in a row and its groups are N·g; None for other calls."""
    count = FORWARD.get(target) or TRANSPOSED.get(target)
    source, kernels, bias = given.get("input"), given.get("weight"), given.get("bias")
    if count is None or not isinstance(source, Value) or not isinstance(kernels, Value):
        return None
    groups, padding = sympy.sympify(given["groups"]) / N, _padding(given, kernels.shape[2:])
    sides = [source.axes[1], kernels.axes[0], *([bias.axes[0]] if isinstance(bias, Value) else [])]
    if padding is None or not groups.is_Integer or source.shape[0] != 1 or any(side[0] != N for side in sides):
        return None
    made = (_patches if target in FORWARD else _spread)(given | {"padding": padding}, int(groups), shape[2:], append)
    if isinstance(bias, Value):
        shift = reshaped(append, bias, (*made.shape[:2], *(1,) * count))
        made = append(aten.add.Tensor, {"input": made, "other": shift, "alpha": 1}, made.shape, made.dtype)
    return aten.reshape.default, {"input": made, "shape": shape}


def own_statistics(target: Any, given: dict[str, Any], shape: Shape, append: Append) -> Rewritten | None:
    """The call, where a batch norm takes its statistics of [1, N·C, …]; running ones that it writes to are copies."""
    source = given.get("input")
    if target is not aten.batch_norm.default or not given["training"] or not isinstance(source, Value):
        return None
    sides = [source.axes[1], *(v.axes[0] for v in map(given.get, OF_CHANNELS) if isinstance(v, Value))]
    if source.axes[0] != (1,) or any(side[0] != N for side in sides):
        return None
    wide = (N, prod(source.axes[1][1:]), *source.shape[2:])
    options = {"input": reshaped(append, source, wide), "use_input_stats": True, "momentum": 0.0, "eps": given["eps"]}
    made = append(*call_of(aten.instance_norm.default, {**dict.fromkeys(OF_CHANNELS), **options}), wide, source.dtype)
    for name, combine, more in (("weight", aten.mul.Tensor, {}), ("bias", aten.add.Tensor, {"alpha": 1})):
        if isinstance(given[name], Value):
            other = reshaped(append, given[name], (*wide[:2], *(1,) * len(wide[2:])))
            made = append(combine, {"input": made, "other": other, **more}, wide, source.dtype)
    return aten.reshape.default, {"input": made, "shape": shape}


OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


def _patches(given: dict[str, Any], groups: int, places: Shape, append: Append) -> Value:
    """[N, outputs, *places]: the kernels times the patches of the input."""
    source, kernels = given["input"], given["weight"]
    size, inside, into = _images(kernels.shape[2:]), prod(source.axes[1][1:]), prod(kernels.axes[0][1:]) // groups
    each = inside // groups * prod(size)
    x = reshaped(append, source, (N, inside, *_images(source.shape[2:])))
    wide = (N, inside * prod(size), prod(places))
    x = append(*call_of(aten.im2col.default, {"input": x, **_options(given)}), wide, source.dtype)
    x = reshaped(append, x, (N, groups, each, prod(places)))
    w = reshaped(append, kernels, (N, groups, into, each))
    made = append(aten.matmul.default, {"input": w, "other": x}, (N, groups, into, prod(places)), source.dtype)
    return reshaped(append, made, (N, groups * into, *places))


def _spread(given: dict[str, Any], groups: int, places: Shape, append: Append) -> Value:
    """[N, outputs, *places] of a transposed one: what every entry of the input makes of its kernel, added up."""
    source, kernels = given["input"], given["weight"]
    into, inside, entries = kernels.shape[1], prod(source.axes[1][1:]) // groups, prod(kernels.shape[2:])
    made, positions = (N, groups, into * entries, prod(source.shape[2:])), _images(places)
    x = reshaped(append, source, (N, groups, inside, made[3]))
    w = reshaped(append, kernels, (N, groups, inside, into * entries))
    turned = (N, groups, into * entries, inside)
    w = append(aten.transpose.int, {"input": w, "dim0": 2, "dim1": 3}, turned, source.dtype)
    each = append(aten.matmul.default, {"input": w, "other": x}, made, source.dtype)
    each = reshaped(append, each, (N, groups * into * entries, made[3]))
    folded = call_of(aten.col2im.default, {"input": each, "output_size": positions, **_options(given)})
    return reshaped(append, append(*folded, (N, groups * into, *positions), source.dtype), (N, groups * into, *places))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Those of patches of an image."""
    size = given["weight"].shape[2:]
    options = {"dilation": _images(given["dilation"]), "stride": _images(given["stride"])}
    return {"kernel_size": _images(size), "padding": _images(given["padding"], 0), **options}


def _images(sizes: Shape, fill: int = 1) -> Shape:
    """Two axes for those of a line, or of an image."""
    return (*(fill,) * (2 - len(sizes)), *sizes)


def _padding(given: dict[str, Any], size: Shape) -> tuple[int, ...] | None:
    """That of each axis, which may be said in a word; None where it is not the same on both sides."""
    if not isinstance(given["padding"], str):
        return tuple(given["padding"])
    both = [0 if given["padding"] == "valid" else d * (k - 1) for d, k in zip(given["dilation"], size, strict=True)]
    return None if any(each % 2 for each in both) else tuple(each // 2 for each in both)
