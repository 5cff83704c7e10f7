"""One spelling per call: aliases dropped, views as reshape, pieces of a split as slices."""

from __future__ import annotations

from typing import Any

import torch

from ...diagram.core import Size
from ...errors import UnsupportedError
from .graph import Value
from .operators import row_of
from .spellings import call_of
from .torch_internals import overload

aten = torch.ops.aten


def canonical(target: Any, arguments: dict[str, Any], shape: tuple[Size, ...]) -> tuple[Any, dict[str, Any]]:
    """One spelling where ATen has several, with -1 and open ends filled in."""
    spelled = row_of(target).canonical
    return (spelled and spelled(arguments, shape)) or (target, arguments)


def alias_of(target: Any, arguments: dict[str, Any], shape: tuple[Size, ...], dtype: torch.dtype) -> Value | None:
    """The argument that a canonical call gives back as it is, if any."""
    row = row_of(target)
    given = arguments.get(row.given)
    if row.same is None or not isinstance(given, Value) or (given.dtype, given.shape) != (dtype, shape):
        return None
    return given if arguments.get("step", 1) == 1 else None


def output_call(
    target: Any, arguments: dict[str, Any], shapes: list[tuple[Size, ...]], index: int, where: str
) -> tuple[Any, dict[str, Any]] | None:
    """What makes output `index` of an operator with several; None where the operator itself does."""
    row = row_of(target)
    if row.pieces is not None:
        return row.pieces(arguments, shapes, index)
    name = row.outputs[index] if index < len(row.outputs) else ""
    if name:
        return call_of(overload(name), arguments)
    if index and row.canonical is not None:
        raise UnsupportedError(
            f"{where} returns several tensors and output {index} is used: only the first one has a spelling. "
            "Compute it with an op of its own, or give the module a rule"
        )
    return None
