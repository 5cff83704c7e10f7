"""Where curvature is taken: at the output, at several joined in one, or at what the loss itself reads of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from ..diagram.core import N
from ..quantities import Gradient, Quantity
from .derive.output import Bound
from .sweep.roots import at_loss, trained_outputs
from .translate.graph import Call, Graph, Value, depends_on, needed
from .translate.names import Names

aten = torch.ops.aten


def with_one_output(graph: Graph, quantities: Sequence[Quantity]) -> Graph:
    """The graph with one value [N, F] of the outputs that the loss reads, if it reads several and curvature is asked.

    What is computed of the outputs alone, the loss among it, reads the parts of that value in place of them. Without a
    change where an output has the batch elsewhere than alone on axis 0, and where a quantity is of the outputs
    themselves (a Jacobian), which are several then.
    """
    read = list(trained_outputs(graph).values()) if graph.loss else []
    if len(read) < 2 or not _curved(quantities) or not _alike(read):
        return graph
    before = needed(list(graph.calls), {value.name for value in read})
    after = [call for call in graph.calls if call not in before]
    calls, parts = _joined(read, graph.values)
    after = [_reading(call, parts) for call in after]
    made = {call.output.name: call.output for call in (*before, *calls, *after)}
    joint = calls[len(read)].output.name
    values = MappingProxyType({**graph.values, **made})
    return replace(graph, calls=(*before, *calls, *after), values=values, joint=joint)


def with_output_at_loss(graph: Graph, bound: Bound, quantities: Sequence[Quantity]) -> Graph:
    """The graph with what the loss itself reads as its output, where that is the output reshaped, cut or summed.

    The root of torch's losses is known there: `F.cross_entropy(f.flatten(0, 1), y.flatten())`.
    """
    value = at_loss(graph, bound) if graph.loss and _curved(quantities) else None
    return replace(graph, joint=value.name) if value else graph


def _curved(quantities: Sequence[Quantity]) -> bool:
    """Whether the loss's curvature is all that they propagate: none is of the outputs themselves, as a Jacobian."""
    later = [each for each in (p for q in quantities for p in q.propagations) if not isinstance(each, Gradient)]
    return bool(later) and all(each.needs_loss for each in later)


def _alike(read: Sequence[Value]) -> bool:
    """Whether they go side by side: the samples on axis 0, and one dtype."""
    first = all(value.axes[:1] == ((N,),) and value.dtype.is_floating_point for value in read)
    whole = all(isinstance(size, int) for value in read for size in value.shape[1:])
    return first and whole and len({(value.dtype, value.device) for value in read}) == 1


def _joined(read: Sequence[Value], taken: Mapping[str, Value]) -> tuple[list[Call], dict[str, Value]]:
    """The calls that put the outputs side by side, and those that take them apart again; the parts by output."""
    names = Names()
    for name in taken:
        names.fresh(name)
    calls: list[Call] = []

    def call(target: Any, arguments: dict[str, Any], axes: tuple[Any, ...], hint: str) -> Value:
        depends = depends_on(arguments)
        output = Value(names.fresh(hint), tuple((size,) for size in axes), read[0].dtype, depends, read[0].device)
        calls.append(Call(target, MappingProxyType(arguments), output))
        return output

    sizes = [prod(int(size) for size in value.shape[1:]) for value in read]
    flat = tuple(
        call(aten.reshape.default, {"input": value, "shape": (N, size)}, (N, size), f"{value.name}_flat")
        for value, size in zip(read, sizes, strict=True)
    )
    whole = call(aten.cat.default, {"tensors": flat, "dim": 1}, (N, sum(sizes)), "outputs")
    parts, start = dict[str, Value](), 0
    for value, size in zip(read, sizes, strict=True):
        bounds = {"dim": 1, "start": start, "end": start + size, "step": 1}
        part = call(aten.slice.Tensor, {"input": whole, **bounds}, (N, size), f"{value.name}_part")
        shaped = {"input": part, "shape": value.shape}
        parts[value.name] = call(aten.reshape.default, shaped, value.shape, f"{value.name}_again")
        start += size
    return calls, parts


def _reading(call: Call, parts: Mapping[str, Value]) -> Call:
    """The call with the parts in place of the outputs."""
    change: Callable[[Any], Any] = lambda argument: _changed(argument, parts)  # noqa: E731
    return replace(call, arguments=MappingProxyType({name: change(each) for name, each in call.arguments.items()}))


def _changed(argument: Any, parts: Mapping[str, Value]) -> Any:
    if isinstance(argument, Value):
        return parts.get(argument.name, argument)
    if isinstance(argument, tuple):
        return tuple(_changed(each, parts) for each in argument)
    return _reading(argument, parts) if isinstance(argument, Call) else argument
