"""Kernels that are faster for some sizes: chosen for those, with the same values."""

from __future__ import annotations

import pytest
import torch

from tnbackprop.compiler.lower.contract import build
from tnbackprop.compiler.program.cost import CPU, CUDA, Rates
from tnbackprop.diagram.core import BATCH, Diagram, Leg, N, Tensor

from ...diagram.random_diagrams import product
from ...programs import codes, run, shapes_of, store_of
from .test_lowerings import Slide, convolution, tensors


@pytest.mark.parametrize(
    ("rates", "slide", "outer", "inner", "last"),
    [
        (CPU, Slide(6, 6, 3, padding=1), 128, 96, True),
        (CPU, Slide(14, 12, 3), 96, 64, False),  # 600 FLOPs for each element that is copied, not 1000
        (CPU, Slide(14, 10, 5), 16, 6, False),
        (CPU, Slide(6, 6, 1), 512, 512, False),
        (CUDA, Slide(6, 6, 3, padding=1), 128, 96, False),
    ],
)
def test_channels_last_where_they_are_many(rates: Rates, slide: Slide, outer: int, inner: int, last: bool) -> None:
    """As measured: the copies to that layout and back are paid by the faster kernel, or they are not."""
    given = convolution("input", (slide, slide), 1, outer, inner)
    store = store_of(shapes_of(*given.products[0].operands), rates, 256, 4)
    build(store, given)
    assert any("channels_last" in code for code in codes(store)) == last


@pytest.mark.parametrize(
    ("columns", "rounds", "varying", "filled"),
    [(27, 3, "x", 5), (1, 3, "x", 0), (28, 3, "x", 0), (27, 1, "x", 0), (27, 3, "xy", 0)],
    ids=["odd", "one", "even", "no loop", "another matrix in each round"],
)
def test_odd_columns_that_stay_are_filled_up(columns: int, rounds: int, varying: str, filled: int) -> None:
    """The zeros are put there once, before the loop; 5 more make two times 16."""
    rows, inner, k = Leg("r", 40), Leg("i", 9), Leg("k", columns)
    given = Diagram((BATCH, rows, k), (product(Tensor("x", (BATCH, rows, inner)), Tensor("y", (BATCH, inner, k))),))
    values = tensors(given, 3)
    store = store_of({"x": (N, 40, 9), "y": (N, 9, columns)})
    store.in_rounds(rounds, map(store.find, varying))
    ref = build(store, given)
    found = run(store, ref, values, 3)
    assert torch.equal(found, values["x"] @ values["y"])
    pads = {step: code for step, code in zip(store.steps, codes(store), strict=True) if "pad(" in code}
    assert [step in store.varying for step in pads] == [False] * bool(filled)
    assert all(f"(0, {filled})" in code for code in pads.values())


def test_a_vector_is_not_filled_up() -> None:
    """It is read as one column, and may be what is done once behind the loop."""
    rows, inner = Leg("r", 8), Leg("i", 9)
    given = Diagram((BATCH, rows), (product(Tensor("x", (BATCH, rows, inner)), Tensor("y", (BATCH, inner))),))
    store = store_of({"x": (N, 8, 9), "y": (N, 9)})
    store.in_rounds(3, [store.find("x")])
    build(store, given)
    (code,) = codes(store)
    assert "torch.bmm(" in code and "narrow" not in code
