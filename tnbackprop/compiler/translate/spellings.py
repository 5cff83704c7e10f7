"""How a call of one operator is written as a call of another: what the rows of the operator table name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...diagram.core import Size
from .graph import Value
from .torch_internals import arguments_of

Shape = tuple[Size, ...]
Arguments = Mapping[str, Any]
Spelling = tuple[Any, dict[str, Any]]
Spelled = Callable[[Arguments, Shape], Spelling | None]
"""From the arguments of a call and the shape of its output to another call; None where it stays as it is."""
Piece = Callable[[Arguments, Sequence[Shape], int], Spelling]
"""From the arguments, the shapes of all outputs and the number of one to a call that makes this one."""

aten = torch.ops.aten


def as_reshape(arguments: Arguments, shape: Shape) -> Spelling:
    return aten.reshape.default, {"input": arguments["input"], "shape": shape}


def as_its_only_part(arguments: Arguments, shape: Shape) -> Spelling | None:
    parts = arguments["tensors"]
    return (aten.alias.default, {"input": parts[0]}) if len(parts) == 1 else None


def as_expand(arguments: Arguments, shape: Shape) -> Spelling:
    return _expanded(arguments["input"], shape)


def copied_as_expand(arguments: Arguments, shape: Shape) -> Spelling:
    """Of a source that has been cast."""
    return _expanded(arguments["src"], shape)


def filled_as_expand(arguments: Arguments, shape: Shape) -> Spelling:
    return _expanded(arguments["value"], shape)


def _expanded(source: Any, shape: Shape) -> Spelling:
    return aten.expand.default, {"input": source, "size": shape, "implicit": False}


def as_transpose(arguments: Arguments, shape: Shape) -> Spelling:
    first, second = (value for name, value in arguments.items() if name != "input")
    return aten.transpose.int, {"input": arguments["input"], "dim0": first, "dim1": second}


def as_cast(arguments: Arguments, shape: Shape) -> Spelling | None:
    """A change of the dtype alone."""
    source, device, other = arguments["input"], arguments.get("device"), arguments.get("other")
    dtype = other.dtype if isinstance(other, Value) else arguments.get("dtype")
    moved = device is not None and torch.device(device).type != source.device
    if moved or dtype is None or (isinstance(other, Value) and other.device != source.device):
        return None
    return cast_to(source, dtype)


def cast_to(source: Any, dtype: torch.dtype) -> Spelling:
    return call_of(aten.to.dtype, {"input": source, "dtype": dtype})


def as_sign(arguments: Arguments, shape: Shape) -> Spelling | None:
    """Of real numbers."""
    return None if arguments["input"].dtype.is_complex else call_of(aten.sign.default, arguments)


def narrowed_as_slice(arguments: Arguments, shape: Shape) -> Spelling:
    start = arguments["start"]
    return _slice(arguments["input"], arguments["dim"], start, start + arguments["length"])


def with_ends(arguments: Arguments, shape: Shape) -> Spelling | None:
    """A slice with -1 and open ends filled in."""
    source = arguments["input"]
    size = source.shape[arguments["dim"]] if isinstance(source, Value) else None
    if not isinstance(size, int):
        return None
    start, end, _ = slice(arguments["start"], arguments["end"], arguments["step"]).indices(size)
    return aten.slice.Tensor, {**arguments, "start": start, "end": end}


def as_dropout(arguments: Arguments, shape: Shape) -> Spelling:
    train = arguments["train"] is None or arguments["train"]
    own = {"input": arguments["input"], "p": arguments["p"], "train": train}
    return aten.dropout.default, own


def as_zeros(arguments: Arguments, shape: Shape) -> Spelling:
    """What is in memory that nobody wrote to counts nowhere, but 0 · NaN would."""
    return call_of(aten.zeros.default, arguments)


def as_zeros_like(arguments: Arguments, shape: Shape) -> Spelling:
    return call_of(aten.zeros_like.default, arguments)


def as_new_zeros(arguments: Arguments, shape: Shape) -> Spelling:
    return call_of(aten.new_zeros.default, arguments)


def as_repeat(arguments: Arguments, shape: Shape) -> Spelling:
    repeats = arguments["dims"]
    more = len(shape) - len(repeats)
    return aten.repeat.default, {"input": arguments["input"], "repeats": (*(1,) * more, *repeats)}


def with_axes_of_one(arguments: Arguments, shape: Shape) -> Spelling | None:
    source = arguments["input"]
    if not isinstance(source, Value):
        return None
    return aten.squeeze.dims, {"input": source, "dim": tuple(k for k, size in enumerate(source.shape) if size == 1)}


def slice_piece(arguments: Arguments, shapes: Sequence[Shape], index: int) -> Spelling:
    source = arguments["input"]
    dim = arguments["dim"] % len(source.axes)
    start = sum(shape[dim] for shape in shapes[:index])
    return _slice(source, dim, start, start + shapes[index][dim])


def _slice(source: Any, dim: Any, start: Any, end: Any) -> Spelling:
    return aten.slice.Tensor, {"input": source, "dim": dim, "start": start, "end": end, "step": 1}


def select_piece(arguments: Arguments, shapes: Sequence[Shape], index: int) -> Spelling:
    source = arguments["input"]
    return aten.select.int, {"input": source, "dim": arguments["dim"] % len(source.axes), "index": index}


def broadcast_piece(arguments: Arguments, shapes: Sequence[Shape], index: int) -> Spelling:
    return _expanded(arguments["tensors"][index], shapes[index])


def call_of(target: Any, arguments: Arguments) -> Spelling:
    """A call of an operator with what its schema shares with these arguments, and its defaults."""
    names = (("input" if a.name == "self" else a.name, a) for a in arguments_of(target))
    return target, {name: arguments[name] if name in arguments else a.default_value for name, a in names}
