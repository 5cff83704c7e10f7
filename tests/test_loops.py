"""Loops over columns: what is added up in place, and what is not."""

from __future__ import annotations

import pytest
import torch

from tnbackprop.compiler.cost import CPU, Kernel, Work
from tnbackprop.compiler.loops import Loop, loop_lines
from tnbackprop.compiler.store import NO_WORK, Step, Store
from tnbackprop.compiler.tails import behind, is_linear
from tnbackprop.diagram import Leg


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
    store = Store(CPU, 4, 4, shapes=dict.fromkeys(("t0", "t1", "t2", "b", "g"), (40, 40)))
    inside = {"column_0", "weight_0", "t0", "t1", "t2"}
    summed = [("t1", "total_0_0"), ("t2", "total_0_1")]
    pairs, after = behind(store, steps, inside, summed, {"total_0_0": "g"}, 3)
    assert pairs == [("t2", "total_0_1"), ("t0", "total_0_0_of")]
    assert [(step.name, step.code) for step in after] == [
        ("total_0_0_of_t1", "torch.mm(total_0_0_of, b)"),
        ("total_0_0", "g + total_0_0_of_t1"),
    ]
    store.shapes["t0"] = (40, 4_000_000)  # adding that up costs more than the matmuls
    assert behind(store, steps, inside, summed, {}, 3) == (summed, [])
