"""Loops over columns: what is added up in place, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import Compiled, search
from tnbackprop.compiler.derive import columns
from tnbackprop.compiler.emit.source import written
from tnbackprop.compiler.plan.loops import over_columns
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import CPU, Kernel, Work
from tnbackprop.compiler.program.expr import Body, Call, Expr, Filled, Join, Ref, Rounds, Value, reads
from tnbackprop.compiler.program.facts import is_linear
from tnbackprop.compiler.program.hoist import hoisted, saved
from tnbackprop.compiler.program.interpret import Interpreter
from tnbackprop.compiler.program.lines import alive, lines_of
from tnbackprop.compiler.program.numbers import Number
from tnbackprop.compiler.program.passes import passed
from tnbackprop.compiler.program.store import LIKE, Store
from tnbackprop.compiler.sweep.derived import PerSample
from tnbackprop.diagram.core import COLUMN, Leg, N, Product, Size
from tnbackprop.notation.code import Code

from ... import oracle_second
from ...programs import elementwise, shown, store_of, writer
from ...second_order import assert_equal


def value(name: str, *shape: Size, kernel: Kernel = Kernel.VIEW, expr: Expr | None = None) -> Value:
    """A value that is called so; without an expression it is given."""
    return Value(name, expr, shape, kernel, hint=name, inputs=reads(expr))


COLUMN_0, ROOT = value("column_0", 2, 4), value("root_0", 3, 2, 4)
TOTALS = value("total_0_0", 2, 2), value("total_0_1", 2, 2), value("total_0_2", 2, 2)


Outputs = Sequence[tuple[Value, Value]]


def source(column: Value, root: Value, steps: Sequence[Value], outputs: Outputs) -> list[str]:
    """What is written of three rounds of a column each, the totals of which are read later."""
    read = dict.fromkeys(each for step in steps for each in step.inputs if each not in {*steps, column})
    body = Body((column, *read), tuple(steps), tuple(inside for inside, _ in outputs), None, "round", several=True)
    args = ((root, 0), *((each, None) for each in read))
    rounds = Rounds(body, args, 3, 1, (Join.SUM,) * len(outputs), begin=(None,) * len(outputs))
    made = value("rounds", kernel=Kernel.ROUNDS, expr=rounds)
    items = [replace(total, expr=Call(f.ITEM, (made, k)), inputs=(made,)) for k, (_, total) in enumerate(outputs)]
    text = writer([*steps, made, *items], like=value(LIKE.strip(":")), is_large=lambda value: False)
    return written(passed(lines_of([made, *items]), text.context(set(items))), text.printer)


def computed(lines: list[str], **scope: Any) -> dict[str, Any]:
    """All values once the loop is through."""
    scope |= {"torch": torch, "progress": iter, "like": scope["root_0"]}
    exec("\n".join(line.removeprefix("    ") for line in lines), scope)
    return scope


def test_a_matmul_that_others_read_is_kept() -> None:
    """It is added up as it is, and what reads it still finds it; a matmul that nobody else reads adds itself."""
    factors = value("b", 4, 2), value("c", 4, 2)
    products = [value(f"t{k}", 2, 2, kernel=Kernel.MM, expr=Call(f.MM, (COLUMN_0, factors[k // 2]))) for k in (0, 2)]
    twice = value("t1", 2, 2, kernel=Kernel.ELEMENTWISE, expr=Call(f.MUL, (products[0], Number(sympy.Integer(2)))))
    steps = (products[0], twice, products[1])
    lines = source(COLUMN_0, ROOT, steps, tuple(zip(steps, TOTALS, strict=True)))
    root, b, c = torch.randn(3, 2, 4), torch.randn(4, 2), torch.randn(4, 2)
    scope = computed(lines, root_0=root, b=b, c=c)
    torch.testing.assert_close(scope["total_0_0"], (root @ b).sum(0))
    torch.testing.assert_close(scope["total_0_1"], 2 * (root @ b).sum(0))
    torch.testing.assert_close(scope["total_0_2"], (root @ c).sum(0))
    assert sum("addmm_" in line for line in lines) == 1


X, A = value("x", 2, 3), value("a", 2, 3)


@pytest.mark.parametrize(
    ("code", "expr", "linear"),
    [
        ("torch.mm(a, x.t()).reshape(2, 3)", Call(f.RESHAPE, (Call(f.MM, (A, Call(f.T, (X,)))), 2, 3)), True),
        ("torch.bmm(x.mT, a).squeeze(-1)", Call(f.SQUEEZE, (Call(f.BMM, (Call(f.MT, (X,)), A)), -1)), True),
        ("x.reshape(N, 3).sum((0, 1))", Call(f.SUM, (Call(f.RESHAPE, (X, N, 3)), (0, 1))), True),
        ("a * x.unsqueeze(1)", Call(f.MUL, (A, Call(f.UNSQUEEZE, (X, 1)))), True),
        ("x * (1 / N)", Call(f.MUL, (X, Number(1 / N))), True),
        ("torch.bmm(x, a).narrow(2, 0, 3)", Call(f.NARROW, (Call(f.BMM, (X, A)), 2, 0, 3)), True),
        ("x + a", Call(f.ADD, (X, A)), False),
        ("x * x", Call(f.MUL, (X, X)), False),
        ("torch.mm(x, x.t())", Call(f.MM, (X, Call(f.T, (X,)))), False),
        ("x.square().sum(0)", Call(f.SUM, (Call(f.SQUARE, (X,)), 0)), False),
        ("torch.linalg.vector_norm(x, dim=0)", Call(f.NORM, (X,), (("dim", 0),)), False),
        ("x.relu()", Filled(Code.parsed("{x}.relu()"), (("x", X),)), False),
        ("a.index_select(0, x)", Call(f.INDEX_SELECT, (A, 0, X)), False),
        ("a.unsqueeze(0)", Call(f.UNSQUEEZE, (A, 0)), False),
    ],
)
def test_what_is_linear(code: str, expr: Expr, linear: bool) -> None:
    assert shown(expr) == code
    assert is_linear(expr, X) == linear


def test_linear_epilogues_run_once() -> None:
    """A matmul with something fixed is done to the sum of what it reads; where others read that, it stays."""
    legs = (Leg("a", 40), Leg("b", 40))
    work = Work(flops=((2, (*legs, Leg("c", 4000))),), moved=((3, legs),))
    totals = TOTALS[:2]

    def summed(*shape: int) -> tuple[Store, list[Value], list[tuple[Value, Value]]]:
        store = store_of(dict.fromkeys(("column_0", "weight_0", "b", "g"), (40, 40)), batch=4, itemsize=4)
        column, weight, b = map(store.find, ("column_0", "weight_0", "b"))
        t0 = store.add(Call(f.MUL, (column, column)), shape, Kernel.ELEMENTWISE, hint="t0")
        t1 = store.add(Call(f.MM, (t0, b)), (40, 40), Kernel.MM, work, hint="t1")
        t2 = store.add(Call(f.MM, (t0, weight)), (40, 40), Kernel.MM, work, hint="t2")
        store.in_rounds(3, [column, weight])
        assert store.varying == {column, weight, t0, t1, t2}
        return store, [t0, t1, t2], [(t1, totals[0]), (t2, totals[1])]

    store, steps, pairs = summed(40, 40)
    found, after, last = hoisted(store, steps, pairs, {totals[0]: store.find("g")})
    assert found == [(steps[2], totals[1]), (steps[0], of := found[-1][1])]
    assert of.hint == "total_0_0_of" and last == {totals[0]: after[-1]}
    text = writer(after)
    assert [(text.names(step), text.printer.text(step.expr)) for step in after] == [
        ("total_0_0_of_t1", "torch.mm(total_0_0_of, b)"),
        ("total_0_0", "g + total_0_0_of_t1"),
    ]
    store, steps, pairs = summed(40, 4_000_000)  # adding that up costs more than the matmuls
    assert hoisted(store, steps, pairs, {}) == (pairs, [], {})


def test_a_step_is_priced_as_often_as_it_runs() -> None:
    """One that no column changes once, one in the loop in every round, and its linear epilogue once after all."""
    a, b, c = Leg("a", 40), Leg("b", 40), Leg("c", 4000)
    work = Work(flops=((2, (a, b, c)),))
    store = store_of(dict.fromkeys(("column_0", "x", "y"), (40, 40)), batch=4, itemsize=4)
    column, x, y = map(store.find, ("column_0", "x", "y"))
    store.in_rounds(5, [column])
    store.add(Call(f.MUL, (x, y)), (40, 40), Kernel.ELEMENTWISE, work)
    once = store.seconds
    trial = store.fork()
    square = trial.add(Call(f.MUL, (column, column)), (40, 40), Kernel.ELEMENTWISE, work)
    assert trial.seconds == pytest.approx(5 * once)
    last = trial.add(Call(f.MM, (square, y)), (40, 40), Kernel.MM, work)
    every = trial.seconds_of(last)
    assert trial.seconds == pytest.approx(5 * once + 5 * every) and store.seconds == once
    assert saved(trial, Ref(last, (a, b), (a, b))) == pytest.approx(4 * every)
    kept = Leg(COLUMN, 40), b
    assert saved(trial, Ref(last, kept, kept)) == 0, "it keeps its columns: it is no sum over them"
    store.adopt(trial)
    assert store.seconds == pytest.approx(6 * once + 5 * every)
    store.in_rounds(1)
    assert not store.varying
    assert saved(store, Ref(last, (a, b), (a, b))) == 0


def test_what_no_column_changes_is_added_once() -> None:
    """As often as a sweep without a loop adds it, and to what earlier sweeps gave, which stays as it is."""
    store = store_of({"root_0": (3, 2, 4), "column_0": (2, 4), "a": (2, 4), "c": (2, 4)})
    root, column, start, alike = map(store.find, ("root_0", "column_0", "a", "c"))
    store.in_rounds(3, [column])
    twice = store.add(Call(f.MUL, (column, Number(sympy.Integer(2)))), (2, 4), Kernel.ELEMENTWISE)
    columns: Any = SimpleNamespace(number="0", count=3, width=1)
    earlier = {"q": {"one": start, "other": start}}
    sums = over_columns(store, {column: root}, columns, {"q": {"one": twice, "other": alike}}, set(), earlier)["q"]
    env = {each: torch.randn(each.shape) for each in (root, start, alike)}
    steps = alive(store.steps, set(sums.values()))
    after = Interpreter({}, elementwise).run(lines_of(steps), dict(env))
    torch.testing.assert_close(after[sums["one"]], env[start] + 2 * env[root].sum(0))
    torch.testing.assert_close(after[sums["other"]], env[start] + env[alike])
    assert torch.equal(after[start], env[start])


def test_fewer_columns_at_a_time_where_that_looks_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three columns two at a time are four, one of them zeros; more at a time have to look clearly faster."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 5), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(32 * 8 * 8, 4))
    x, y = torch.randn(16, 3, 16, 16), torch.randint(4, (16,))

    def compiled(*widths: int) -> Compiled:
        monkeypatch.setattr(search, "_widths", lambda rates, batch: widths)
        return tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.DiagGGN()]).compiled

    seconds = {width: compiled(width).plan.seconds for width in (1, 2)}
    assert seconds[1] < seconds[2]
    assert [compiled(*widths).derived.columns[0].width for widths in ((2,), (2, 1), (1, 2))] == [2, 1, 1]


def test_how_many_columns_are_tried() -> None:
    """What the device likes, half as many, and more: each once."""
    assert [search._widths(replace(cost.CPU, rows=400), batch) for batch in (50, 200, 400, 1600, 1601)] == [
        (8, 4, 32, 64), (2, 1, 8, 16), (1, 4, 8), (1, 2), (1,)
    ]  # fmt: skip


PER_SAMPLE = -64
"""Stands for the widest, and one sample after the other."""


@pytest.mark.parametrize(
    ("columns", "seconds", "chosen"),
    [
        (20, {8: 1.0, 4: 0.99}, 4),  # a little faster is enough for fewer; more are not tried then
        (20, {8: 1.0, 4: 1.0, 32: 0.96}, 8),  # not for more
        (20, {8: 1.0, 4: 1.1, 32: 0.93, 64: 0.94}, 32),
        (20, {8: 1.0, 4: 1.1, 32: 0.94, 64: 0.93}, 64),
        (90, {8: 1.0, PER_SAMPLE: 0.93, 4: 1.1, 32: 0.94}, PER_SAMPLE),  # samples one by one, where columns are many
        (90, {8: 1.0, PER_SAMPLE: 0.94, 4: 1.1, 32: 0.93, 64: 0.95}, 32),
        (90, {8: 1.0, PER_SAMPLE: 0.96, 4: 0.98}, 4),
        (90, {8: 1.0, PER_SAMPLE: 0.9, 4: 0.98}, PER_SAMPLE),
        (90, {8: 1e-4}, 8),  # planning takes longer
    ],
)
def test_how_many_columns_are_taken(
    columns: int, seconds: dict[int, float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest; each width is planned once, and none in vain."""
    tried: list[int] = []
    monkeypatch.setattr(search, "_fewer_may_do", lambda planned: True)

    def attempt(width: int, per_sample: PerSample | None = None, joint: bool = False) -> Any:
        if joint:
            return None  # there is no gradient to go with them
        tried.append(width if per_sample is None else -width)
        plan = SimpleNamespace(loops=(SimpleNamespace(size=columns),), seconds=seconds[tried[-1]])
        return SimpleNamespace(width=tried[-1], columns=()), plan

    assert search._fastest(8, (4, 32, 64), PerSample(64, 16), attempt)[0].width == chosen
    assert tried == list(seconds)


@pytest.mark.parametrize(
    ("classes", "large", "widths"),
    [
        (9, False, [4, 16]),  # two rounds of four; all at once then, and no more than all
        (9, True, [4, 2, 16]),  # what is large may not fit the cache
        (12, False, [4, 2, 16]),  # three rounds of four, of which one is none
    ],
)
def test_which_columns_are_tried(
    classes: int, large: bool, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    own = search._fastest

    def fastest(width: int, others: Any, least: Any, attempt: Any) -> Any:
        def noted(columns: int, *ways: Any, **more: Any) -> Any:
            made = attempt(columns, *ways, **more)
            tried.extend([columns] if made is not None else [])
            return made

        return own(width, others, least, noted)

    monkeypatch.setattr(search, "_fastest", fastest)
    monkeypatch.setattr(search, "_widths", lambda rates, batch: (4, 2, 16, 32))
    monkeypatch.setattr(search, "WORTH", 0.0)
    rates = replace(cost.CPU, fresh_threshold=0.0) if large else cost.CPU
    monkeypatch.setattr(search, "of_processor", lambda own: rates)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, classes)), torch.randn(8, 3)
    tn.compile(model, nn.CrossEntropyLoss(), (x, torch.randint(classes, (8,))), [tn.DiagGGN()], check=False)
    assert tried == widths


def test_not_one_by_one_where_that_cannot_be() -> None:
    plan = SimpleNamespace(loops=(SimpleNamespace(size=90),), seconds=1.0)

    def attempt(width: int, per_sample: PerSample | None = None, joint: bool = False) -> Any:
        return None if per_sample or joint else (None, plan)

    assert search._fastest(8, (), PerSample(64, 16), attempt)[1] is plan


@dataclass(frozen=True)
class Alike(tn.HessianDiag):
    """3, from every sweep of the Hessian: what no column changes."""

    name: str = "alike"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return tn.Diagram(J.legs, (Product(sympy.Integer(3), ()),))


@pytest.mark.parametrize("rows", [1, 10**6])
def test_as_many_columns_at_a_time_as_you_like(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Each sweep that reaches a parameter adds it once: the loss's, and those of the two activations behind it."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    monkeypatch.setattr(search, "WIDER", ())
    monkeypatch.setattr(columns, "MOST_ROWS", 0)  # else they go on together
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 2).double(), torch.randint(2, (5,))
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [Alike(), tn.HessianDiag()])
    assert bool(program.compiled.plan.loops) == (rows == 1)
    result = program(x, y)
    for name, value in result["alike"].items():
        sweeps = {"0": 3, "2": 2, "4": 1}[name[0]]
        assert torch.equal(value, torch.full_like(value, 3.0 * sweeps)), name
    wanted = oracle_second.hessian_diag(model, nn.CrossEntropyLoss(), x, y)
    assert_equal(result["hessian_diag"], wanted, "hessian_diag")


def test_a_batched_matmul_adds_to_its_total() -> None:
    """As a plain one does; behind a view, too, but not where it is part of a longer expression."""
    column, left, right = value("column_0", 2, 3, 4), value("b", 2, 4, 5), value("c", 2, 4, 1)
    t0 = value("t0", 2, 3, 5, kernel=Kernel.BMM, expr=Call(f.BMM, (column, left)))
    t1 = value("t1", 2, 15, expr=Call(f.RESHAPE, (t0, 2, 15)))
    t2 = value("t2", 2, 3, kernel=Kernel.BMM, expr=Call(f.SQUEEZE, (Call(f.BMM, (column, right)), -1)))
    outputs = ((t1, value("total_0_0", 2, 15)), (t2, value("total_0_1", 2, 3)))
    lines = source(column, value("root_0", 3, 2, 3, 4), (t0, t1, t2), outputs)
    root, b, c = torch.randn(3, 2, 3, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 1)
    scope = computed(lines, root_0=root, b=b, c=c)
    torch.testing.assert_close(scope["total_0_0"], (root @ b).sum(0).reshape(2, 15))
    torch.testing.assert_close(scope["total_0_1"], (root @ c).sum(0).squeeze(-1))
    assert sum("baddbmm_" in line for line in lines) == 1


@pytest.mark.parametrize("samples, native", [(1, 2), (2, 1)])
def test_one_drawn_column_is_pulled_by_native_code(samples: int, native: int) -> None:
    """As the gradient is; of several columns the activation's derivative is computed once for all."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    example = (torch.randn(5, 3), torch.randint(2, (5,)))
    source = tn.compile(model, nn.CrossEntropyLoss(), example, [tn.Grad(), tn.DiagGGNMC(mc_samples=samples)]).source
    assert source.count("tanh_backward.grad_input(") == native


def test_what_is_added_already_costs_nothing_more() -> None:
    """Two results go back to one value that the loop adds up: the second epilogue starts there, too."""
    a, b = Leg("a", 40), Leg("b", 40)
    shapes = {"column_0": (40, 40), "y": (40, 40), "z": (40,)}
    store = store_of(shapes, replace(CPU, launch=0.0), batch=4, itemsize=4)
    column, y, z = map(store.find, shapes)
    store.in_rounds(3, [column])
    square = Work(flops=((2, (a, b)),), moved=((3, (a, b)),))
    gram = store.add(Call(f.MM, (column, column)), (40, 40), Kernel.MM, Work(flops=((200, (a, b)),)))
    one = store.add(Call(f.MM, (gram, y)), (40, 40), Kernel.MM, Work(flops=((20000, (a, b)),)))
    other = store.add(Call(f.MV, (gram, z)), (40,), Kernel.MM, square)
    first, second = value("total_0_0", 40, 40), value("total_0_1", 40)
    pairs, after, last = hoisted(store, store.steps, [(one, first), (other, second)], {})
    assert pairs == [(gram, of := pairs[0][1])] and of.hint == "total_0_0_of"
    assert [last[first], last[second]] == after
    assert [step.expr for step in after] == [Call(f.MM, (of, y)), Call(f.MV, (of, z))]
    pairs, _, _ = hoisted(store, store.steps, [(other, second)], {})
    assert pairs == [(other, second)], "alone it is added up as the small result that it is"
