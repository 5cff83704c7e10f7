"""Joined: what one kernel gives together is one call."""

from __future__ import annotations

from dataclasses import replace

from . import functions as f
from .cost import Kernel
from .expr import Call, Value, reads
from .lines import Line, Lines

DIMS = {f.CONV_WEIGHT[k]: k for k in f.CONV_WEIGHT}
PARTNER = {f.CONV_WEIGHT[k]: f.CONV_INPUT[k] for k in f.CONV_WEIGHT}


def joined(lines: Lines) -> Lines:
    """Both gradients of a convolution, by its weight and by its input, are one call, where the first of them is."""
    place = {line.value: k for k, line in enumerate(lines)}
    by_weight = {id(line): line.expr for line in lines if isinstance(line.expr, Call) and line.expr.fn in DIMS}
    if not by_weight:
        return lines
    at = {id(line): k for k, line in enumerate(lines)}
    found: dict[int, Line] = {}
    before: dict[int, Line] = {}
    for line in lines:
        expr = by_weight.get(id(line))
        other = _partner(lines, expr) if expr is not None else None
        if expr is None or other is None or at[id(other)] in found:
            continue
        first, call = min(at[id(line)], at[id(other)]), _both(expr, other.expr)
        if any(place.get(value, -1) >= first for value in reads(call)):
            continue
        both = Value(f"both:{line.value.key}", call, (), Kernel.NATIVE, note=lines[first].note, inputs=reads(call))
        before[first] = Line(both, call, False, both.inputs, note=both.note)
        for k, each in ((1, line), (0, other)):
            found[at[id(each)]] = replace(each, expr=Call(f.ITEM, (both, k)), inputs=(both,))
    made = ((*([before[k]] if k in before else []), found.get(k, line)) for k, line in enumerate(lines))
    return tuple(line for each in made for line in each)


def _partner(lines: Lines, weight: Call) -> Line | None:
    """The line that is the same convolution's gradient by its input."""
    x, size, g, *numbers = weight.args
    for line in lines:
        expr = line.expr
        if isinstance(expr, Call) and expr.fn is PARTNER[weight.fn] and expr.args[2:] == (g, *numbers):
            (shape, kernel), values = expr.args[:2], (x, expr.args[1])
            if all(isinstance(each, Value) for each in values) and (x.shape, kernel.shape) == (shape, size):
                return line
    return None


def _both(weight: Call, other: object) -> Call:
    assert isinstance(other, Call)
    x, _, g, stride, padding, dilation, groups = weight.args
    whole = (0,) * DIMS[weight.fn]
    wanted = (True, True, False)
    args = (g, x, other.args[1], None, stride, padding, dilation, False, whole, groups, wanted)
    return Call(f.CONV_BACKWARD, args)
