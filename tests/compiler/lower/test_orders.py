"""Orders of contraction: for all rounds of a loop, with few columns turned into rows, and as the next step reads."""

from __future__ import annotations

from itertools import permutations

import pytest
import sympy

from tnbackprop.compiler.lower.contract import _paths, build
from tnbackprop.compiler.lower.pairs import contract_pair
from tnbackprop.compiler.program.cost import CPU, CUDA, Rates
from tnbackprop.compiler.program.store import Store
from tnbackprop.diagram.core import BATCH, COLUMN, Diagram, Leg, Product, Tensor

from ...programs import codes, seen, shapes_of, store_of

n, v = BATCH, Leg(COLUMN, 8)
q, r, k = Leg("q", 36), Leg("r", 36), Leg("k", 576)
ONE = sympy.Integer(1)


def store_with(*tensors: Tensor, rates: Rates = CPU) -> Store:
    return store_of(shapes_of(*tensors), rates, 4, 4)


def built(store: Store, legs: tuple[Leg, ...], *tensors: Tensor) -> list[str]:
    """The steps of a product."""
    start = len(store.steps)
    build(store, Diagram(legs, (Product(ONE, tensors),)))
    return codes(store)[start:]


@pytest.mark.parametrize("rounds", [1, 16])
def test_paths_are_for_all_rounds(rounds: int) -> None:
    """Σ g[ν,q] h[ν,r] T[q,k] U[r,k]: with few columns T or U comes first, with many g h, whose sum is taken once."""
    tensors = Tensor("g", (v, n, q)), Tensor("h", (v, n, r)), Tensor("T", (n, q, k)), Tensor("U", (n, r, k))
    store = store_with(*tensors)
    store.in_rounds(rounds, [store.find("g"), store.find("h")])
    refs = [seen(t, store) for t in tensors]
    found = {frozenset(path[0]) for path in _paths(store, refs, (n, k))}
    assert (frozenset({0, 1}) in found) == (rounds > 1)


@pytest.mark.parametrize("rates, turned", [(CPU, True), (CUDA, False)], ids=str)
def test_few_columns_become_rows(rates: Rates, turned: bool) -> None:
    """[576, 36] @ [36, 9] takes three times as long as its transpose on a CPU."""
    few = Leg("f", 9)
    a, b = Tensor("a", (k, q)), Tensor("b", (q, few))
    store = store_with(a, b, rates=rates)
    contract_pair(store, seen(a, store), seen(b, store), (k, few), ordered=False)
    assert codes(store) == ["torch.mm(b.t(), a.t())" if turned else "torch.mm(a, b)"]


def test_a_product_that_is_there_is_summed() -> None:
    """Σ a b over q reads a·b where that has been computed; else it is a matmul."""
    a, b = Tensor("a", (v, n, q)), Tensor("b", (n, q))
    store = store_with(a, b)
    assert "bmm" in built(store, (v, n), a, b)[-1]
    store = store_with(a, b)
    (product,) = built(store, (v, n, q), a, b)
    assert product == "a * b.unsqueeze(0)"
    assert built(store, (v, n), a, b) == ["t0.sum(2)"]


@pytest.mark.parametrize("operands", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("stored", [(n, q, r), (n, r, q)], ids=str)
def test_a_value_is_made_in_the_order_of_what_it_meets_next(stored: tuple[Leg, ...], operands: tuple[int, ...]) -> None:
    """Σ_r G[q,r] T[r,k] comes as [q,k], as T is, and is multiplied with T without a transpose."""
    tensors = Tensor("G", stored), Tensor("T", (n, q, k)), Tensor("T", (n, r, k))
    steps = built(store_with(*tensors), (k,), *(tensors[i] for i in operands))
    assert len(steps) == 2 and steps[0].startswith("torch.bmm(") and "transpose" not in steps[1], steps
