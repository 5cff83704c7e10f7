"""Sums of products row by row: exact, chosen where rows are long and launches cheap, never with the products kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.contract import build
from tnbackprop.compiler.cost import CPU, CUDA, Rates
from tnbackprop.compiler.lower import LOWERINGS
from tnbackprop.compiler.pairs import SUM_OF_PRODUCTS
from tnbackprop.compiler.store import Store
from tnbackprop.diagram import BATCH, Diagram, Leg, Map, Product, Tensor, argument
from tnbackprop.reference import evaluate

from .test_lowerings import run, tensors

EAGER = replace(CPU, launch=0.0)
X = Tensor("x", (BATCH, Leg("p", 5), Leg("q", 4)))
SQUARES = Map(argument(0) ** 2, (X,))


def diagram(*operands: Map | Tensor) -> Diagram:
    return Diagram(X.legs[1:], (Product(sympy.Integer(1), operands),))


def planned(given: Diagram, rates: Rates, batch: int = 3, function: str = "") -> tuple[str, torch.Tensor]:
    """The steps, and their value at one sample more than they were planned for."""
    values = tensors(given, batch + 1)
    store = Store(rates, batch, 8)
    store.shapes |= dict.fromkeys(values, (BATCH.size, 5, 4)) | {"like": ()}
    ref = build(store, given, LOWERINGS)
    store.functions = {name: function or source for name, source in store.functions.items()}
    return "\n".join(step.code for step in store.steps), run(store, ref, values, batch + 1)


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
    broken = SUM_OF_PRODUCTS.replace(old, new).replace("strict=True", "strict=False")
    assert not torch.equal(planned(given, EAGER, function=broken)[1], planned(given, EAGER)[1])


@pytest.mark.parametrize("rates, width, chosen", [(CPU, 64, True), (CPU, 4, False), (CUDA, 64, False)])
def test_chosen_for_long_rows(rates: Rates, width: int, chosen: bool) -> None:
    """On a GPU a launch for each sample costs more than the squares."""
    rows = Tensor("x", (BATCH, Leg("p", width), Leg("q", 1000)))
    store = Store(rates, 32, 4)
    store.shapes |= {"x": tuple(leg.size for leg in rows.legs), "like": ()}
    build(store, Diagram(rows.legs[1:], (Product(sympy.Integer(1), (Map(argument(0) ** 2, (rows,)),)),)), LOWERINGS)
    assert any("sum_of_products(" in step.code for step in store.steps) == chosen


def test_in_a_program_with_another_batch_size() -> None:
    """Second moments of a convolution whose individual gradients are results, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Flatten(), nn.Linear(576, 3))
    batch = lambda size: (torch.randn(size, 32, 5, 5), torch.randint(3, (size,)))  # noqa: E731
    program = tn.compile(model, nn.CrossEntropyLoss(), batch(8), [tn.BatchGrad(), tn.SecondMoment()])
    assert "= sum_of_products(" in program.source
    for size in (1, 5):
        result = program(*batch(size))
        want = size * result["batch_grad"]["0.weight"].double().square().sum(0)
        torch.testing.assert_close(result["second_moment"]["0.weight"].double(), want, rtol=1e-5, atol=1e-9)


def test_the_function_is_captured_whole() -> None:
    """torch.compile follows its loop without a graph break."""
    space: dict[str, object] = {"torch": torch}
    exec(SUM_OF_PRODUCTS, space)
    x, y = torch.randint(-3, 4, (2, 4, 9)).double()
    whole = torch.compile(space["sum_of_products"], fullgraph=True, backend="eager")
    assert torch.equal(whole(x, y), (x * y).sum(0))
