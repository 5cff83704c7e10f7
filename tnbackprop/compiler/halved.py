"""Halves: the program cut at the model's output, and what is saved in between.

The first half is what the output is made of; all else is the second. What the second reads of the first is saved, as
small as what is read of it: a mask where only a gate is read, the smallest integers for positions inside a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from ..diagram.core import Diagram, N, Selection
from ..notation.bind import COTANGENT, COTANGENTS
from .emit.source import Writer
from .plan.plan import Plan
from .program import functions as f
from .program.cost import Kernel, bytes_of
from .program.expr import Body, Call, Expr, Filled, Rounds, Value, reads, replaced
from .program.inputs import of_loss
from .program.lines import alive
from .sweep.derived import Derived, Result
from .translate.graph import Graph

aten = torch.ops.aten
SAVED = "saved"
GATES = frozenset({"threshold_backward", "hardtanh_backward"})
"""VJPs that let the cotangent pass or not: of what they read besides only that is needed."""
INTEGERS = ((2**8, torch.uint8, 1), (2**15, torch.int16, 2), (2**31, torch.int32, 4))
"""(more than the largest, dtype, bytes)"""


@dataclass(frozen=True)
class Saving:
    """A value that the second half reads: what it is saved as, and the bytes of one element (0: those of the dtype)."""

    value: Value
    itemsize: int = 0

    @property
    def what(self) -> str:
        """For people."""
        return {0: "", 1: "8 bits", 2: "16 bits", 4: "32 bits"}[self.itemsize]


@dataclass(frozen=True)
class Halved:
    """The sources of both halves; `saved` by the name that both have for it.

    own    names of tensors of the model that the second half reads
    given  the inputs that it reads, without those of the loss
    """

    forward: str
    backward: str
    saved: Mapping[str, Saving]
    own: frozenset[str]
    given: frozenset[str]

    def bytes(self, batch: int, itemsize: int) -> float:
        """Of all that is saved, of so many samples; values that share memory count once, views of what is given not."""
        found = {base: s for s in self.saved.values() if (base := _base(s.value)).expr is not None}
        return sum(bytes_of(s.value.shape, batch, s.itemsize or itemsize) for s in found.values())


def halved(graph: Graph, derived: Derived, plan: Plan, header: str) -> Halved:
    """Cut the program where the model's output is there."""
    first, rest = _cut(graph, plan)
    wanted = {*plan.checks.values(), *(v for by in plan.results.values() for v in by.values())}
    wanted |= {value for value in (plan.loss, plan.divisor) if value is not None}
    rest = alive(rest, wanted)  # without a loss that is no result
    readers: dict[Value, list[Value]] = {}
    for step in rest:
        for value in step.inputs:
            readers.setdefault(value, []).append(step)
    crossing = [v for v in first if v in readers or v in wanted]
    masks = {v for name, v in plan.forward.items() if name in graph.values and graph.values[name].dtype is torch.bool}
    bounds, fixed = _bounds(derived, plan), wanted | set(plan.output.values()) | masks
    packed = _worth({v: None if v in fixed else _packed(v, readers[v], bounds.get(v)) for v in crossing})
    extra = [step for each in packed.values() if each is not None for step in each.before]
    names = {f"{SAVED}:{k}": v for k, v in enumerate(crossing)}
    saved = {name: _saving(packed[v], v, v in masks) for name, v in names.items()}
    forward = replace(
        plan, steps=(*first, *extra), loss=None, checks={}, divisor=None,
        results={Result(SAVED): {name: saving.value for name, saving in saved.items()}},
    )  # fmt: skip
    to: dict[Value, Value] = {}
    inside: list[Value] = []
    for name, v in names.items():
        own = saved[name].value
        given = Value(name, None, own.shape, hint=v.hint or own.hint, floating=own.floating, strided=own.strided)
        to[own] = given
        after = packed[v]
        if after is None:
            to[v] = given
        elif after.unpacked is not None:
            inside.append(_moved(after.unpacked, {own: given}))
            to[v] = inside[-1]
    gates = {step: new for each in packed.values() if each is not None for step, new in each.readers.items()}
    for step in rest:
        to[step] = _moved(replace(gates.get(step, step), hint=step.hint), to)
        inside.append(to[step])

    def other(value: Value) -> Value:
        return to.get(value, value)

    backward = replace(
        plan, steps=alive(inside, {other(v) for v in wanted}), output={}, loss=other(plan.loss) if plan.loss else None,
        results={q: {name: other(v) for name, v in by.items()} for q, by in plan.results.items()},
        checks={name: other(v) for name, v in plan.checks.items()}, divisor=plan.divisor and other(plan.divisor),
        given={**plan.given, **{name: to[saved[name].value] for name in names}}, operands=(*plan.operands, *names),
    )  # fmt: skip
    inputs = of_loss(graph)
    later = replace(graph, inputs=(*inputs, *(name for name in graph.inputs if name not in inputs)), output=())
    read = _read(backward)
    return Halved(
        Writer(graph, forward).source(f"{header}: forward"), Writer(later, backward).source(f"{header}: backward"),
        saved, frozenset(name for name in _own(graph) if plan.given[name] in read),
        frozenset(name for name in graph.inputs if name not in inputs and _needed(later, backward, name, read)),
    )  # fmt: skip


def _cut(graph: Graph, plan: Plan) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """The steps that the output needs, with those that take one of several outputs of a kernel; and all others."""
    made = set(alive(plan.steps, set(plan.output.values())))
    inputs = of_loss(graph)
    there = {plan.given[name] for name in (*_own(graph), *graph.inputs) if name not in inputs}
    for step in plan.steps:
        several = any(v in made and v.shape == () and not v.floating for v in step.inputs)
        if several and all(v in made or v in there for v in step.inputs):
            made.add(step)
    return tuple(s for s in plan.steps if s in made), tuple(s for s in plan.steps if s not in made)


def _own(graph: Graph) -> Iterator[str]:
    yield from (*graph.parameters, *graph.buffers, *graph.constants)


def _read(plan: Plan) -> set[Value]:
    found = {value for step in plan.steps for value in step.inputs}
    return found | {v for by in plan.results.values() for v in by.values()}


def _needed(graph: Graph, plan: Plan, name: str, read: set[Value]) -> bool:
    """Whether an input is read, or is the first that says how many samples there are."""
    counted = next((n for n in graph.inputs if any(axis == (N,) for axis in graph.values[n].axes)), "")
    return plan.given[name] in read or name == counted


@dataclass(frozen=True)
class _Packed:
    """A value that is saved as a smaller one.

    before    the steps that make it
    itemsize  bytes of one of its elements
    readers   the steps that read it as they read the small one
    unpacked  the value again, made of the small one; None where its readers read that
    """

    before: tuple[Value, ...]
    itemsize: int
    readers: Mapping[Value, Value]
    unpacked: Value | None = None

    @property
    def small(self) -> Value:
        return self.before[-1]


def _worth(packed: Mapping[Value, _Packed | None]) -> dict[Value, _Packed | None]:
    """Without the values whose memory is kept all the same, by another that shares it."""
    kept = {_base(value) for value, each in packed.items() if each is None}
    return {value: None if _base(value) in kept else each for value, each in packed.items()}


def _saving(packed: _Packed | None, value: Value, mask: bool) -> Saving:
    return Saving(value, int(mask)) if packed is None else Saving(packed.small, packed.itemsize)


def _packed(value: Value, readers: list[Value], bound: int | None) -> _Packed | None:
    """How a value may be saved smaller; None: as it is."""
    if bound is not None:
        dtype, size = next((dtype, size) for most, dtype, size in INTEGERS if bound < most)
        small = _value(value, f.TO, (value, dtype), "small")
        return _Packed((small,), size, {}, _value(small, f.TO, (small, torch.int64), "index"))
    if not all(_is_gate(step, value) for step in readers):
        return None
    codes = {step.expr.code for step in readers if isinstance(step.expr, Filled)}
    if len(codes) > 1:
        return None
    first = readers[0].expr
    assert isinstance(first, Filled)
    one = Call(f.aten(aten.new_ones.default), (value, []))
    ones = Call(f.aten(aten.expand_as.default), (one, value))
    holes = tuple((h, ones if h in (COTANGENT, COTANGENTS) else value) for h, _ in first.holes)
    gate = _value(value, f.TO, (Filled(first.code, holes), torch.int8), "gate")
    return _Packed((gate,), 1, {step: _gated(step, gate) for step in readers})


def _value(of: Value, fn: f.Function, args: tuple[object, ...], hint: str) -> Value:
    expr = Call(fn, args)
    return Value(f"{of.key}:{hint}", expr, of.shape, Kernel.NATIVE, hint=f"{of.hint}_{hint}", inputs=reads(expr))


def _is_gate(step: Value, value: Value) -> bool:
    """Whether a step only asks of a value whether the cotangent passes."""
    if not isinstance(step.expr, Filled) or step.expr.code.call.aten not in GATES:
        return False
    own = [e for h, e in step.expr.holes if h not in (COTANGENT, COTANGENTS)]
    cotangents = [e for h, e in step.expr.holes if h in (COTANGENT, COTANGENTS)]
    alone = len(own) == 1 == len(cotangents) and own[0] is value and value not in reads(cotangents[0])
    return alone and step.expr.code.call.whole


def _gated(step: Value, gate: Value) -> Value:
    """The cotangent where the gate is one, and zero, also for one that is infinite, where it is zero."""
    assert isinstance(step.expr, Filled)
    (cotangent,) = [e for h, e in step.expr.holes if h in (COTANGENT, COTANGENTS)]
    factor = Call(f.aten(aten.type_as.default), (gate, cotangent))
    expr: Expr = Call(f.aten(aten.threshold_backward.default), (cotangent, factor, 0))
    return replace(step, expr=expr, inputs=reads(expr), own=True)


def _bounds(derived: Derived, plan: Plan) -> dict[Value, int]:
    """For each index that a kernel has made inside of windows, more than any element of it."""
    rules = [rule for _, rule in derived.bound]
    saved = {saved.name for rule in rules for saved in rule.saved}
    found: dict[Value, int] = {}
    for equation in (equation for rule in rules for equation in rule.equations):
        diagrams = [equation.diagram, *(jacobian.diagram for jacobian in equation.jacobians.values())]
        for selection in (s for d in diagrams if d is not None for s in _selections(d)):
            name = selection.index.name
            if selection.near and name in saved and name in plan.forward:
                found[plan.forward[name]] = prod(int(leg.size) for leg in selection.choice)
    return found


def _selections(diagram: Diagram) -> Iterator[Selection]:
    return (op for product in diagram.products for op in product.operands if isinstance(op, Selection))


def _moved(step: Value, to: Mapping[Value, Value]) -> Value:
    """The same of other values."""
    expr = replaced(step.expr, lambda value: to.get(value, value))
    if isinstance(expr, Rounds) and expr.of_columns:
        expr = replace(expr, body=_inside(expr, to))
    inputs = tuple(dict.fromkeys(to.get(value, value) for value in step.inputs))
    return replace(step, key=f"{step.key}:later", expr=expr, inputs=inputs)


def _inside(rounds: Rounds, to: Mapping[Value, Value]) -> Body:
    """The body of rounds of columns, which stands in the program as a loop and reads the values outside as they are."""
    params = zip(rounds.body.params, rounds.args, strict=True)
    found = {param: to[param] for param, (_, axis) in params if axis is None and param in to}
    outside = tuple(found.get(param, param) for param in rounds.body.params)
    for step in rounds.body.steps:
        if any(value in found for value in step.inputs):
            found[step] = _moved(step, found)
    steps = tuple(found.get(step, step) for step in rounds.body.steps)
    results = replaced(rounds.body.results, lambda value: found.get(value, value))
    return replace(rounds.body, params=outside, steps=steps, results=results)


def _base(value: Value) -> Value:
    """The value whose memory it is, as far as views tell."""
    while value.kernel is Kernel.VIEW and value.inputs:
        value = value.inputs[0]
    return value
