"""Squared deviations from a mean that no result has: two batches do not tell them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tnbackprop as tn


@dataclass(frozen=True)
class Deviations(tn.Quantity):
    """Σ_n (g_n - ḡ)² with the parameter's axes turned round, or summed over them."""

    name: str = "deviations"
    summed: bool = False

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = (J.T @ g) / g.scale
        D = (G - G.sum("n") / tn.N).part()
        squares = (D * D).sum("n")
        return squares.sum_parameter() if self.summed else squares.ordered(*(leg.name for leg in reversed(J.legs)))


@pytest.mark.parametrize("summed", [False, True])
def test_deviations_of_other_axes_than_the_mean(summed: bool) -> None:
    """They have no mean among the results with which they could join."""
    model, x, y = nn.Linear(3, 3, bias=False).double(), torch.randn(6, 3).double(), torch.randn(6, 3).double()
    result = tn.compute(model, nn.MSELoss(), (x, y), [tn.Grad(), Deviations(summed=summed)])
    with pytest.raises(tn.InputError, match="'deviations' of 'weight' cannot be merged"):
        result.merge(result)
