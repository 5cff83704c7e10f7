"""Entries that a boolean mask picks: how many there are is in the data, but what is written to them is `where`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ...errors import UnsupportedError
from ..running.drawing_calls import draws
from ..translate.graph import Call, Value
from ..translate.torch_internals import OpOverload, name_of
from .calls import Append, reshaped

aten = torch.ops.aten
UNPICKED = 0.5
"""What stands where the mask is not: most functions have a finite derivative there, which nothing multiplies."""


@dataclass(frozen=True)
class Picked:
    """source[:, …, mask], or what is computed of it entry by entry: `full` has it in its place, and anything elsewhere.

    mask   bool, over axes `place`, `place` + 1, … of the source
    own    as `full`, but of what the source has elsewhere: what acts on rows reads it, as an expert on all tokens does
    """

    full: Value
    mask: Value
    place: int
    own: Value

    def refuse(self, where: str) -> NoReturn:
        raise UnsupportedError(
            f"{where} has as many entries as the boolean mask {self.mask.name} picks: the graph would depend on the "
            "data.\n  Use torch.where, or multiply by the mask, which is 0 for what does not count."
        )


def picked_call(
    target: OpOverload,
    arguments: Mapping[str, Any],
    made: torch.Tensor,
    every: Sequence[Call],
    append: Append,
    where: str,
) -> Value | Picked | None:
    """A call that reads or writes what a mask picks, as calls on whole tensors; None for any other call.

    Raises `UnsupportedError` where the result would have as many entries as the mask picks.
    """
    given = [a for a in arguments.values() if isinstance(a, Picked)]
    name = name_of(target)[0]
    if name == "masked_scatter" and not all(isinstance(size, int) for size in made.shape):
        raise UnsupportedError(
            f"{where} takes its values one after the other, in the order of all samples.\n"
            "  Use torch.where(mask, values, h) with a value for every place, or scatter."
        )
    found = _mask(arguments) if name in ("index", "index_put") else None
    if not given and found is None and name != "masked_select":
        return None
    calls = {call.output.name: call for call in every}
    if found is not None and name == "index_put":
        return _written(arguments, *found, calls, append, where)
    if found is not None:
        return _read(arguments["input"], *found, append)
    if name == "masked_select" and isinstance(arguments["input"], Value):
        mask = arguments["mask"]
        if len(mask.shape) == len(arguments["input"].shape):
            return _read(arguments["input"], mask, 0, append)
    if not given:
        return None
    first = given[0]
    if name == "slice" and _everything(arguments):
        return first
    if name == "cross_entropy_loss" and (loss := _of_classes(arguments, calls, made.dtype, append)) is not None:
        return loss
    if name in ELEMENTWISE and (loss := _of_entries(target, arguments, calls, made.dtype, append)) is not None:
        return loss
    if name in ("sum", "mean") and not _axes(arguments):
        return _summed(first, name, made.dtype, append)
    behind = made.shape[first.place + 1 :]
    shape = (*first.full.shape[: first.place], *first.mask.shape, *behind)
    others = [a for a in arguments.values() if isinstance(a, Value) and len(a.shape) > len(behind)]
    same = all(_equal(first.mask, each.mask, calls) and first.place == each.place for each in given)
    if torch.Tag.pointwise in target.tags and same and not others:
        full = append(target, _each(arguments, "full"), shape, made.dtype)
        whole = name in ANYWHERE and any(a.own is not a.full for a in given)
        own = append(target, _each(arguments, "own"), shape, made.dtype) if whole else full
        return Picked(full, first.mask, first.place, own)
    rows = _by_rows(name, target, arguments) if len(given) == 1 else None
    if rows is None or not all(isinstance(size, int) for size in behind):
        first.refuse(where)
    full = append(rows[0], _each(rows[1], "own"), shape, made.dtype)
    return Picked(full, first.mask, first.place, full)


ANYWHERE = frozenset("add sub mul neg relu gelu silu tanh sigmoid softplus elu leaky_relu".split())
"""Functions that are finite, as their derivatives are, wherever their operands are."""
ALONG = {
    "softmax": "dim", "log_softmax": "dim", "_softmax": "dim", "glu": "dim", "sum": "dim", "mean": "dim", "amax": "dim",
    "unsqueeze": "dim", "squeeze": "dim", "slice": "dim", "select": "dim", "cumsum": "dim",
}  # fmt: skip
"""Operators that act along axes, by the argument that says which."""
ITSELF = frozenset("clone contiguous alias detach dropout to _to_copy type_as".split())


def _each(arguments: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key: getattr(a, part) if isinstance(a, Picked) else a for key, a in arguments.items()}


def _by_rows(name: str, target: OpOverload, arguments: Mapping[str, Any]) -> tuple[OpOverload, dict[str, Any]] | None:
    """The call on whole tensors, where what it does is the same for each row that is picked; None elsewhere."""
    source, given = arguments.get("input"), dict(arguments)
    if not isinstance(source, Picked):
        return None
    after = _after(source)
    if name in ITSELF:
        return target, given
    if name == "linear" and after:
        return target, given
    if name in ("matmul", "mm") and after:
        right = given["other" if name == "matmul" else "mat2"]
        return (aten.matmul.default, {"input": source, "other": right}) if len(right.shape) <= 2 else None
    if name in ("layer_norm", "rms_norm"):
        return (target, given) if len(given["normalized_shape"]) <= after else None
    if name not in ALONG:
        return None
    dims, rank = given[ALONG[name]], source.place + 1 + after + (name == "unsqueeze")
    every = dims if isinstance(dims, tuple) else (dims,)
    if not every or any(dim is None or dim % rank <= source.place for dim in every):
        return None
    moved = tuple(dim % rank + len(source.mask.shape) - 1 for dim in every)
    return target, given | {ALONG[name]: moved if isinstance(dims, tuple) else moved[0]}


def lists_of_picked(
    arguments: Mapping[str, Any], made: Any, target: OpOverload, calls: Sequence[Call], where: str
) -> tuple[Picked, ...] | None:
    """What a mask picks is no operand of a module with a rule, in a list, or of what has several outputs.

    But broadcasting several that are picked alike gives them as they are.
    """
    tensors = arguments.get("tensors", ()) if name_of(target)[0] == "broadcast_tensors" else ()
    if tensors and all(isinstance(each, Picked) for each in tensors):
        first, known = tensors[0], {call.output.name: call for call in calls}
        if all(each.full.shape == first.full.shape and _equal(first.mask, each.mask, known) for each in tensors):
            return tuple(tensors)
    own = target.namespace == "aten" and not isinstance(made, list | tuple)
    for argument in arguments.values():
        for each in argument if isinstance(argument, tuple) else () if own else (argument,):
            if isinstance(each, Picked):
                each.refuse(where)
    return None


def _mask(arguments: Mapping[str, Any]) -> tuple[Value, int] | None:
    """The mask that is the only index, and its place."""
    indices = arguments["indices"]
    own = [(index, place) for place, index in enumerate(indices) if index is not None]
    if not isinstance(arguments["input"], Value) or len(own) != 1:
        return None
    index, place = own[0]
    return (index, place) if isinstance(index, Value) and index.dtype is torch.bool and index.shape else None


def _everything(arguments: Mapping[str, Any]) -> bool:
    """Whether a slice takes a whole axis: `u[:, 0]` has one of the first in torch 2.7."""
    start, end, step = (arguments.get(name) for name in ("start", "end", "step"))
    return start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1)


def _after(picked: Picked) -> int:
    """How many axes stand behind those of the mask."""
    return len(picked.full.shape) - picked.place - len(picked.mask.shape)


def _axes(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) not in (None, (), False) for name in ("dim", "keepdim"))


def _aligned(mask: Value, after: int, append: Append) -> Value:
    """The mask with axes of one where the source has further ones behind."""
    if not after:
        return mask
    shape = (*mask.shape, *(1,) * after)
    return reshaped(append, mask, shape)


def _filled(source: Value, mask: Value, value: float, append: Append) -> Value:
    """The source where the mask is, the value elsewhere."""
    no = append(aten.logical_not.default, {"input": mask}, mask.shape, mask.dtype)
    given = {"input": source, "mask": no, "value": value}
    return append(aten.masked_fill.Scalar, given, source.shape, source.dtype)


def _read(source: Value, mask: Value, place: int, append: Append) -> Picked:
    aligned = _aligned(mask, len(source.shape) - place - len(mask.shape), append)
    whole = _filled(source, aligned, UNPICKED, append) if source.dtype.is_floating_point else source
    return Picked(whole, mask, place, source)


def _written(
    arguments: Mapping[str, Any], mask: Value, place: int, calls: Mapping[str, Call], append: Append, where: str
) -> Value:
    source, values = arguments["input"], arguments["values"]
    after = _after(Picked(source, mask, place, source))
    if isinstance(values, Picked):
        if values.place != place or not _equal(mask, values.mask, calls) or values.full.shape != source.shape:
            raise UnsupportedError(
                f"{where} writes what the mask {values.mask.name} picks to where {mask.name} is: the graph would "
                "depend on the data.\n  Use torch.where."
            )
        values = values.full
    elif len(values.shape) > after:
        first = len(values.shape) - after - 1
        if values.shape[first] != 1:
            raise UnsupportedError(
                f"{where} writes {values.shape[first]} rows to where the mask {mask.name} is, one for each entry that "
                "it picks: the graph would depend on the data.\n  Use torch.where with a value for every entry."
            )
        shape = (*values.shape[:first], *(1,) * len(mask.shape), *values.shape[first + 1 :])
        if shape != values.shape:
            values = reshaped(append, values, shape)
    aligned = _aligned(mask, after, append)
    if not arguments["accumulate"]:
        given = {"condition": aligned, "input": values, "other": source}
        return append(aten.where.self, given, source.shape, source.dtype)
    spread = {"input": values, "size": source.shape, "implicit": False}
    added = _filled(append(aten.expand.default, spread, source.shape, source.dtype), aligned, 0, append)
    given = {"input": source, "other": added, "alpha": 1}
    return append(aten.add.Tensor, given, source.shape, source.dtype)


def _summed(picked: Picked, name: str, dtype: torch.dtype, append: Append) -> Value:
    """The sum of what is picked, or its mean."""
    aligned = _aligned(picked.mask, _after(picked), append)
    chosen = _filled(picked.full, aligned, 0, append)
    total = append(aten.sum.default, {"input": chosen, "dtype": None}, (), dtype)
    if name == "sum":
        return total
    spread = {"input": aligned, "size": chosen.shape, "implicit": False}
    every = append(aten.expand.default, spread, chosen.shape, aligned.dtype)
    count = append(aten.sum.default, {"input": every, "dtype": None}, (), torch.int64)
    return append(aten.div.Tensor, {"input": total, "other": count}, (), dtype)


ELEMENTWISE = frozenset(
    "mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits".split()
)
"""Losses of single entries."""
NONE, MEAN = 0, 1  # at::Reduction


def _of_classes(
    arguments: Mapping[str, Any], calls: Mapping[str, Call], dtype: torch.dtype, append: Append
) -> Value | Picked | None:
    """A cross-entropy of rows and classes that one mask picks: the classes elsewhere are those that are ignored."""
    source, target = arguments["input"], arguments["target"]
    if not isinstance(source, Picked) or not isinstance(target, Picked) or source.place or target.place:
        return None
    if target.full.dtype.is_floating_point or not _equal(source.mask, target.mask, calls):
        return None
    rank, rows, chosen = len(source.mask.shape), source.full, target.own
    if rank > 1:  # the classes are on axis 1
        order = (0, rank, *range(1, rank), *range(rank + 1, len(rows.shape)))
        moved = tuple(rows.shape[k] for k in order)
        rows = append(aten.permute.default, {"input": rows, "dims": order}, moved, rows.dtype)
    chosen = _filled(chosen, _aligned(source.mask, _after(target), append), arguments["ignore_index"], append)
    each = arguments["reduction"] == NONE
    given = {**arguments, "input": rows, "target": chosen}
    found = append(aten.cross_entropy_loss.default, given, chosen.shape if each else (), dtype)
    return Picked(found, source.mask, 0, found) if each else found


def _of_entries(
    target: OpOverload, arguments: Mapping[str, Any], calls: Mapping[str, Call], dtype: torch.dtype, append: Append
) -> Value | Picked | None:
    """A loss of entries that one mask picks."""
    given = [a for a in arguments.values() if isinstance(a, Picked)]
    first, reduction = given[0], arguments["reduction"]
    others = [a for a in arguments.values() if isinstance(a, Value) and a.shape]
    same = all(_equal(first.mask, a.mask, calls) and a.full.shape == first.full.shape for a in given)
    if others or not same or any(a.place != first.place for a in given):
        return None
    found = append(target, _each(arguments, "full") | {"reduction": NONE}, first.full.shape, dtype)
    each = Picked(found, first.mask, first.place, found)
    return each if reduction == NONE else _summed(each, "mean" if reduction == MEAN else "sum", dtype, append)


def _equal(a: Value, b: Value, calls: Mapping[str, Call]) -> bool:
    """Whether two values are made by the same operators of the same values."""
    if a.name == b.name:
        return True
    one, two = calls.get(a.name), calls.get(b.name)
    if one is None or two is None or one.target != two.target or one.module is not two.module:
        return False
    if draws(one.target, one.arguments) or one.arguments.keys() != two.arguments.keys():
        return False
    return all(_alike(one.arguments[key], two.arguments[key], calls) for key in one.arguments)


def _alike(a: Any, b: Any, calls: Mapping[str, Call]) -> bool:
    if isinstance(a, Value) and isinstance(b, Value):
        return _equal(a, b, calls)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_alike(u, v, calls) for u, v in zip(a, b, strict=True))
    return bool(type(a) is type(b) and a == b)
