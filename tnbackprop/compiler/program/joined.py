"""Joined: what one kernel gives together is one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import functions as f
from .cost import Kernel
from .expr import Call, Value, reads
from .lines import Line, Lines

PARTNER = {f.CONV_WEIGHT[k]: (k, f.CONV_INPUT[k]) for k in f.CONV_WEIGHT}


def joined(lines: Lines) -> Lines:
    """Both gradients of a convolution, by its weight and by its input, are one call, where the first of them is."""
    place = {line.value: k for k, line in enumerate(lines)}
    both: dict[int, Line] = {}
    items: dict[int, Line] = {}
    for one, other, call in _pairs(lines):
        first = min(one, other)
        if {one, other} & set(items) or any(place.get(value, -1) >= first for value in reads(call)):
            continue
        own = lines[first].note
        value = Value(f"both:{lines[one].value.key}", call, (), Kernel.NATIVE, note=own, inputs=reads(call))
        both[first] = Line(value, call, False, value.inputs, note=own)
        for k, at in enumerate((other, one)):
            items[at] = replace(lines[at], expr=Call(f.ITEM, (value, k)), inputs=(value,))
    made = (([both[k]] if k in both else []) + [items.get(k, line)] for k, line in enumerate(lines))
    return tuple(line for each in made for line in each)


def _pairs(lines: Lines) -> Iterator[tuple[int, int, Call]]:
    """The places of a gradient by a weight and of one by an input of the same convolution, and the call for both."""
    calls = [(k, line.expr) for k, line in enumerate(lines) if isinstance(line.expr, Call)]
    for k, call in calls:
        dims, partner = PARTNER.get(call.fn, (0, None))
        for at, other in calls if dims else ():
            if other.fn is partner and other.args[2:] == call.args[2:]:
                (x, size, g, *numbers), (shape, weight) = call.args, other.args[:2]
                known = isinstance(x, Value) and isinstance(weight, Value)
                if known and (x.shape, weight.shape) == (shape, size):
                    args = (g, x, weight, None, *numbers[:-1], False, (0,) * dims, numbers[-1], (True, True, False))
                    yield k, at, Call(f.CONV_BACKWARD, args)
