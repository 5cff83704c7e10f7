"""Kronecker factors of a quantity from outside, which says no more of them than it must."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tnbackprop as tn


@dataclass(frozen=True)
class Block(tn.Quantity):
    """(1/N) Σₙ (1/N)² ∇ℓₙ ∇ℓₙᵀ, or its diagonal, as one factor."""

    name: str = "block"
    diagonal: bool = False

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Factors:
        G = J.T @ g
        if self.diagonal:
            return tn.Factors(((G * G).sum("n"),), (), (J.legs,), J.legs, "its diagonal", diagonal=(True,))
        other = G.relabel(**{leg.name: f"{leg.name}_copy" for leg in J.legs})
        return tn.Factors(((G * other).sum("n"),), (), (J.legs,), J.legs, "none: the block itself")


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_is_not_said(diagonal: bool) -> None:
    """It compiles, with a bound on the memory as well, and every stage is told."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    for limit in (None, "1GiB"):
        quantities = [Block(diagonal=diagonal), tn.BatchGrad()]
        program = tn.compile(model, nn.MSELoss(), (x, y), quantities, memory_limit=limit)
        result = program(x, y)
        G = result["batch_grad"]["weight"].flatten(1)
        found = result["block"]["weight"].to_dense()
        torch.testing.assert_close(found, (G.T @ G).diagonal().diag() if diagonal else G.T @ G)
        assert f"{'diagonal' if diagonal else 'full'} [o,i] 6×6" in program.explain()
