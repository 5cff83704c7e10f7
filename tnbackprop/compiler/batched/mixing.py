"""Calls that couple samples although their shapes look innocent: what capture refuses, other than reshapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...diagram.core import N
from ...errors import UnsupportedError
from ..translate.graph import Value
from ..translate.names import op_name
from ..translate.operators import row_of
from .axes import ADVICE, batch_axis, show
from .flat import Known


def check_mixing(
    target: Any, arguments: Mapping[str, Any], output: Value, known: Known, where: str
) -> None:
    """Refuse a differentiable call that couples samples."""
    if not output.depends_on:
        return
    row = row_of(target)
    if row.equation:
        _check_equation(arguments[row.equation], arguments["tensors"], where)
    source = arguments.get(row.source)
    axis = batch_axis(source) if isinstance(source, Value) else None
    if axis is None:
        return
    assert isinstance(source, Value)
    shown, rank = f"{source.name} {show(source.shape)}", len(source.axes)
    if axis in row.along(arguments, rank):
        raise UnsupportedError(f"{where} works along the batch axis {axis} of {shown}. {ADVICE}use another dim")
    if axis in row.takes(arguments, rank):
        raise UnsupportedError(f"{where} takes single samples out of {shown}. {ADVICE}index another axis")
    if axis in row.positions(arguments, rank):
        raise UnsupportedError(
            f"{where} finds the batch on axis {axis} of {shown}, where it couples positions. {ADVICE}"
            "put the batch first (batch_first=True)"
        )
    indices = arguments[row.indices] if row.indices else ()
    index = indices[axis] if axis < len(indices) else None
    if isinstance(index, Value) and (known.ranges.get(index.name) != 1 or source.axes[axis] != (N,)):
        raise UnsupportedError(f"{where} picks samples of {shown} by {index.name}. {ADVICE}{_otherwise(known, index)}")


def _otherwise(known: Known, index: Value) -> str:
    """What to do instead."""
    call = known.made(index)
    while call is not None and op_name(call.target) not in ("sort", "argsort"):
        source = call.arguments.get("input")
        call = known.made(source) if isinstance(source, Value) else None
    if call is None:
        return "index the batch axis with ':' or torch.arange(batch), n rows of each by idx + n * torch.arange(batch)"
    return (
        "sort those of each sample, x.unflatten(0, …). Of experts whose tokens are sorted, take an implementation in "
        "which each token goes by itself (transformers: experts_implementation='batched_mm')"
    )


def _check_equation(equation: str, tensors: tuple[Value, ...], where: str) -> None:
    """The batch must have one letter: 'nd,md->md' would pair every sample with every other."""
    letters: set[str] = set()
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, tensors, strict=True):
        axis = batch_axis(operand)
        if axis is None:
            continue
        before, dots, after = term.partition("...")
        inner = len(operand.axes) - len(before) - len(after)
        if axis < len(before):
            letters.add(before[axis])
        elif dots and axis < len(before) + inner:
            letters.add(f"...{len(before) + inner - axis}")  # counted from the right, as the dots broadcast
        else:
            letters.add(after[axis - len(before) - inner])
    if len(letters) > 1:
        listed = ", ".join(sorted(letters))
        raise UnsupportedError(
            f"{where} '{equation}' has the batch under {len(letters)} letters ({listed}), "
            f"so it pairs samples. {ADVICE}use one letter for the batch"
        )
