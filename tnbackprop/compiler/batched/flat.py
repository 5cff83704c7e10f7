"""Flat indices: rows of all samples in a row, chosen by idx + n·arange(N), are those of each sample chosen by idx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ...diagram.core import N
from ..translate.graph import Call, Value
from ..translate.operators import Same, row_of
from ..translate.spellings import call_of
from .calls import Append, Rewritten, Shape, reshaped

aten = torch.ops.aten
ROWS = (aten.index_select.default, aten.index_add.default)
"""What chooses whole rows along one axis."""
ALONG = (
    aten.gather.default, aten.scatter_add.default, aten.scatter.src, aten.scatter.value, aten.scatter_reduce.two,
)  # fmt: skip
"""What chooses entries of rows."""
PLACES = (aten.index.Tensor, aten.index_put.default)
"""What chooses by indices of several axes."""


def multiple_of_range(
    target: Any, arguments: Mapping[str, Any], output: Value, ranges: Mapping[str, int]
) -> int | None:
    """k where a call makes k·arange(N), with axes of one beside, or copies of it. `ranges`: the k of other values."""
    row = row_of(target)
    if row.counts:
        step = arguments.get("step") or 1
        starts = not arguments.get("start") and isinstance(step, int)
        return step if starts and arguments["end"] == step * N else None
    known = ranges.get(getattr(arguments.get("input"), "name", ""))
    if known is None or (N,) not in output.axes:
        return None
    if target is aten.mul.Tensor:
        return known * arguments["other"] if isinstance(arguments["other"], int) else None
    spread = target in (aten.expand.default, aten.repeat.default) or row.reshapes or row.same is Same.CAST
    return known if spread else None


@dataclass(frozen=True)
class Known:
    """What is known of the values so far: the k of k·arange(N), by name, and what makes each."""

    ranges: Mapping[str, int]
    calls: list[Call]

    def made(self, value: Value) -> Call | None:
        """What makes a value, if a call does."""
        return next((call for call in reversed(self.calls) if call.output.name == value.name), None)

    def own(self, index: Value, count: int, append: Append) -> Value | None:
        """idx where the index is idx + count·arange(N), in the index's shape."""
        if self.ranges.get(index.name) == count:
            return append(aten.mul.Tensor, {"input": index, "other": 0}, index.shape, index.dtype)
        call = self.made(index)
        if call is None:
            return None
        given, row = dict(call.arguments), row_of(call.target)
        if row.counts:  # as many for each sample, so they start within the first step, and steps end with the samples
            step = given.get("step") or 1
            if given["end"] != count * N or not isinstance(step, int):
                return None
            rows = append(*call_of(call.target, given | {"end": count}), (count // step,), index.dtype)
            return reshaped(append, _expanded(append, rows, (N, count // step)), index.shape)
        if call.target is aten.add.Tensor and given["alpha"] == 1:
            both = given["input"], given["other"]
            for one, other in (both, both[::-1]):
                if isinstance(other, Value) and self.ranges.get(other.name) == count:
                    zero = append(aten.mul.Tensor, {"input": other, "other": 0}, other.shape, other.dtype)
                    own = {"input": zero, "other": one, "alpha": 1}
                    return _from_zero(append, append(aten.add.Tensor, own, index.shape, index.dtype), count)
            return None
        if not row.reshapes and row.same is not Same.CAST and call.target is not aten.expand.default:
            return None
        inner = self.own(given["input"], count, append)
        return None if inner is None else append(call.target, given | {"input": inner}, index.shape, index.dtype)


def by_sample(
    target: Any, arguments: dict[str, Any], shape: Shape, known: Known, append: Append
) -> Rewritten | None:
    """The call, of tensors whose axis 0 of N·n rows is one of samples and one of their rows; None for other calls."""
    source, index = arguments.get("input"), _index(target, arguments)
    if index is None or not isinstance(source, Value) or source.axes[0][:1] != (N,) or len(source.axes[0]) != 2:
        return None
    count, rest = source.axes[0][1], source.shape[1:]
    own = known.own(index, count, append) if isinstance(count, int) else None
    if own is None or own.axes[0][:1] != (N,):
        return None
    given = arguments | {"input": by_rows(append, source, len(rest))}
    if target in ALONG:
        given |= {"dim": 1, "index": by_rows(append, own, len(rest))}
        given |= {"src": by_rows(append, given["src"], len(rest))} if isinstance(given.get("src"), Value) else {}
        wide = given["index"].shape if target is aten.gather.default else given["input"].shape
    else:
        others = arguments["indices"][1:] if target in PLACES else ()
        rest = tuple(size for k, size in enumerate(rest) if k >= len(others) or others[k] is None)
        target, given = _chosen(target, given, [own, *others], rest, append)
        wide = given["input"].shape if "values" in given else (N, given["indices"][1].shape[1], *rest)
    return aten.reshape.default, {"input": append(target, given, wide, source.dtype), "shape": shape}


def by_rows(append: Append, value: Value, behind: int) -> Value:
    """[N, rows, …] of a value whose axes before the last so many have N in front."""
    front = len(value.axes) - behind
    rows = prod([factor for axis in value.axes[:front] for factor in axis][1:])
    return reshaped(append, value, (N, rows, *value.shape[front:]))


def _chosen(target: Any, given: dict[str, Any], indices: list[Value | None], rest: Shape, append: Append) -> Rewritten:
    """A call of index or index_put by those of the sample and these. `rest`: the axes that none chooses along."""
    known = [index for index in indices if index is not None]
    longest = max(len(index.axes) for index in known)
    padded = [(*(1,) * (longest - len(index.axes)), *index.shape) for index in known]
    wide = tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))
    every = call_of(aten.arange.default, {"end": N, "dtype": known[0].dtype, "device": torch.device(known[0].device)})
    samples = reshaped(append, append(*every, (N,), known[0].dtype), (N, 1))
    places = (samples, *(index and by_rows(append, _expanded(append, index, wide), 0) for index in indices))
    call = {"input": given["input"], "indices": places}
    if target in (aten.index_select.default, aten.index.Tensor):
        return aten.index.Tensor, call
    values = given["values"] if "values" in given else given["source"]
    if given.get("alpha", 1) != 1:
        values = append(aten.mul.Tensor, {"input": values, "other": given["alpha"]}, values.shape, values.dtype)
    values = by_rows(append, _expanded(append, values, (*wide, *rest)), len(rest))
    return aten.index_put.default, call | {"values": values, "accumulate": given.get("accumulate", True)}


def _from_zero(append: Append, own: Value, count: int) -> Value:
    """One past the last for what is below zero, which is an error: it would be a row of the sample in front."""
    below = append(aten.lt.Scalar, {"input": own, "other": 0}, own.shape, torch.bool)
    return append(aten.masked_fill.Scalar, {"input": own, "mask": below, "value": count}, own.shape, own.dtype)


def _expanded(append: Append, value: Value, shape: Shape) -> Value:
    if value.shape == shape:
        return value
    return append(aten.expand.default, {"input": value, "size": shape, "implicit": False}, shape, value.dtype)


def _index(target: Any, arguments: Mapping[str, Any]) -> Value | None:
    """What chooses along axis 0, if all that chooses are integers."""
    if target in PLACES:
        indices = arguments["indices"]
        found = indices[0] if all(index is None or _counts(index) for index in indices) else None
    elif target in ROWS or target in ALONG:
        found = arguments["index"] if arguments["dim"] % len(arguments["input"].axes) == 0 else None
    else:
        return None
    return found if found is not None and _counts(found) and found.axes else None


def _counts(index: Any) -> bool:
    return isinstance(index, Value) and index.dtype in (torch.int64, torch.int32)
