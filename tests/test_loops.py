"""Loops over columns: what is added up in place, and what is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop import compiler
from tnbackprop.compiler import columns, cost
from tnbackprop.compiler.cost import CPU, Kernel, Work
from tnbackprop.compiler.derived import Apart
from tnbackprop.compiler.loops import Loop, loop_lines
from tnbackprop.compiler.store import NO_WORK, Ref, Step, Store
from tnbackprop.compiler.tails import behind, is_linear, saved
from tnbackprop.diagram import COLUMN, Leg, Product

from . import oracle_second
from .second_order import assert_equal


def test_a_matmul_that_others_read_is_kept() -> None:
    """It is added up as it is, and what reads it still finds it; a matmul that nobody else reads adds itself."""
    steps = (
        Step("t0", "torch.mm(column_0, b)", ("column_0", "b"), Kernel.MM, NO_WORK),
        Step("t1", "t0 * 2", ("t0",), Kernel.ELEMENTWISE, NO_WORK),
        Step("t2", "torch.mm(column_0, c)", ("column_0", "c"), Kernel.MM, NO_WORK),
    )
    outputs = (("t0", "total_0_0"), ("t1", "total_0_1"), ("t2", "total_0_2"))
    loop = Loop({"column_0": "root_0"}, 3, 1, steps, outputs, frozenset(), {})
    lines = loop_lines(loop, dict.fromkeys(("t0", "t1", "t2"), (2, 2)), {total for _, total in outputs})
    root, b, c = torch.randn(3, 2, 4), torch.randn(4, 2), torch.randn(4, 2)
    scope = {"torch": torch, "progress": iter, "like": root, "root_0": root, "b": b, "c": c}
    exec("\n".join(line.removeprefix("    ") for line in lines), scope)
    torch.testing.assert_close(scope["total_0_0"], (root @ b).sum(0))
    torch.testing.assert_close(scope["total_0_1"], 2 * (root @ b).sum(0))
    torch.testing.assert_close(scope["total_0_2"], (root @ c).sum(0))
    assert sum("addmm_" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("code", "linear"),
    [
        ("torch.mm(a, x.t()).reshape(2, 3)", True),
        ("torch.bmm(x.mT, a).squeeze(-1)", True),
        ("x.reshape(N, 3).sum((0, 1))", True),
        ("a * x.unsqueeze(1)", True),
        ("x * (1/N)", True),
        ("torch.bmm(x, a).narrow(2, 0, 3)", True),
        ("x + a", False),
        ("x * x", False),
        ("torch.mm(x, x.t())", False),
        ("x.square().sum(0)", False),
        ("torch.linalg.vector_norm(x, dim=0)", False),
        ("x.relu()", False),
        ("a.index_select(0, x)", False),
        ("a.unsqueeze(0)", False),
    ],
)
def test_what_is_linear(code: str, linear: bool) -> None:
    assert is_linear(code, "x") == linear


def test_linear_tails_run_once() -> None:
    """A matmul with something fixed is done to the sum of what it reads; where others read that, it stays."""
    legs = (Leg("a", 40), Leg("b", 40))
    work = Work(flops=((2, (*legs, Leg("c", 4000))),), moved=((3, legs),))
    steps = [
        Step("t0", "column_0 * column_0", ("column_0",), Kernel.ELEMENTWISE, NO_WORK),
        Step("t1", "torch.mm(t0, b)", ("t0", "b"), Kernel.MM, work),
        Step("t2", "torch.mm(t0, weight_0)", ("t0", "weight_0"), Kernel.MM, work),
    ]
    store = Store(CPU, 4, 4, steps, dict.fromkeys(("t0", "t1", "t2", "b", "g"), (40, 40)))
    store.in_rounds(3, ["column_0", "weight_0"])
    assert store.varying == {"column_0", "weight_0", "t0", "t1", "t2"}
    summed = [("t1", "total_0_0"), ("t2", "total_0_1")]
    pairs, after = behind(store, steps, summed, {"total_0_0": "g"})
    assert pairs == [("t2", "total_0_1"), ("t0", "total_0_0_of")]
    assert [(step.name, step.code) for step in after] == [
        ("total_0_0_of_t1", "torch.mm(total_0_0_of, b)"),
        ("total_0_0", "g + total_0_0_of_t1"),
    ]
    store.shapes["t0"] = (40, 4_000_000)  # adding that up costs more than the matmuls
    assert behind(store, steps, summed, {}) == (summed, [])


def test_a_step_is_priced_as_often_as_it_runs() -> None:
    """One that no column changes once, one in the loop in every round, and a tail of it once after all."""
    a, b, c = Leg("a", 40), Leg("b", 40), Leg("c", 4000)
    work = Work(flops=((2, (a, b, c)),))
    store = Store(CPU, 4, 4, shapes=dict.fromkeys(("column_0", "x", "y"), (40, 40)))
    store.in_rounds(5, ["column_0"])
    store.add("x * y", (40, 40), Kernel.ELEMENTWISE, work)
    once = store.seconds()
    start = len(store.steps)
    name = store.add("column_0 * column_0", (40, 40), Kernel.ELEMENTWISE, work)
    assert store.seconds(start) == pytest.approx(5 * once)
    tail = store.add(f"torch.mm({name}, y)", (40, 40), Kernel.MM, work)
    every = store.seconds_of(store.steps[-1])
    assert store.seconds() == pytest.approx(6 * once + 5 * every)
    assert saved(store, start, Ref(tail, (a, b), (a, b))) == pytest.approx(4 * every)
    kept = Leg(COLUMN, 40), b
    assert saved(store, start, Ref(tail, kept, kept)) == 0, "it keeps its columns: it is no sum over them"
    store.in_rounds(1)
    assert not store.varying
    assert saved(store, start, Ref(tail, (a, b), (a, b))) == 0


def test_what_no_column_changes_is_added_once() -> None:
    """As often as a sweep without a loop adds it, and to what earlier sweeps gave, which stays as it is."""
    steps = (Step("t0", "column_0 * 2", ("column_0",), Kernel.ELEMENTWISE, NO_WORK),)
    outputs = (("t0", "total_0_0"), ("c", "total_0_1"))
    loop = Loop({"column_0": "root_0"}, 3, 1, steps, outputs, frozenset(), {"total_0_0": "a", "total_0_1": "a"})
    lines = loop_lines(loop, dict.fromkeys(("t0", "c"), (2, 4)), {total for _, total in outputs})
    root, a, c = torch.randn(3, 2, 4), torch.randn(2, 4), torch.randn(2, 4)
    scope = {"torch": torch, "progress": iter, "like": root, "root_0": root, "a": a.clone(), "c": c}
    exec("\n".join(line.removeprefix("    ") for line in lines), scope)
    torch.testing.assert_close(scope["total_0_0"], a + 2 * root.sum(0))
    torch.testing.assert_close(scope["total_0_1"], a + c)
    torch.testing.assert_close(scope["a"], a)


def test_fewer_columns_at_a_time_where_that_looks_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three columns two at a time are four, one of them zeros; more at a time have to look clearly faster."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 5), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(32 * 8 * 8, 4))
    x, y = torch.randn(16, 3, 16, 16), torch.randint(4, (16,))

    def compiled(*widths: int) -> compiler.Compiled:
        monkeypatch.setattr(compiler, "_widths", lambda rates, batch: widths)
        return tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.DiagGGN()]).compiled

    seconds = {width: compiled(width).plan.seconds for width in (1, 2)}
    assert seconds[1] < seconds[2]
    assert [compiled(*widths).derived.columns[0].width for widths in ((2,), (2, 1), (1, 2))] == [2, 1, 1]


def test_how_many_columns_are_tried() -> None:
    """What the device likes, half as many, and more: each once."""
    assert [compiler._widths(replace(cost.CPU, rows=400), batch) for batch in (50, 200, 400, 1600, 1601)] == [
        (8, 4, 32, 64), (2, 1, 8, 16), (1, 4, 8), (1, 2), (1,)
    ]  # fmt: skip


APART = -64
"""Stands for the widest, and one sample after the other."""


@pytest.mark.parametrize(
    ("columns", "seconds", "chosen"),
    [
        (20, {8: 1.0, 4: 0.99}, 4),  # a little faster is enough for fewer; more are not tried then
        (20, {8: 1.0, 4: 1.0, 32: 0.96}, 8),  # not for more
        (20, {8: 1.0, 4: 1.1, 32: 0.93, 64: 0.94}, 32),
        (20, {8: 1.0, 4: 1.1, 32: 0.94, 64: 0.93}, 64),
        (90, {8: 1.0, APART: 0.93, 4: 1.1, 32: 0.94}, APART),  # samples one by one, where columns are many
        (90, {8: 1.0, APART: 0.94, 4: 1.1, 32: 0.93, 64: 0.95}, 32),
        (90, {8: 1.0, APART: 0.96, 4: 0.98}, 4),
        (90, {8: 1.0, APART: 0.9, 4: 0.98}, APART),
        (90, {8: 1e-4}, 8),  # planning takes longer
    ],
)
def test_how_many_columns_are_taken(columns: int, seconds: dict[int, float], chosen: int) -> None:
    """The fastest; each width is planned once, and none in vain."""
    tried = []

    def attempt(width: int, apart: Apart | None = None, beside: bool = False) -> Any:
        if beside:
            return None  # there is no gradient to ride along
        tried.append(width if apart is None else -width)
        plan = SimpleNamespace(loops=(SimpleNamespace(columns=columns),), seconds=seconds[tried[-1]])
        return SimpleNamespace(width=tried[-1], columns=()), plan

    assert compiler._fastest(8, (4, 32, 64), Apart(64, 16), attempt)[0].width == chosen
    assert tried == list(seconds)


def test_not_one_by_one_where_that_cannot_be() -> None:
    plan = SimpleNamespace(loops=(SimpleNamespace(columns=90),), seconds=1.0)

    def attempt(width: int, apart: Apart | None = None, beside: bool = False) -> Any:
        return None if apart or beside else (None, plan)

    assert compiler._fastest(8, (), Apart(64, 16), attempt)[1] is plan


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
    monkeypatch.setattr(compiler, "WIDER", ())
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
    steps = (
        Step("t0", "torch.bmm(column_0, b)", ("column_0", "b"), Kernel.BMM, NO_WORK),
        Step("t1", "t0.reshape(2, 15)", ("t0",), Kernel.VIEW, NO_WORK),
        Step("t2", "torch.bmm(column_0, c).squeeze(-1)", ("column_0", "c"), Kernel.BMM, NO_WORK),
    )
    outputs = (("t1", "total_0_0"), ("t2", "total_0_1"))
    loop = Loop({"column_0": "root_0"}, 3, 1, steps, outputs, frozenset(), {})
    lines = loop_lines(loop, {"t0": (2, 3, 5), "t1": (2, 15), "t2": (2, 3)}, {total for _, total in outputs})
    root, b, c = torch.randn(3, 2, 3, 4), torch.randn(2, 4, 5), torch.randn(2, 4, 1)
    scope = {"torch": torch, "progress": iter, "like": root, "root_0": root, "b": b, "c": c}
    exec("\n".join(line.removeprefix("    ") for line in lines), scope)
    torch.testing.assert_close(scope["total_0_0"], (root @ b).sum(0).reshape(2, 15))
    torch.testing.assert_close(scope["total_0_1"], (root @ c).sum(0).squeeze(-1))
    assert sum("baddbmm_" in line for line in lines) == 1


@pytest.mark.parametrize("samples, native", [(1, 2), (2, 1)])
def test_one_drawn_column_is_pulled_by_native_code(samples: int, native: int) -> None:
    """As the gradient is; of several columns the activation's derivative is computed once for all."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    example = (torch.randn(5, 3), torch.randint(2, (5,)))
    source = tn.compile(model, nn.CrossEntropyLoss(), example, [tn.Grad(), tn.DiagGGNMC(mc_samples=samples)]).source
    assert source.count("threshold_backward.grad_input(") == native


def test_what_is_added_already_costs_nothing_more() -> None:
    """Two results go back to one value that the loop adds up: the second tail starts there, too."""
    a, b = Leg("a", 40), Leg("b", 40)
    store = Store(replace(cost.CPU, launch=0.0), 4, 4, shapes={"column_0": (40, 40), "y": (40, 40), "z": (40,)})
    store.in_rounds(3, ["column_0"])
    square = Work(flops=((2, (a, b)),), moved=((3, (a, b)),))
    gram = store.add("torch.mm(column_0, column_0)", (40, 40), Kernel.MM, Work(flops=((200, (a, b)),)))
    one = store.add(f"torch.mm({gram}, y)", (40, 40), Kernel.MM, Work(flops=((20000, (a, b)),)))
    other = store.add(f"torch.mv({gram}, z)", (40,), Kernel.MM, square)
    pairs, after = behind(store, store.steps, [(one, "total_0_0"), (other, "total_0_1")], {})
    assert pairs == [(gram, "total_0_0_of")]
    assert [step.name for step in after] == ["total_0_0", "total_0_1"]
    pairs, _ = behind(store, store.steps, [(other, "total_0_1")], {})
    assert pairs == [(other, "total_0_1")], "alone it is added up as the small result that it is"
