"""Derive: from the captured graph and its bound rules to diagrams for every cotangent and every result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import sympy

from ...diagram.algebra import tensor
from ...diagram.core import Diagram, Product, leaves
from ...errors import RuleError, UnsupportedError
from ...notation.bind import BoundRule, bind
from ...notation.rule import Rule
from ...quantities import Exact, Gradient, InputGrad, Propagation, Quantity, Residual
from ...quantities.total import Total, level_of
from ...table import RuleFunction, Rules
from ..sweep.derived import Columns, Derived, PerSample, by_level
from ..sweep.extract import key_of
from ..sweep.state import Sweep, scale_of
from ..sweep.sweep import run, schedule
from ..sweep.units import without_units
from ..translate.foreign import foreign
from ..translate.graph import Call, Graph, Value, op_text
from ..translate.torch_internals import of_aten
from .columns import Setting, columns_of
from .fallback import fallback
from .output import output_legs
from .trial import Trial

ONE = Diagram((), (Product(sympy.Integer(1), ()),))


def bind_all(graph: Graph, rules: Rules, trial: Trial) -> tuple[tuple[Call, BoundRule], ...]:
    """Every differentiable call with its rule bound; one without a rule falls back on torch.func."""
    return tuple((call, _bind(call, rules, trial)) for call in graph.calls if needs_rule(call))


def needs_rule(call: Call) -> bool:
    """A call with parameters behind it, and one whose forward is that of its rule."""
    return call.output.differentiable or call.by_rule


def row_for(call: Call, rules: Rules) -> RuleFunction | None:
    """The row of what is called; of several outputs it describes the first, and no complex numbers."""
    return None if call.item or call.nested else rules.get(call.target)


def _bind(call: Call, rules: Rules, trial: Trial) -> BoundRule:
    row = row_for(call, rules)
    if row is None:
        return fallback(call, trial)
    rule = rule_of(call, row)
    values = {name: value for name, value in call.arguments.items() if isinstance(value, Value) or value is None}
    values |= call.tensors
    axes = {name: None if v is None else v.axes for name, v in values.items()}
    names = {name: v.name for name, v in values.items() if v is not None}
    own = not of_aten(call.target)
    return without_units(bind(rule, axes, names, call.output.name, call.output.axes, call.where, own))


def rule_of(call: Call, row: RuleFunction) -> Rule:
    """What the row says about this call."""
    with foreign(f"the row for {call.where}", RuleError):
        rule = row(call if call.module is None else call.module)
    if not isinstance(rule, Rule | str):
        raise RuleError(
            f"the row for {call.where} returned {type(rule).__name__}",
            hint='return a Rule, or its formula as text: "output[n, o] = weight[o, i] * input[n, i]"',
        )
    return rule if isinstance(rule, Rule) else Rule(rule)


def rules_text(derived: Derived, rules: Rules) -> Iterator[str]:
    """The rule of every call that has derivatives, with the constants that it names."""
    for call, bound in derived.bound:
        target = op_text(call.target)
        if bound.fallback:
            yield f"{target}: {'no formula, native code' if bound.forward else 'no rule, by torch.func'}"
            continue
        rule = rule_of(call, rules[call.target])
        lines = [line.strip() for line in rule.formula.strip().splitlines()]
        lines += [f"∂output/∂{name} = {text}" for name, text in rule.jacobian.items()]
        constants = ", ".join(f"{name}={value}" for name, value in rule.constants.items())
        yield "\n    ".join([f"{target}{f' with {constants}' if constants else ''}:", *lines])


def _check_read(bound: tuple[tuple[Call, BoundRule], ...]) -> None:
    """A layer of one's own whose rule leaves out a parameter, or an input, would have zero derivatives by it."""
    for call, rule in bound:
        diagrams = [equation.diagram for equation in rule.equations if equation.diagram is not None]
        read = {name for diagram in diagrams for name in leaves(diagram)} | set(rule.vjp)
        read |= {name for equation in rule.equations for name in equation.jacobians}
        read |= set(rule.backward) if rule.fallback else set()
        for name, value in call.tensors.items() if call.by_rule else ():
            if value.differentiable and value.name not in read:
                raise RuleError(
                    f"the rule of {call.where} never reads '{name}': its derivatives would be zero",
                    hint=f"add {name}[legs] to the formula or to jacobian=, or freeze it: requires_grad_(False)",
                )


def _check_groups(graph: Graph, quantities: Sequence[Quantity]) -> None:
    """Every pattern of a group fits a parameter."""
    names = [dotted for value, (dotted, *_) in graph.parameters.items() if graph.values[value].depends_on]
    for total in (q for q in quantities if isinstance(q, Total)):
        total.check_groups(names)


def derive(
    graph: Graph,
    bound: tuple[tuple[Call, BoundRule], ...],
    quantities: Sequence[Quantity],
    width: int = 1,
    per_sample: PerSample | None = None,
    joint: bool = False,
) -> Derived:
    """One reverse sweep for the gradient, and one for each kind of column that a quantity propagates.

    width       the most columns that may be propagated together
    per_sample  which sweeps go sample by sample
    joint       whether the gradient may be propagated with one of them
    """
    if quantities:
        _check_read(bound)
    _check_groups(graph, quantities)
    given = bool(graph.cotangent)
    wanted = _wanted(quantities, given)
    twice = any(propagation.residual is not Residual.NONE for propagation in wanted)
    first = [q for q in quantities if isinstance(q.host, Gradient) and not isinstance(q, InputGrad)]
    sweep = Sweep(graph, first, twice=twice)
    needing = [q.name for q in quantities if any(each.needs_loss for each in q.propagations)]
    if graph.loss is None and needing and not given:
        names = ", ".join(needing)
        raise UnsupportedError(f"{names} need a loss, and this program has none: pass loss= to compile.")
    if given:
        sweep.terms[graph.output] = [tensor(graph.cotangent, output_legs(bound, graph.output))]
    elif graph.loss is not None:
        sweep.terms[graph.loss] = [ONE]
    run(sweep, bound)
    pulled = [q.name for q in quantities if isinstance(q, InputGrad)]
    reached = [name for name in graph.inputs if sweep.terms.get(name)] if given or pulled else []
    for name in reached:
        schedule(sweep, name)
    scale = scale_of(sweep)
    columns: list[Columns] = []
    roots = any(isinstance(propagation, Exact) for propagation in wanted)
    trainable = any(graph.values[name].depends_on for name in graph.parameters)
    several = any(len(q.propagations) > 1 for q in quantities)
    done: dict[Propagation, list[Sweep]] = {key_of(Gradient()): [sweep]}
    for propagation in (p for p in wanted if not isinstance(p, Gradient) and trainable):
        mine = [q for q in quantities if key_of(_host(q, given)) == key_of(propagation)]
        free = joint and not several and not any(each.joint for each in columns)
        setting = Setting(graph, bound, scale, width, sweep, propagation, roots, per_sample, free, done)
        columns += columns_of(setting, mine, len(columns))
    levels = {q.name: level for q in quantities if (level := level_of(q))}
    columns = [replace(each, schedule=by_level(each.schedule, levels)) for each in columns]
    own = by_level(tuple(sweep.schedule), levels)
    by = {name: f"{sweep.prefix}:{name}" for name in reached}
    return Derived(bound, own, scale, tuple(columns), dict(sweep.readings.found), dict.fromkeys(pulled, by))


def _wanted(quantities: Sequence[Quantity], given: bool) -> list[Propagation]:
    """What is propagated, each once; what another needs as well comes before it, and all of it is there at once."""
    guests = [replace(each, together=True) for q in quantities for each in q.propagations if each != q.host]
    found: dict[Propagation, Propagation] = {}
    for each in (*guests, *(_host(q, given) for q in quantities)):
        before = found.get(key_of(each), each)
        found[key_of(each)] = replace(each, together=each.together or before.together)
    return list(found.values())


def _host(quantity: Quantity, given: bool) -> Propagation:
    return quantity.host.alone if given else quantity.host
