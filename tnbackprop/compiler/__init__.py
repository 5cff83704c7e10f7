"""The compiler, in order: capture, bind, derive, (simplify, share and) plan, lower, emit. Nothing else happens here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..errors import UnsupportedError
from ..notation.rule import Rules
from ..quantities import Quantity
from .capture.export import capture
from .derive.derive import bind_all, derive, needs_rule
from .derive.derived import Apart, Derived
from .derive.layer import Layer, opened
from .emit.source import Writer, emit
from .invariants.stage import Stage
from .invariants.table import asked, check
from .lower.table import LOWERINGS
from .plan.limits import check_memory, machine_bytes
from .plan.memory import peak_bytes
from .plan.plan import Plan, names_in, plan
from .plan.processor import of_processor
from .plan.samples import separable
from .program.cost import RATES, Rates
from .program.expr import Value
from .translate.graph import Graph

WIDER = (4, 8)
CLEARLY = 0.95
"""As many columns ride together as the device likes, half as many where that looks faster (they may come out even), or
one of `WIDER` times as many where that looks clearly faster: those take more memory. The gradient rides along with them
where that looks clearly faster, too: views are not free."""
MANY = 2
"""A sample that has this many times the columns that the device likes may have them all at once."""
WORTH = 1e-3
"""Seconds that a program must take for another way to be tried: planning takes longer."""


Made = tuple[Derived, Plan]


@dataclass(frozen=True)
class Compiled:
    """What every stage produced."""

    graph: Graph
    derived: Derived
    plan: Plan
    source: str

    @cached_property
    def texts(self) -> dict[Value, tuple[str, str]]:
        """The name and the expression of every step, for people."""
        return self.writer.texts()

    @cached_property
    def writer(self) -> Writer:
        """What writes its source."""
        return Writer(self.graph, self.plan)


def compile_program(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor] | None,
    example: tuple[Any, Any],
    quantities: Sequence[Quantity],
    rules: Rules,
    memory_limit: int | None = None,
    here: bool = True,
) -> Compiled:
    """Run the stages on an example batch; `here` where the source runs on this machine: by what this one has."""
    graph = capture(model, loss, example, rules)
    seen = asked(model, tuple(q.name for q in quantities))
    check(Stage.CAPTURE, graph, seen)
    bound = bind_all(graph, rules)
    check(Stage.BIND, bound, seen := replace(seen, graph=graph))
    rates, itemsize = _rates(model), _itemsize(model)
    if here and rates.name == "cpu" and itemsize == 4:
        rates = of_processor(rates)
    width, *others = _widths(rates, graph.example_batch)
    derived = derive(graph, bound, quantities, width)
    check(Stage.DERIVE, derived, seen)
    check_memory(graph, derived, itemsize, memory_limit or machine_bytes(_device(model)))

    def attempt(columns: int, apart: Apart | None = None, beside: bool = False) -> Made | None:
        plain = columns == width and apart is None and not beside
        again = derived if plain else derive(graph, bound, quantities, columns, apart, beside)
        possible = separable(again) and beside == any(each.beside for each in again.columns)
        return (again, plan(graph, again, LOWERINGS, rates, itemsize)) if possible else None

    derived, planned = _fastest(width, others, Apart(MANY * rates.rows, rates.odd), attempt)
    if memory_limit is not None and peak_bytes(planned) > memory_limit:
        derived = derive(graph, bound, quantities)
        check(Stage.DERIVE, derived, seen)
        planned = plan(graph, derived, LOWERINGS, rates, itemsize, memory_limit)
    check(Stage.PLAN, planned, seen)
    check(Stage.PROGRAM, Writer(graph, planned).program, seen)
    source = emit(graph, planned, f"{type(model).__name__}: {', '.join(q.name for q in quantities)}")
    check(Stage.EMIT, source, seen)
    return Compiled(graph, derived, planned, source)


def compile_layer(module: torch.nn.Module, x: Any, quantities: Sequence[Quantity], rules: Rules) -> Layer:
    """The same stages for a module on its own, up to the diagrams; what is computed of them is planned by `part`."""
    graph = capture(module, None, (x, None), rules)
    seen = asked(module, tuple(q.name for q in quantities))
    graph = opened(check(Stage.CAPTURE, graph, seen))
    check(Stage.CAPTURE, graph, seen)
    for call in graph.calls:
        if needs_rule(call) and call.target not in rules:
            raise UnsupportedError(
                f"{call.where} has no rule, so there is no formula to generate code from.\n"
                "  Declare one: rules=tn.RULES | {...} (examples/add_a_layer.py)."
            )
    bound = bind_all(graph, rules)
    check(Stage.BIND, bound, seen := replace(seen, graph=graph))
    derived = derive(graph, bound, quantities)
    check(Stage.DERIVE, derived, seen)
    return Layer(graph, derived, _rates(module), _itemsize(module))


def part(layer: Layer, results: Sequence[tuple[str, str]], output: Any = None) -> Plan:
    """The steps for some (quantity, parameter) and for some values, and for nothing else."""
    chosen = layer.chosen(results, names_in(output))
    graph = replace(layer.graph, output=output)
    planned = plan(graph, chosen, LOWERINGS, layer.rates, layer.itemsize)
    return check(Stage.PLAN, planned, replace(asked(torch.nn.Module(), ()), graph=graph))


def _widths(rates: Rates, batch: int) -> tuple[int, ...]:
    """How many columns may ride together: what the device likes, and what else to try."""
    likes = max(1, rates.rows // batch)
    tried = (likes, max(1, rates.rows // (2 * batch)), *(max(1, times * rates.rows // batch) for times in WIDER))
    return tuple(dict.fromkeys(tried))


def _fastest(width: int, others: Sequence[int], apart: Apart, attempt: Callable[..., Made | None]) -> Made:
    """What is derived and planned for as many columns at a time as looks best, or for one sample after the other."""
    best = attempt(width)
    assert best is not None
    likes = best[1].seconds
    if likes < WORTH:
        return best
    together = attempt(width, beside=True)
    best = together if together is not None and together[1].seconds < CLEARLY * likes else best
    if not best[1].loops:
        return best
    many = any(loop.columns >= apart.least for loop in best[1].loops)
    alone = attempt(max((width, *others)), apart) if many else None
    if alone is not None and alone[1].seconds < CLEARLY * likes:
        best = alone
    for tried in others:
        made = attempt(tried)
        assert made is not None
        better = made[1].seconds < (likes if tried < width else min(CLEARLY * likes, best[1].seconds))
        best = made if better and made[1].seconds < best[1].seconds else best
        if better == (tried < width):  # fewer do, or these are too many
            break
    return best


def _rates(model: torch.nn.Module) -> Rates:
    return RATES.get(_device(model).type, RATES["cpu"])


def _device(model: torch.nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _itemsize(model: torch.nn.Module) -> int:
    return next((p.dtype.itemsize for p in model.parameters()), 4)
