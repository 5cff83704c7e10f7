"""Sums of products row by row: exact, chosen where rows are long and launches cheap, never with the products kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.lower import by_rows
from tnbackprop.compiler.lower.by_rows import PRODUCTS, SHIFTED_SQUARES, SUM_OF_PRODUCTS, SUM_OF_SHIFTED_SQUARES
from tnbackprop.compiler.lower.contract import build
from tnbackprop.compiler.lower.table import LOWERINGS
from tnbackprop.compiler.program.cost import CPU, CUDA, Rates
from tnbackprop.compiler.program.functions import Function
from tnbackprop.diagram.core import BATCH, Diagram, Leg, Map, Product, Tensor, argument
from tnbackprop.diagram.reference import evaluate

from ...programs import broken, called, codes, run, shapes_of, store_of
from .test_lowerings import tensors

EAGER = replace(CPU, launch=0.0)
X = Tensor("x", (BATCH, Leg("p", 5), Leg("q", 4)))
SQUARES = Map(argument(0) ** 2, (X,))


def diagram(*operands: Map | Tensor) -> Diagram:
    return Diagram(X.legs[1:], (Product(sympy.Integer(1), operands),))


def planned(given: Diagram, rates: Rates, batch: int = 3) -> tuple[str, torch.Tensor]:
    """The steps, and their value at one sample more than they were planned for."""
    values = tensors(given, batch + 1)
    store = store_of(dict.fromkeys(values, (BATCH.size, 5, 4)), rates, batch)
    ref = build(store, given)
    return "\n".join(codes(store)), run(store, ref, values, batch + 1)


@pytest.mark.parametrize("given", [diagram(SQUARES), diagram(X, Tensor("y", X.legs))], ids=["squares", "products"])
def test_exact(given: Diagram) -> None:
    code, found = planned(given, EAGER)
    assert "sum_of_products(" in code
    values = {name: value.numpy() for name, value in tensors(given, 4).items()}
    assert torch.equal(found, torch.as_tensor(evaluate(given, values, 4)))


BREAKS = (("x[1:]", "x[2:]"), ("x[0] * y[0]", "x[0] * x[0]"), ("(one, other)", "(one, one)"))


@pytest.mark.parametrize("old, new", BREAKS)
def test_a_break_is_caught(old: str, new: str) -> None:
    assert SUM_OF_PRODUCTS.count(old) == 1
    given = diagram(X, Tensor("y", X.legs))
    want = planned(given, EAGER)[1]
    patch = broken(by_rows, "PRODUCTS", SUM_OF_PRODUCTS.replace(old, new).replace("strict=True", "strict=False"))
    found = planned(given, EAGER)[1]
    patch.undo()
    assert not torch.equal(found, want)


@pytest.mark.parametrize("rates, width, chosen", [(CPU, 64, True), (CPU, 4, False), (CUDA, 64, False)])
def test_chosen_for_long_rows(rates: Rates, width: int, chosen: bool) -> None:
    """On a GPU a launch for each sample costs more than the squares."""
    rows = Tensor("x", (BATCH, Leg("p", width), Leg("q", 1000)))
    store = store_of(shapes_of(rows), rates, 32, 4)
    build(store, Diagram(rows.legs[1:], (Product(sympy.Integer(1), (Map(argument(0) ** 2, (rows,)),)),)), LOWERINGS)
    assert bool(called(store.steps, PRODUCTS)) == chosen


BATCH_SIZES = (1, 5)


def convolutional(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tn.Program]:
    """Rows of 18 432 elements, and individual gradients that are results."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(576, 3)).to(dtype)
    quantities = [tn.BatchGrad(), tn.SecondMoment(), tn.Variance(centred=True)]
    return model, tn.compile(model, nn.CrossEntropyLoss(), batch(8, dtype), quantities)


def batch(size: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(size, 32, 5, 5, dtype=dtype), torch.randint(3, (size,))


def test_in_a_program_with_another_batch_size() -> None:
    _, program = convolutional()
    assert "= sum_of_products(" in program.source and "= sum_of_shifted_squares(" in program.source
    for size in BATCH_SIZES:
        result = program(*batch(size))
        each = size * result["batch_grad"]["0.weight"]
        torch.testing.assert_close(result["second_moment"]["0.weight"], each.square().mean(0))
        torch.testing.assert_close(result["variance"]["0.weight"], each.var(0, unbiased=False), atol=1e-18, rtol=1e-10)


def test_a_variance_of_gradients_that_hardly_differ() -> None:
    """The mean is subtracted before anything is squared, row by row as well: in float32 a difference would be noise."""
    model, program = convolutional(torch.float32)
    x, y = batch(1, torch.float32)
    near = x.expand(8, -1, -1, -1) + 1e-3 * torch.randn(8, *x.shape[1:])
    got = program(near, y.expand(8))["variance"]["0.weight"]
    want = tn.compute(model.double(), nn.CrossEntropyLoss(), (near.double(), y.expand(8)), [tn.Variance()])
    exact = want["variance"]["0.weight"]
    assert (got - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("old, new", [("x[1:]", "x[2:]"), ("row = row + y", "row = row"), ("x[0] + y", "x[0]")])
def test_a_break_of_the_shift_is_caught(old: str, new: str) -> None:
    assert SUM_OF_SHIFTED_SQUARES.count(old) == 1
    space: dict[str, Any] = {"torch": torch}
    exec(SUM_OF_SHIFTED_SQUARES, space)
    x, y = torch.randint(-3, 4, (4, 2, 3)).double(), torch.tensor([[1.0], [2.0]]).double()
    assert torch.equal(space["sum_of_shifted_squares"](x, y), (x + y).square().sum(0))
    exec(SUM_OF_SHIFTED_SQUARES.replace(old, new), space)
    assert not torch.equal(space["sum_of_shifted_squares"](x, y), (x + y).square().sum(0))


@pytest.mark.parametrize("function", [PRODUCTS, SHIFTED_SQUARES], ids=str)
def test_a_function_is_captured_whole(function: Function) -> None:
    """torch.compile follows its loop without a graph break."""
    space: dict[str, Any] = {"torch": torch}
    exec(function.source, space)
    x = torch.randint(-3, 4, (4, 9)).double()
    other = x if function is PRODUCTS else x[0]
    whole = torch.compile(space[function.name], fullgraph=True, backend="eager")
    assert torch.equal(whole(x, other), space[function.name](x, other))
