"""Every invariant is broken once, on what a real compilation made, and names the stage, the item and the fault."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import Compiled
from tnbackprop.compiler.invariants.stage import Stage
from tnbackprop.compiler.invariants.table import INVARIANTS, Context, asked, check
from tnbackprop.compiler.invariants.wellformed import flaws
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import Work
from tnbackprop.compiler.program.expr import Body, Call, Expr, Filled, Value, reads
from tnbackprop.compiler.program.lines import Block, Line
from tnbackprop.compiler.sweep.derived import Backward, Extraction, Native
from tnbackprop.diagram.core import BATCH, Delta, Diagram, Leg, Map, N, Part, Product, Tensor, Window, argument
from tnbackprop.errors import InvariantError
from tnbackprop.notation.bind import Equation
from tnbackprop.notation.code import Code

QUANTITIES = (tn.BatchL2(), tn.Variance())


@lru_cache(maxsize=1)
def made() -> tuple[Compiled, Context]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    compiled = tn.compile(model, nn.MSELoss(), (torch.randn(4, 1, 5, 5), torch.randn(4, 2)), QUANTITIES).compiled
    context = asked(model, QUANTITIES)
    return compiled, replace(context, graph=compiled.graph)


def products(stage: Stage) -> Any:
    compiled, _ = made()
    whole = {
        Stage.CAPTURE: compiled.graph,
        Stage.BIND: compiled.derived.bound,
        Stage.DERIVE: compiled.derived,
        Stage.PLAN: compiled.plan,
        Stage.PROGRAM: compiled.writer.program,
        Stage.EMIT: compiled.source,
    }
    return whole[stage]


def changed(items: tuple[Any, ...], position: int, **fields: Any) -> tuple[Any, ...]:
    """The tuple with other fields in one item."""
    new = replace(items[position], **fields)
    return (*items[:position], new, *items[position:][1:])


def with_output(graph: Any, position: int, **fields: Any) -> Any:
    """The graph with another output value of one call, in the call and in the table."""
    value = replace(graph.calls[position].output, **fields)
    calls = changed(graph.calls, position, output=value)
    return replace(graph, calls=calls, values={**graph.values, value.name: value})


def without_calls(graph: Any, **fields: Any) -> Any:
    """Only what is read, with other fields."""
    return replace(graph, calls=(), output=None, loss=None, **fields)


def without_parameter(graph: Any, dotted: str) -> Any:
    return without_calls(graph, parameters={k: v for k, v in graph.parameters.items() if v[0] != dotted})


def all_frozen(graph: Any) -> Any:
    return without_calls(graph, values={k: replace(v, depends_on=frozenset()) for k, v in graph.values.items()})


def with_rule(bound: Any, position: int, **fields: Any) -> Any:
    call, rule = bound[position]
    return (*bound[:position], (call, replace(rule, **fields)), *bound[position:][1:])


def with_formula(bound: Any, change: Callable[[Diagram], Diagram]) -> Any:
    """The first call with another formula."""
    old = bound[0][1].equations[-1]
    return with_rule(bound, 0, equations=(Equation(old.name, old.legs, change(old.diagram), old.jacobians),))


def let_go_early(program: Any) -> Any:
    """The first line lets go of what it gives."""
    first, *others = program.lines
    return replace(program, lines=(replace(first, frees=(first.value,)), *others))


def first(derived: Any, kind: type) -> int:
    return next(k for k, item in enumerate(derived.schedule) if isinstance(item, kind))


def with_quantity(derived: Any, change: Callable[[Diagram], Diagram]) -> Any:
    k = first(derived, Extraction)
    diagrams = {name: change(diagram) for name, diagram in derived.schedule[k].diagrams.items()}
    return replace(derived, schedule=changed(derived.schedule, k, diagrams=diagrams))


def cotangents_last(derived: Any) -> Any:
    return replace(derived, schedule=tuple(sorted(derived.schedule, key=lambda item: isinstance(item, Backward))))


def natives_first(derived: Any) -> Any:
    """Cotangents that native code computes, before those that it reads."""
    native = [item for item in derived.schedule if isinstance(item, Backward) and isinstance(item.terms[0], Native)]
    return replace(derived, schedule=(*native, *(item for item in derived.schedule if item not in native)))


def with_step(plan: Any, expr: Expr | None = None, **fields: Any) -> Any:
    """The plan with a step more: a copy of its last value, or another expression."""
    expr = Call(f.CLONE, (plan.steps[-1],)) if expr is None else expr
    step = Value("more", expr, fields.pop("shape", plan.steps[-1].shape), inputs=reads(expr), **fields)
    return replace(plan, steps=(*plan.steps, step))


GHOST = Value("ghost", None, ())


def with_line(function: f.Function | None) -> Callable[[Any], Any]:
    """A line more, that calls a function on the first value; or code that calls one."""

    def change(program: Any) -> Any:
        at = program.lines[0].value
        expr = Filled(Code.parsed("{x}.item()"), (("x", at),)) if function is None else Call(function, (at,))
        line = Line(Value("more", expr, ()), expr, False, (at,))
        return replace(program, lines=(replace(program.lines[0], frees=()), line, *program.lines[1:]))

    return change


def with_ghost(program: Any) -> Any:
    return replace(program, given=program.given | {GHOST})


def with_function(program: Any) -> Any:
    """A function that returns what it does not have."""
    return replace(program, functions={Body((), (), (GHOST,), None, "slice"): ()})


def with_loop(program: Any) -> Any:
    """A loop whose line reads what is not there."""
    line = Line(Value("inner", Call(f.ABS, (GHOST,)), ()), Call(f.ABS, (GHOST,)), False, (GHOST,))
    block = Block((), (), 1, (line,), (), {}, 1)
    loop = Line(Value("loop", Call(f.ABS, (1,)), ()), Call(f.ABS, (1,)), False, (), block=block)
    return replace(program, lines=(*program.lines, loop))


@dataclass(frozen=True)
class Break:
    """What is done to the product of a stage, and the words of the message."""

    name: str
    stage: Stage
    change: Callable[[Any], Any]
    invariant: str
    says: str

    def __str__(self) -> str:
        return self.name


CAPTURE, BIND, DERIVE, PLAN, PROGRAM, EMIT = Stage
N2 = ((N,), (N,))

BREAKS = (
    Break("reversed", CAPTURE, lambda g: replace(g, calls=g.calls[::-1]), "before use", "not defined yet"),
    Break("twice", CAPTURE, lambda g: replace(g, calls=(*g.calls, g.calls[-1])), "defined once", "defined twice"),
    Break("no output", CAPTURE, lambda g: replace(g, output="gone"), "before use", "nothing defines it"),
    Break(
        "other value",
        CAPTURE,
        lambda g: replace(g, values={**g.values, "layer_1": replace(g.values["layer_1"], axes=())}),
        "agree",
        "the graph has layer_1",
    ),
    Break("two batches", CAPTURE, lambda g: with_output(g, -1, axes=N2), "at most once", "more than once"),
    Break(
        "batch times two", CAPTURE, lambda g: with_output(g, -1, axes=((2 * N,),)), "at most once", "mixes the batch"
    ),
    Break("no parameter", CAPTURE, lambda g: without_parameter(g, "3.bias"), "trainable", "graph does not have it"),
    Break("frozen", CAPTURE, all_frozen, "every trainable", "counts as frozen"),
    Break(
        "depends", CAPTURE, lambda g: with_output(g, -1, depends_on=frozenset({"ghost"})), "operands depend on", "ghost"
    ),
    Break("loss", CAPTURE, lambda g: replace(g, loss=g.calls[0].output.name), "is a scalar", "the loss is layer_0"),
    Break("unbound", BIND, lambda b: b[1:], "has its rule", "differentiable but not bound"),
    Break("last line", BIND, lambda b: with_rule(b, 0, equations=b[1][1].equations), "has its rule", "does not define"),
    Break(
        "formula legs",
        BIND,
        lambda b: with_formula(b, lambda d: d.sum("o")),
        "legs and size",
        "not those of its formula",
    ),
    Break(
        "formula size",
        BIND,
        lambda b: with_rule(b, 0, equations=(Equation("layer_0", (BATCH,), None, {}),)),
        "legs and size",
        "gives N·1 elements",
    ),
    Break(
        "no extraction",
        DERIVE,
        lambda d: replace(d, schedule=d.schedule[:-1]),
        "every quantity once",
        "it has [], asked for were",
    ),
    Break(
        "no quantity",
        DERIVE,
        lambda d: replace(d, schedule=changed(d.schedule, first(d, Extraction), diagrams={})),
        "every quantity once",
        "asked for were",
    ),
    Break("too early", DERIVE, cotangents_last, "read what is there", "not known here"),
    Break(
        "cotangent twice",
        DERIVE,
        lambda d: replace(d, schedule=(d.schedule[0], *d.schedule)),
        "read what is there",
        "computed twice",
    ),
    Break("native too early", DERIVE, natives_first, "read what is there", "is not there yet"),
    Break(
        "cotangent size",
        DERIVE,
        lambda d: replace(d, schedule=changed(d.schedule, 0, terms=(d.schedule[0].terms[0].sum("n"),))),
        "size of its value",
        "a term has",
    ),
    Break(
        "batch last",
        DERIVE,
        lambda d: with_quantity(d, lambda q: Diagram((Leg("z", 2), BATCH), ())),
        "batch legs first",
        "do not come first",
    ),
    Break(
        "n is no batch",
        DERIVE,
        lambda d: with_quantity(d, lambda q: Diagram((Leg("n", 2),), ())),
        "batch legs first",
        "leg n is not the batch",
    ),
    Break("steps reversed", PLAN, lambda p: replace(p, steps=p.steps[::-1]), "in order", "not computed yet"),
    Break("step twice", PLAN, lambda p: replace(p, steps=(*p.steps, p.steps[-1])), "in order", "computed twice"),
    Break("no result", PLAN, lambda p: replace(p, results={}), "every result", "value [] is not computed"),
    Break("no loss", PLAN, lambda p: replace(p, loss=Value("gone", None, ())), "every result", "but not computed"),
    Break("strange shape", PLAN, lambda p: with_step(p, shape=(sympy.Symbol("q"),)), "shapes are known", "size q"),
    Break(
        "einsum",
        PLAN,
        lambda p: with_step(p, Call(f.function("torch.einsum"), ("ni,ni->", p.steps[-1], p.steps[-1]))),
        "run-time planning",
        "left to einsum",
    ),
    Break("negative work", PLAN, lambda p: with_step(p, work=Work(flops=((-1, ()),))), "polynomial", "its work"),
    Break("let go early", PROGRAM, let_go_early, "living values", "which is not there"),
    Break("not kept", PROGRAM, lambda p: replace(p, lines=p.lines[:-1]), "living values", "not there at the end"),
    Break("syntax", EMIT, lambda s: s + "    )", "compiles", "unmatched"),
    Break("item", PROGRAM, with_line(f.method("item")), "waits for the device", ".item waits"),
    Break("a code's item", PROGRAM, with_line(None), "waits for the device", ".item waits"),
    Break("unknown", PROGRAM, lambda p: replace(p, given=frozenset()), "living values", "which is not there"),
    Break("tensor", PROGRAM, with_ghost, "tensors are those", "the model has no such tensor"),
    Break("function", PROGRAM, with_function, "living values", "slice returns it, but it is not there"),
    Break("loop", PROGRAM, with_loop, "living values", "it reads ghost"),
)


@pytest.mark.parametrize("case", BREAKS, ids=str)
def test_broken(case: Break) -> None:
    """The message names the stage, the invariant and the fault."""
    broken = case.change(products(case.stage))
    with pytest.raises(InvariantError) as error:
        check(case.stage, broken, made()[1])
    message = str(error.value)
    assert message.startswith(f"after {case.stage}, ")
    assert case.invariant in message.splitlines()[0]
    assert case.says in message


def test_every_invariant_is_broken_once() -> None:
    names = {name for rows in INVARIANTS.values() for name, _ in rows}
    broken = {name for name in names for case in BREAKS if case.invariant in name}
    assert names - broken <= {"formulas and Jacobians are well-formed"}, names - broken


@pytest.mark.parametrize("stage", Stage, ids=str)
def test_what_the_compiler_makes_holds(stage: Stage) -> None:
    assert check(stage, products(stage), made()[1]) is products(stage)


ONE = sympy.Integer(1)
ROW, COLUMN = Leg("i", 2), Leg("j", 3)
X = Tensor("x", (ROW, COLUMN))


def one(legs: tuple[Leg, ...], *operands: Any, scale: sympy.Expr = ONE) -> Diagram:
    return Diagram(legs, (Product(scale, operands),))


FLAWED = (
    ("twice", one((ROW, ROW), X), "an output leg is there twice"),
    ("sizes", one((Leg("i", 5),), X), "leg i has sizes 5 and 2"),
    ("unknown", one((ROW,), Tensor("ghost", (ROW,))), "ghost[i] is not known here"),
    ("elements", one((ROW,), Tensor("x", (ROW,))), "x[i] reads 2 elements of 6"),
    ("delta", one((ROW,), X, Delta((ROW, COLUMN))), "does not join two legs of one size"),
    ("window", one((ROW,), X, Window(ROW, ((0.5, COLUMN),))), "a coefficient that is no int"),
    ("batch window", one((ROW,), X, Window(ROW, ((1, BATCH),))), "slides over the batch"),
    ("map", one((ROW, COLUMN), Map(argument(0) * argument(1), (X,))), "no argument for x1"),
    ("scale", one((ROW, COLUMN), X, scale=sympy.Symbol("M")), "another symbol than N"),
    ("part", one((COLUMN,), Part(one((ROW, COLUMN), X), (COLUMN, COLUMN))), "other sizes than its diagram"),
    ("inside", one((ROW,), Part(one((ROW,), Tensor("ghost", (ROW,))), (ROW,))), "not known here"),
)


@pytest.mark.parametrize(("diagram", "says"), [row[1:] for row in FLAWED], ids=[row[0] for row in FLAWED])
def test_flawed_diagram(diagram: Diagram, says: str) -> None:
    assert any(says in flaw for flaw in flaws(diagram, {"x": (6, 0)}))


def test_flaw_in_a_formula_is_found() -> None:
    """The checks of diagrams are asked for formulas and for results."""
    bound = products(Stage.BIND)
    broken = with_formula(bound, lambda d: Diagram(d.legs, (Product(sympy.Symbol("M"), d.products[0].operands),)))
    with pytest.raises(InvariantError, match="formulas and Jacobians are well-formed"):
        check(Stage.BIND, broken, made()[1])


def test_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks together take a small part of a compilation."""
    spent = 0.0

    def timed(stage: Stage, data: Any, context: Context) -> Any:
        nonlocal spent
        start = time.perf_counter()
        result = check(stage, data, context)
        spent += time.perf_counter() - start
        return result

    monkeypatch.setattr("tnbackprop.compiler.check", timed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    shares = []
    for _ in range(3):  # the best of three: a pause of the collector falls anywhere
        spent, start = 0.0, time.perf_counter()
        tn.compile(model, nn.MSELoss(), (torch.randn(3, 6), torch.randn(3, 3)), QUANTITIES)
        shares.append(spent / (time.perf_counter() - start))
    assert 0 < min(shares) < 0.05
