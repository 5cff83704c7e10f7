"""Verify: the table of invariants that is checked after every stage.

A row is ``(what holds, check)``; a check yields ``(item, what is wrong)``. It sees what the stage made and, in
`Context`, what the stages before it made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...diagram.core import BATCH, Diagram, N, V, is_head
from ...errors import InvariantError
from ...notation.bind import BoundRule
from ...quantities import InputGrad, Quantity, Total
from ...quantities.total import Needed
from ..plan.plan import Plan, names_in
from ..program.expr import Call as Call_
from ..program.expr import Rounds
from ..program.expr import Value as Step
from ..program.passes import Program
from ..program.store import LIKE
from ..sweep.derived import Backward, Derived, Extraction, Individual, Native, Schedule
from ..translate.graph import Call, Graph, is_batch
from .program import living, synchronous
from .stage import Stage
from .wellformed import Count, count, count_legs, flaws, flaws_of_jacobian, shown

Bound = tuple[tuple[Call, BoundRule], ...]
Flaws = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Context:
    """What was asked for, and what the stages so far have made.

    trainable   dotted names of the model's parameters that require a gradient
    quantities  names of the quantities
    totals      those that are summed over parameters: their values are by group
    hidden      those that others need: they are no results
    """

    trainable: frozenset[str]
    quantities: tuple[str, ...]
    graph: Graph | None = None
    totals: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()


Check = Callable[[Any, Context], Flaws]
T = TypeVar("T")


def check(stage: Stage, data: T, context: Context) -> T:
    """The data, where every invariant of the stage holds. Raises `InvariantError` at the first that does not."""
    for name, row in INVARIANTS[stage]:
        for item, wrong in row(data, context):
            what = f"after {stage}, {name!r} does not hold for {item!r}: {wrong}"
            raise InvariantError(f"{what}\n  This is a bug in tnbackprop or in an extension.")
    return data


def asked(model: torch.nn.Module, quantities: Sequence[Quantity]) -> Context:
    """The context before the first stage."""
    trainable = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    quantities = [q for q in quantities if not isinstance(q, InputGrad)]
    totals, hidden = (frozenset(q.name for q in quantities if isinstance(q, kind)) for kind in (Total, Needed))
    return Context(frozenset(trainable), tuple(q.name for q in quantities), totals=totals, hidden=hidden)


def _read(graph: Graph) -> tuple[str, ...]:
    """The values that no call makes."""
    return (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs)


# -- capture


def _defined_before_use(graph: Graph, context: Context) -> Flaws:
    defined = set(_read(graph))
    for call in graph.calls:
        for name in (value.name for value in call.tensors.values()):
            if name not in defined:
                yield call.where, f"operand {name!r} is not defined yet"
        if call.output.name in defined:
            yield call.where, f"{call.output.name!r} is defined twice"
        defined.add(call.output.name)
    for name in (*names_in(graph.output), *([graph.loss] if graph.loss else [])):
        if name not in defined:
            yield name, "it is returned, but nothing defines it"


def _values_agree(graph: Graph, context: Context) -> Flaws:
    for call in graph.calls:
        for value in (call.output, *call.tensors.values()):
            if graph.values.get(value.name) != value:
                yield value.name, f"{call.where} sees {value}, the graph has {graph.values.get(value.name)}"


def _batch_once(graph: Graph, context: Context) -> Flaws:
    for name, value in graph.values.items():
        factors = [factor for axis in value.axes for factor in axis]
        if factors.count(N) > 1:
            yield name, f"the batch is there more than once in {value}"
        if any(is_batch(factor) and factor != N for factor in factors):
            yield name, f"a factor of {value} mixes the batch with something else"


def _parameters_there(graph: Graph, context: Context) -> Flaws:
    names = {dotted: name for name, all_names in graph.parameters.items() for dotted in all_names}
    for dotted in sorted(context.trainable):
        if dotted not in names:
            yield dotted, "the parameter requires a gradient, but the graph does not have it"
        elif not graph.values[names[dotted]].depends_on:
            yield dotted, "the parameter requires a gradient, but counts as frozen"


def _dependence(graph: Graph, context: Context) -> Flaws:
    for call in graph.calls:
        upstream = frozenset().union(*(value.depends_on for value in call.tensors.values()))
        if not call.output.depends_on <= upstream:
            yield call.output.name, f"no operand depends on {sorted(call.output.depends_on - upstream)}"


def _loss_is_scalar(graph: Graph, context: Context) -> Flaws:
    if graph.loss is not None and count(graph.values[graph.loss].shape) != (1, 0):
        yield graph.loss, f"the loss is {graph.values[graph.loss]}"


# -- bind


def _elements(graph: Graph, bound: Bound) -> dict[str, Count | None]:
    """The elements of every value that a formula may read."""
    known: dict[str, Count | None] = {name: count(value.shape) for name, value in graph.values.items()}
    for _, rule in bound:
        known |= {equation.name: count_legs(equation.legs) for equation in rule.equations}
        known |= {saved.name: count(saved.shape) for saved in rule.saved}
    return known


def _graph(context: Context) -> Graph:
    if context.graph is None:
        raise InvariantError("the graph is not in the context")
    return context.graph


def _all_bound(bound: Bound, context: Context) -> Flaws:
    names = [call.output.name for call, _ in bound]
    calls = _graph(context).calls
    wanted = [call.output.name for call in calls if call.output.differentiable]
    by_formula = [call.output.name for call in calls if call.by_rule]
    for name in [*wanted, *names]:
        if name not in names:
            yield name, "differentiable but not bound"
        elif name not in (*wanted, *by_formula):
            yield name, "bound but not differentiable"
    for call, rule in bound:
        if not rule.equations or rule.equations[-1].name != call.output.name:
            yield call.where, f"the last line does not define {call.output.name!r}"


def _sizes_of_equations(bound: Bound, context: Context) -> Flaws:
    graph = _graph(context)
    for call, rule in bound:
        for equation in rule.equations:
            if equation.diagram is not None and equation.diagram.legs != equation.legs:
                yield equation.name, f"its legs are not those of its formula {equation.diagram}"
        own, value = count_legs(rule.equations[-1].legs), graph.values[call.output.name]
        if own != count(value.shape):
            yield call.output.name, f"the formula gives {shown(own)} elements, the value is {value}"


def _formulas(bound: Bound, context: Context) -> Flaws:
    known = _elements(_graph(context), bound)
    for call, rule in bound:
        for equation in rule.equations:
            if equation.diagram is not None:
                yield from ((call.where, what) for what in flaws(equation.diagram, known))
            for jacobian in equation.jacobians.values():
                yield from ((call.where, what) for what in flaws_of_jacobian(jacobian, known))


# -- derive


def _schedules(derived: Derived, context: Context) -> Iterator[tuple[Schedule, dict[str, Count | None], int]]:
    """Every sweep, with the elements of what its diagrams may read before anything is swept, and its columns."""
    known = _elements(_graph(context), derived.bound)
    known |= {name: count_legs(reading.legs) for name, reading in derived.readings.items()}
    yield derived.schedule, dict(known), 1
    earlier = {name for item in derived.schedule for name in _made(item, known)}
    for columns in derived.columns:
        own = {columns.variable: count_legs(columns.legs)}
        own |= {columns.weight: count_legs((*columns.lead, BATCH))} if columns.weight else {}
        own |= {noise.name: count_legs(noise.legs) for noise in columns.noises}
        width, _ = count_legs(columns.carried)
        yield columns.schedule, {**known, **dict.fromkeys(earlier), **own}, width
        if not columns.looped:  # others may read what it propagates
            uncounted = dict.fromkeys(known)
            earlier |= {columns.variable, *(name for item in columns.schedule for name in _made(item, uncounted))}


def _all_extracted(derived: Derived, context: Context) -> Flaws:
    graph = _graph(context)
    found: dict[str, list[str]] = {name: [] for name in graph.parameters}
    for item in derived.items:
        if isinstance(item, Extraction):
            found[item.parameter] += item.quantities
    for name, quantities in found.items():
        wanted = context.quantities if graph.values[name].differentiable else ()
        if set(quantities) != set(wanted):
            yield graph.parameters[name][0], f"it has {sorted(quantities)}, asked for were {sorted(wanted)}"


def _swept_in_order(derived: Derived, context: Context) -> Flaws:
    """Diagrams read values of the forward and cotangents that were scheduled before them."""
    for schedule, known, width in _schedules(derived, context):
        for item in schedule:
            for what, term in _terms(item):
                if not isinstance(term, Native):
                    yield from ((what, wrong) for wrong in flaws(term, known))
                elif term.cotangent not in known:
                    yield what, f"the cotangent {term.cotangent!r} is not there yet"
            made = _made(item, known, width)
            for name in made:
                if name in known:
                    yield name, "it is computed twice"
            known |= made


def _terms(item: Backward | Individual | Extraction) -> list[tuple[str, Diagram | Native]]:
    """What is computed, each with a name for messages."""
    match item:
        case Extraction():
            every = (*item.diagrams.items(), *item.condensed.items())
            return [(f"{quantity} of {item.parameter}", item.native or diagram) for quantity, diagram in every]
        case Individual():
            return [(item.name, item.native)]
        case Backward():
            before = [] if item.condensed is None else [item.condensed]
            return [(item.name, term) for term in (*item.terms, *before)]


def _made(
    item: Backward | Individual | Extraction, known: Mapping[str, Count | None], width: int = 1
) -> dict[str, Count | None]:
    """The new values and their elements: those of the value, times N for a value made of parameters."""
    match item:
        case Extraction():
            return {}
        case Individual():
            return {item.name: _times(known[item.of], width, 1)}
        case Backward():
            own = [count_legs(term.legs) for term in item.terms if not isinstance(term, Native)]
            return {item.name: own[0] if own else _times(known[item.value], width)}


def _times(elements: Count | None, width: int, batches: int = 0) -> Count | None:
    return None if elements is None else (elements[0] * width, elements[1] + batches)


def _sizes_of_cotangents(derived: Derived, context: Context) -> Flaws:
    for schedule, known, width in _schedules(derived, context):
        for item in schedule:
            elements = known.get(item.value) if isinstance(item, Backward) else None
            if elements is None:
                continue
            elements = (elements[0] * width, elements[1])
            right = (elements,) if elements[1] else (elements, _times(elements, 1, 1))
            for what, term in _terms(item):
                if not isinstance(term, Native) and count_legs(term.legs) not in right:
                    own = shown(count_legs(term.legs))
                    yield what, f"a term has {own} elements, the value {shown(elements)}: {term}"


def _result_legs(derived: Derived, context: Context) -> Flaws:
    """Copies of the batch leg and columns come first; n is the batch."""
    extracted = [pair for item in derived.items if isinstance(item, Extraction) for pair in _terms(item)]
    for what, diagram in extracted:
        legs = () if isinstance(diagram, Native) else diagram.legs
        head = [is_head(leg) for leg in legs]
        if head != sorted(head, reverse=True):
            yield what, f"batch legs do not come first in {diagram}"
        if any(leg.name == BATCH.name and leg != BATCH for leg in legs):
            yield what, f"leg n is not the batch in {diagram}"


# -- plan


def _steps_in_order(plan: Plan, context: Context) -> Flaws:
    defined = {*plan.given.values(), plan.like}
    yield from _in_order(plan.steps, defined)


def _in_order(steps: tuple[Step, ...], defined: set[Step]) -> Flaws:
    """The steps of a program, and of every function and loop in it."""
    for step in steps:
        for value in step.inputs:
            if value not in defined:
                yield str(step), f"it reads {value}, which is not computed yet: {step.expr}"
        if step in defined:
            yield str(step), f"it is computed twice: {step.expr}"
        if isinstance(step.expr, Rounds):
            yield from _in_order(step.expr.body.steps, set(step.expr.body.params))
        defined.add(step)


def _all_planned(plan: Plan, context: Context) -> Flaws:
    graph, defined = _graph(context), {*plan.given.values(), *plan.steps}
    parameters = [names[0] for name, names in graph.parameters.items() if graph.values[name].differentiable]
    for quantity in (q for q in context.quantities if q not in context.hidden):
        groups = dict.fromkeys(group for key, by in plan.results.items() if key.quantity == quantity for group in by)
        for dotted in groups if quantity in context.totals else parameters:
            found = [by.get(dotted) for key, by in plan.results.items() if key.quantity == quantity]
            if not any(found) or any(value is not None and value not in defined for value in found):
                yield f"{quantity} of {dotted}", f"its value {found} is not computed"
    for value in (*plan.output.values(), *([plan.loss] if plan.loss else [])):
        if value not in defined:
            yield str(value), "it is returned, but not computed"


def _shapes_known(plan: Plan, context: Context) -> Flaws:
    for step, _ in plan.timed:
        for size in step.shape:
            if not isinstance(size, int) and not size.free_symbols <= {N, V}:
                yield str(step), f"size {size} is neither a number nor a multiple of N or V"


def _einsum_stays_inside(plan: Plan, context: Context) -> Flaws:
    """An einsum string is an op of the model or nothing."""
    own = set(plan.forward.values())
    for step, _ in plan.timed:
        if isinstance(step.expr, Call_) and step.expr.fn.name.endswith("einsum") and step not in own:
            yield str(step), f"a contraction was left to einsum: {step.expr}"


def _work_counted(plan: Plan, context: Context) -> Flaws:
    for step, _ in plan.timed:
        for coefficient, legs in (*step.work.flops, *step.work.moved, *step.work.fresh):
            if coefficient < 0 or not all(isinstance(leg.size, int) or leg.size.free_symbols <= {N, V} for leg in legs):
                yield str(step), f"its work {coefficient}·{legs} is no polynomial in leg sizes"


# -- program and emit


def _given(program: Program, context: Context) -> Flaws:
    known = {*_read(_graph(context)), LIKE, *program.noises, *program.operands}
    for value in program.given:
        if value.key not in known:
            yield str(value), "the model has no such tensor"


def _compiles(source: str, context: Context) -> Flaws:
    try:
        compile(source, "<source>", "exec")
    except SyntaxError as error:
        yield f"line {error.lineno}", f"{error.msg}: {(error.text or '').strip()}"


INVARIANTS: Mapping[Stage, tuple[tuple[str, Check], ...]] = {
    Stage.CAPTURE: (
        ("values are defined once and before use", _defined_before_use),
        ("calls and graph agree on values", _values_agree),
        ("a value has the batch at most once", _batch_once),
        ("every trainable parameter is there", _parameters_there),
        ("a value depends on what its operands depend on", _dependence),
        ("the loss is a scalar", _loss_is_scalar),
    ),
    Stage.BIND: (
        ("every differentiable call has its rule", _all_bound),
        ("a formula has the legs and size of its value", _sizes_of_equations),
        ("formulas and Jacobians are well-formed", _formulas),
    ),
    Stage.DERIVE: (
        ("every trainable parameter has every quantity once", _all_extracted),
        ("a cotangent has the size of its value", _sizes_of_cotangents),
        ("diagrams are well-formed and read what is there", _swept_in_order),
        ("results have batch legs first", _result_legs),
    ),
    Stage.PLAN: (
        ("steps are computed once and in order", _steps_in_order),
        ("every result is computed", _all_planned),
        ("shapes are known", _shapes_known),
        ("no contraction is left to run-time planning", _einsum_stays_inside),
        ("work is a polynomial in leg sizes", _work_counted),
    ),
    Stage.PROGRAM: (
        ("every line reads living values", living),
        ("the tensors are those of the model", _given),
        ("no line waits for the device", synchronous),
    ),
    Stage.EMIT: (("the source compiles", _compiles),),
}
"""After each stage, what holds and how it is checked."""
