"""A layer on its own, through the same stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import UnsupportedError
from ..quantities import Quantity
from ..quantities.total import of_all_samples
from ..table import Rules, written_out
from .capture.export import capture
from .derive.derive import bind_all, derive, needs_rule, row_for
from .derive.layer import Layer, opened
from .derive.trial import Trial
from .invariants.stage import Stage
from .invariants.table import asked, check
from .plan.plan import Plan, names_in, plan
from .search import Device


def compile_layer(module: torch.nn.Module, x: Any, quantities: Sequence[Quantity], rules: Rules) -> Layer:
    """The same stages for a module on its own, up to the diagrams; what is computed of them is planned by `part`."""
    rules, quantities = written_out(rules), of_all_samples(quantities)
    graph = capture(module, None, (x, None), rules)
    if graph.output in graph.inputs:
        raise UnsupportedError(f"{type(module).__name__} gives its input as it is: there is nothing to generate.")
    seen = asked(module, quantities)
    graph = opened(check(Stage.CAPTURE, graph, seen))
    check(Stage.CAPTURE, graph, seen)
    for call in graph.calls:
        if needs_rule(call) and row_for(call, rules) is None:
            raise UnsupportedError(
                f"{call.where} has no rule, so there is no formula to generate code from.\n"
                "  Declare one: rules=tn.RULES | {...} (examples/add_a_layer.py)."
            )
    bound = tuple((call, rule.by_formula) for call, rule in bind_all(graph, rules, Trial(graph)))
    check(Stage.BIND, bound, seen := replace(seen, graph=graph))
    derived = derive(graph, bound, quantities)
    check(Stage.DERIVE, derived, seen)
    device = Device.of(module, here=False)
    return Layer(graph, derived, device.rates, device.itemsize)


def part(layer: Layer, results: Sequence[tuple[str, str]], output: Any = None) -> Plan:
    """The steps for some (quantity, parameter) and for some values, and for nothing else."""
    chosen = layer.chosen(results, names_in(output))
    graph = replace(layer.graph, output=output)
    planned = plan(graph, chosen, layer.rates, layer.itemsize)
    return check(Stage.PLAN, planned, replace(asked(torch.nn.Module(), ()), graph=graph))
