"""One spelling per op: aliases dropped, views as reshape, pieces of a split as slices."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ...diagram.core import N, Size
from ...errors import UnsupportedError
from .graph import Value

aten = torch.ops.aten

ALIASES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.positive.default,
    }
)
"""The same values under another name: no call."""

CASTS = frozenset(
    {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default}
)

SAME_IF_SAME_SHAPE = frozenset(
    {
        aten.reshape.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.slice_scatter.default,
        aten.squeeze.dims,
        aten.flatten.using_ints,
    }
)
"""Ops that change nothing where the shape stays."""

NO_GRADIENT = frozenset(
    {
        aten.detach.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.zero.default,
        aten.fill.Scalar,
        aten.bernoulli.default,
        aten.bernoulli.p,
        aten.normal_functional.default,
        aten.sign.default,
        aten.floor.default,
        aten.ceil.default,
        aten.round.default,
        aten.trunc.default,
    }
)
"""Ops whose output has derivative zero (or none) in every input."""

CONTRACTIONS = frozenset(
    """linear matmul mm bmm mv dot addmm addmv baddbmm einsum bilinear conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d""".split()
)
"""Ops whose tensors must share one dtype, which export does not check."""

SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
        aten.unbind.int,
        aten.unsafe_split.Tensor,
        aten.unsafe_chunk.default,
    }
)

SECOND: dict[Any, Any] = {
    (aten.var_mean.correction, 0): (aten.var.correction, ("input", "dim", "correction", "keepdim")),
    (aten.std_mean.correction, 0): (aten.std.correction, ("input", "dim", "correction", "keepdim")),
    (aten.var_mean.dim, 0): (aten.var.dim, ("input", "dim", "unbiased", "keepdim")),
    (aten.std_mean.dim, 0): (aten.std.dim, ("input", "dim", "unbiased", "keepdim")),
    (aten.max.dim, 1): (aten.argmax.default, ("input", "dim", "keepdim")),
    (aten.min.dim, 1): (aten.argmin.default, ("input", "dim", "keepdim")),
    (aten.sort.default, 1): (aten.argsort.default, ("input", "dim", "descending")),
    (aten.var_mean.correction, 1): (aten.mean.dim, ("input", "dim", "keepdim")),
    (aten.var_mean.dim, 1): (aten.mean.dim, ("input", "dim", "keepdim")),
    (aten.std_mean.dim, 1): (aten.mean.dim, ("input", "dim", "keepdim")),
    (aten.std_mean.correction, 1): (aten.mean.dim, ("input", "dim", "keepdim")),
}
"""Outputs that are an op of their own."""


def canonical(target: Any, arguments: dict[str, Any], shape: tuple[Size, ...]) -> tuple[Any, dict[str, Any]]:
    """One spelling where ATen has several, with -1 and open ends filled in."""
    source = arguments.get("input")
    if target in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
    ):
        return aten.reshape.default, {"input": source, "shape": shape}
    if target in (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default):
        return aten.expand.default, {"input": source, "size": shape, "implicit": False}
    if target in (aten.swapaxes.default, aten.swapdims.default):
        first, second = (value for name, value in arguments.items() if name != "input")
        return aten.transpose.int, {"input": source, "dim0": first, "dim1": second}
    if target is aten.fill.Tensor:
        return aten.expand.default, {"input": arguments["value"], "size": shape, "implicit": False}
    if target is aten.narrow.default:
        end = arguments["start"] + arguments["length"]
        piece = {"input": source, "dim": arguments["dim"], "start": arguments["start"], "end": end, "step": 1}
        return aten.slice.Tensor, piece
    if target is aten.native_dropout.default:
        return aten.dropout.default, {"input": source, "p": arguments["p"], "train": bool(arguments["train"])}
    if target is aten.squeeze.default and isinstance(source, Value):
        dims = tuple(k for k, size in enumerate(source.shape) if size == 1)
        return aten.squeeze.dims, {"input": source, "dim": dims}
    if target is aten.slice.Tensor and isinstance(source, Value):
        size = source.shape[arguments["dim"]]
        if isinstance(size, int):
            start, end, _ = slice(arguments["start"], arguments["end"], arguments["step"]).indices(size)
            return target, arguments | {"start": start, "end": end}
    return target, arguments


def alias_of(target: Any, arguments: dict[str, Any], shape: tuple[Size, ...], dtype: torch.dtype) -> Value | None:
    """The argument that a canonical call gives back as it is, if any."""
    source = arguments.get("input")
    if target in (aten.slice_scatter.default, aten.copy.default):
        source = arguments["src"]
    if not isinstance(source, Value) or source.dtype != dtype or source.shape != shape:
        return None
    same = target in ALIASES or target in CASTS or target is aten.copy.default
    return source if same or (target in SAME_IF_SAME_SHAPE and arguments.get("step", 1) == 1) else None


def split_piece(
    target: Any, arguments: dict[str, Any], shapes: list[tuple[Size, ...]], index: int
) -> tuple[Any, dict[str, Any]] | None:
    """Output `index` of a split, chunk or unbind as a slice or select; None for other ops."""
    if target is aten.broadcast_tensors.default:
        return aten.expand.default, {"input": arguments["tensors"][index], "size": shapes[index], "implicit": False}
    if target not in SPLITS:
        return None
    source = arguments["input"]
    dim = arguments["dim"] % len(source.axes)
    if target is aten.unbind.int:
        return aten.select.int, {"input": source, "dim": dim, "index": index}
    start = sum(shape[dim] for shape in shapes[:index])
    end = start + shapes[index][dim]
    return aten.slice.Tensor, {"input": source, "dim": dim, "start": start, "end": end, "step": 1}


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


def second_output(target: Any, arguments: dict[str, Any], index: int, where: str) -> tuple[Any, dict[str, Any]]:
    """A later output of an op with several, where it is an op of its own."""
    if (target, index) not in SECOND:
        raise UnsupportedError(
            f"{where} returns several tensors and output {index} is used: only the first one has a rule. "
            "Compute it with an op of its own, or give the module a rule"
        )
    other, names = SECOND[target, index]
    found = {name: arguments[name] for name in names}
    if other is aten.mean.dim:
        found["dtype"] = None
    return other, found
