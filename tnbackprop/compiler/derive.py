"""Derive: from the captured graph and its bound rules to diagrams for every cotangent and every result."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ..bind import BoundRule, bind
from ..diagram import Diagram, Product
from ..errors import RuleError, UnsupportedError
from ..quantities import Quantity, Source
from ..rule import Rule, Rules
from .columns import Setting, columns_of
from .derived import Columns, Derived
from .fallback import fallback
from .graph import Call, Graph, Value
from .sweep import Sweep, run, scale_of
from .units import without_units

ONE = Diagram((), (Product(sympy.Integer(1), ()),))


def bind_all(graph: Graph, rules: Rules) -> tuple[tuple[Call, BoundRule], ...]:
    """Every differentiable call with its rule bound; one without a rule falls back on torch.func."""
    return tuple((call, _bind(call, rules)) for call in graph.calls if _needs_rule(call))


def _needs_rule(call: Call) -> bool:
    """A call with parameters behind it, and one whose forward is that of its rule."""
    return call.output.differentiable or call.by_rule


def _bind(call: Call, rules: Rules) -> BoundRule:
    row = rules.get(call.target)
    if row is None:
        return fallback(call)
    rule = row(call if call.module is None else call.module)
    if not isinstance(rule, Rule | str):
        raise RuleError(
            f"the row for {call.where} returned {type(rule).__name__}",
            hint='return a Rule, or its formula as text: "output[n, o] = weight[o, i] * input[n, i]"',
        )
    values = {name: value for name, value in call.arguments.items() if isinstance(value, Value) or value is None}
    values |= call.tensors
    axes = {name: None if v is None else v.axes for name, v in values.items()}
    names = {name: v.name for name, v in values.items() if v is not None}
    rule = rule if isinstance(rule, Rule) else Rule(rule)
    return without_units(bind(rule, axes, names, call.output.name, call.output.axes, call.where))


def derive(
    graph: Graph, bound: tuple[tuple[Call, BoundRule], ...], quantities: Sequence[Quantity], width: int = 1
) -> Derived:
    """One reverse sweep for the gradient, and one for each kind of column that a quantity propagates.

    width  the most columns that may ride through the layers together
    """
    wanted = dict.fromkeys(q.propagates for q in quantities)
    sweep = Sweep(graph, [q for q in quantities if q.propagates.source is Source.GRADIENT])
    needing = [q.name for q in quantities if q.propagates.source is not Source.IDENTITY]
    if graph.loss is None and needing:
        names = ", ".join(needing)
        raise UnsupportedError(f"{names} need a loss, and this program has none: pass loss= to compile.")
    if graph.loss is not None:
        sweep.terms[graph.loss] = [ONE]
    run(sweep, bound)
    scale = scale_of(sweep)
    columns: list[Columns] = []
    setting = Setting(graph, bound, scale, width, sweep)
    trainable = any(graph.values[name].depends_on for name in graph.parameters)
    for propagation in (p for p in wanted if p.source is not Source.GRADIENT and trainable):
        mine = [q for q in quantities if q.propagates == propagation]
        columns += columns_of(setting, mine, propagation, len(columns))
    return Derived(bound, tuple(sweep.schedule), scale, tuple(columns))
