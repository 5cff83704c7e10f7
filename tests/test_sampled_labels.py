"""Columns that are drawn for losses of two classes are residuals of labels: p - y with y drawn from the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

DRAWS = 2000
LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "with logits": (nn.BCEWithLogitsLoss(), lambda f: (torch.rand_like(f) < 0.5).to(f)),
    "of probabilities": (nn.BCELoss(), lambda f: (torch.rand_like(f) < 0.5).to(f)),
    "soft margin": (nn.SoftMarginLoss(), lambda f: (torch.rand_like(f) < 0.5).to(f) * 2 - 1),
}


class Outputs(nn.Module):
    """Its parameter is its output, sample by sample."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.free = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] * self.free[None]


@pytest.mark.parametrize("name", LOSSES)
def test_the_columns_are_residuals(name: str) -> None:
    """One of two values for each output, over the root of the Hessian; y = 1 as often as the model says."""
    loss, draw = LOSSES[name]
    p = torch.tensor([0.02, 0.3, 0.5, 0.97], dtype=torch.float64)
    model = Outputs(p if name == "of probabilities" else torch.logit(p))
    x = torch.ones(1, dtype=torch.float64)
    y = draw(model(x).detach())
    root = tn.compute(model, loss, (x, y), [tn.SqrtGGNMC(mc_samples=DRAWS)], seed=0)["sqrt_ggn_mc"]["free"][:, 0]
    hessian = torch.func.jacrev(torch.func.jacrev(lambda f: loss(f, y)))(model(x).detach()).reshape(4, 4).diagonal()
    columns = root * DRAWS**0.5 / hessian.sqrt()
    ones, zeros = -((1 - p) / p).sqrt(), (p / (1 - p)).sqrt()
    labels = (columns - ones).abs() < 1e-9
    assert ((columns - zeros).abs() < 1e-9).logical_xor(labels).all()
    frequency = labels.double().mean(0)
    assert ((frequency - p).abs() < 4 * (p * (1 - p) / DRAWS).sqrt()).all(), frequency


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated(dtype: torch.dtype) -> None:
    """Certain labels, p = 0 or 1: no spread, and finite."""
    model, x = Outputs(torch.tensor([-200.0, 200.0, 0.0], dtype=dtype)), torch.ones(2, dtype=dtype)
    y = torch.ones(2, 3, dtype=dtype)
    root = tn.compute(model, F.binary_cross_entropy_with_logits, (x, y), [tn.SqrtGGNMC(mc_samples=50)], seed=1)
    columns = root["sqrt_ggn_mc"]["free"]
    assert columns.isfinite().all() and columns[..., :2].abs().max() < 1e-12 < columns[..., 2].abs().min()
