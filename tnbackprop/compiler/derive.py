"""Derive: from the captured graph and its bound rules to diagrams for every cotangent and every result."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from ..algebra import tensor
from ..bind import BoundRule, bind
from ..diagram import BATCH, COLUMN, Diagram, Leg, Product
from ..errors import UnsupportedError
from ..quantities import Propagation, Quantity, Source
from ..rule import Rule, Rules
from .derived import Columns, Derived, column_leg
from .fallback import fallback
from .graph import Call, Graph, Value
from .roots import loss_root
from .sweep import Sweep, run, scale_of
from .units import without_units

ONE = Diagram((), (Product(sympy.Integer(1), ()),))


def bind_all(graph: Graph, rules: Rules) -> tuple[tuple[Call, BoundRule], ...]:
    """Every differentiable call with its rule bound; one without a rule falls back on torch.func."""
    return tuple((call, _bind(call, rules)) for call in graph.calls if _needs_rule(call))


def _needs_rule(call: Call) -> bool:
    """A call with parameters behind it, and a module whose forward is its formula."""
    return call.output.differentiable or isinstance(call.target, type)


def _bind(call: Call, rules: Rules) -> BoundRule:
    row = rules.get(call.target)
    if row is None:
        return fallback(call)
    rule = row(call.module if isinstance(call.target, type) else call)
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
    if graph.loss is None and wanted:
        names = ", ".join(q.name for q in quantities)
        raise UnsupportedError(f"{names} need a loss, and this program has none: pass loss= to compile.")
    if graph.loss is not None:
        sweep.terms[graph.loss] = [ONE]
    run(sweep, bound)
    scale = scale_of(sweep)
    columns: list[Columns] = []
    for propagation in (p for p in wanted if p.source is not Source.GRADIENT):
        mine = [q for q in quantities if q.propagates == propagation]
        columns.append(_columns(graph, bound, mine, propagation, scale, len(columns), width))
    return Derived(bound, tuple(sweep.schedule), scale, tuple(columns))


def _columns(
    graph: Graph,
    bound: tuple[tuple[Call, BoundRule], ...],
    quantities: Sequence[Quantity],
    propagation: Propagation,
    scale: sympy.Expr,
    number: int,
    width: int,
) -> Columns:
    """The sweep of columns of the root: cotangents like the gradient, with a column leg of their own if several."""
    root = loss_root(graph, bound)
    variable = f"column_{number}"
    samples = propagation.samples if propagation.source is Source.SAMPLE else 0
    width = _even(samples or root.columns, width)
    lead = column_leg(width)
    kept = (Leg(COLUMN, width), BATCH)
    sweep = Sweep(graph, quantities, scales={scale}, prefix=f"s{number}", lead=lead, kept=kept, variable=variable)
    legs = next((r.equations[-1].legs for c, r in bound if c.output == root.output), ())
    sweep.terms[root.output.name] = [tensor(variable, (*lead, *legs))]
    run(sweep, bound)
    return Columns(variable, root, samples, (*lead, *legs), tuple(sweep.schedule), width)


def _even(count: int, width: int) -> int:
    """At most `width` columns at a time, so that all rounds have as many as possible."""
    rounds = -(-count // min(width, count))
    return -(-count // rounds)


