"""A layer on its own: a graph without a loss, to which the cotangent of its output is handed, and columns of them.

It goes through the same stages as a model. The inputs count as differentiable, so that what is pulled back to them is a
result as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...diagram.core import N
from ...errors import UnsupportedError
from ...quantities import Handed, InputGrad, Quantity
from ...quantities.propagation import COTANGENT, HANDED
from ..program.cost import Rates
from ..program.inputs import of_loss
from ..sweep.derived import Backward, Derived, Extraction, Given, Individual, Schedule
from ..translate.graph import Graph, Value


def opened(graph: Graph) -> Graph:
    """The graph of a layer with the cotangent as its last input, and with inputs that are differentiable.

    Raises `UnsupportedError` where it has several outputs, or one without a batch.
    """
    if not isinstance(graph.output, str):
        raise UnsupportedError("a layer on its own needs one output tensor, and this one returns several.")
    output = graph.values[graph.output]
    if not any(N in axis for axis in output.axes):
        raise UnsupportedError(f"the layer's output {output} does not depend on the samples.")
    graph = by_inputs(graph, graph.inputs)
    values = dict(graph.values)
    values[COTANGENT] = replace(values[graph.output], name=COTANGENT, depends_on=frozenset())
    return replace(graph, values=values, inputs=(*graph.inputs, COTANGENT), cotangent=COTANGENT)


def with_inputs(graph: Graph, quantities: Sequence[Quantity]) -> Graph:
    """The graph with inputs that are differentiable, where a quantity is of them.

    Raises `UnsupportedError` where none is of floating numbers.
    """
    if not any(isinstance(quantity, InputGrad) for quantity in quantities):
        return graph
    given = [name for name in graph.inputs if name not in of_loss(graph)]
    if not any(graph.values[name].dtype.is_floating_point for name in given):
        shown = ", ".join(f"{name} {graph.values[name].dtype}" for name in given)
        raise UnsupportedError(f"InputGrad: no input is of floating numbers ({shown}): there is no gradient by them.")
    return by_inputs(graph, given)


def by_inputs(graph: Graph, names: Iterable[str]) -> Graph:
    """The graph with inputs of these names that are differentiable, if they are floating numbers.

    What is cut from the parameters before it is cut from the inputs, too: `detach`, what a scan keeps for its own VJP.
    """
    values = dict(graph.values)
    for name in names:
        if values[name].dtype.is_floating_point:
            values[name] = replace(values[name], depends_on=values[name].depends_on | {name})
    calls = []
    for call in graph.calls:
        arguments = {name: _known(argument, values) for name, argument in call.arguments.items()}
        behind = frozenset().union(*(values[v.name].depends_on for v in call.tensors.values()))
        before = any(v.depends_on for v in call.tensors.values())
        cut = (before and not call.output.depends_on) or call.target is torch.ops.aten.detach.default
        own = behind if call.output.dtype.is_floating_point and not cut else frozenset()
        values[call.output.name] = replace(call.output, depends_on=own)
        calls.append(replace(call, arguments=arguments, output=values[call.output.name]))
    return replace(graph, calls=tuple(calls), values=values)


def _known(argument: Any, values: dict[str, Value]) -> Any:
    if isinstance(argument, tuple):
        return tuple(_known(each, values) for each in argument)
    return values[argument.name] if isinstance(argument, Value) else argument


@dataclass(frozen=True)
class Layer:
    """A layer's diagrams, and what planning them needs."""

    graph: Graph
    derived: Derived
    rates: Rates
    itemsize: int

    @property
    def handed(self) -> tuple[Handed, ...]:
        """What is handed in at the output next to the cotangent."""
        return tuple(dict.fromkeys(c.start.handed for c in self.derived.columns if isinstance(c.start, Given)))

    @property
    def pulled_back(self) -> Iterator[tuple[str, str, Handed]]:
        """What is propagated to the inputs: (value, its name there, what was handed in at the output)."""
        given = ((c.start.handed, c.schedule) for c in self.derived.columns if isinstance(c.start, Given))
        for handed, schedule in ((HANDED[0], self.derived.schedule), *given):
            for item in (item for item in schedule if isinstance(item, Backward)):
                value = item.value or item.matrix_of
                if value in self.graph.inputs:
                    yield value, item.name, handed

    def chosen(self, results: Sequence[tuple[str, str]], values: Sequence[str] = ()) -> Derived:
        """Without the extractions of everything but these (quantity, parameter), and without sweeps for nothing."""
        every = (replace(c, schedule=self._only(c.schedule, results)) for c in self.derived.columns)
        needed = (
            c for c in every if any(isinstance(item, Extraction) or item.name in values for item in c.schedule)
        )
        return replace(self.derived, schedule=self._only(self.derived.schedule, results), columns=tuple(needed))

    def _only(self, schedule: Schedule, results: Sequence[tuple[str, str]]) -> Schedule:
        kept: list[Backward | Individual | Extraction] = []
        for item in schedule:
            if isinstance(item, Extraction):
                dotted = self.graph.parameters[item.parameter][0]
                diagrams = {q: d for q, d in item.diagrams.items() if (q.quantity, dotted) in results}
                before = {q: d for q, d in item.condensed.items() if q in diagrams}
                item = replace(item, diagrams=diagrams, condensed=before)
            if not isinstance(item, Extraction) or item.diagrams:
                kept.append(item)
        return tuple(kept)
