"""Products of a value with itself: in panels of rows, with less than all multiplies, and the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.lower.pairs import SYMMETRIC
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program.cost import CPU

from ...second_order import TOLERANCE, assert_equal, tensors

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize("rows, size", [(5, 1), (5, 3), (7, 8), (2, 9), (3, 16), (4, 5)])
def test_the_product(rows: int, size: int) -> None:
    """Exactly, on small integers, whether four divides the size or not."""
    x = torch.randint(-3, 4, (rows, size), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(SYMMETRIC.meaning(x), x.T @ x)


def program(symmetric: int, patch: pytest.MonkeyPatch, *quantities: tn.Quantity) -> tn.Program:
    patch.setitem(cost.RATES, "cpu", replace(CPU, symmetric=symmetric))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    return tn.compile(model.double(), LOSS, (x, torch.arange(4) % 3), list(quantities))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "quantities",
    [(tn.KFLR(),), (tn.KFAC(mc_samples=2),), (tn.KFRA(), tn.Grad()), (tn.NTK(), tn.BatchDot(), tn.DiagGGN())],
    ids=lambda quantities: quantities[0].name,
)
def test_the_same_values(quantities: tuple[tn.Quantity, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With panels wherever they can be, and without."""
    with_, without = (program(symmetric, monkeypatch, *quantities) for symmetric in (1, 0))
    assert "symmetric_product" not in without.source
    assert "symmetric_product" in with_.source or quantities[0].name == "ntk"
    for size in (4, 1):
        x, y = torch.randn(size, 3, 6, dtype=torch.float64), torch.arange(size) % 3
        one, other = (each(x, y, seed=0) for each in (with_, without))
        for quantity in quantities:
            assert_equal(tensors(one[quantity.name]), tensors(other[quantity.name]), quantity.name, TOLERANCE)


def test_fewer_multiplies_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only for large products: a small one is one call."""
    with_, without = (program(symmetric, monkeypatch, tn.KFLR()) for symmetric in (4, 0))
    assert with_.flops < without.flops
    assert "symmetric_product" not in program(CPU.symmetric, monkeypatch, tn.KFLR()).source
