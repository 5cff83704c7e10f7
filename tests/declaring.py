"""What the tests of declarations share: a layer, a model around it, and its quantities against the oracles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tnbackprop as tn

from . import oracle, oracle_second
from .second_order import assert_equal, products

X, Y = (torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
FORMULA = "output[n, i] = gain[i] * input[n, i]**3"


class Power(nn.Module):
    """gain · x^p; written so that no einsum would say it at once."""

    def __init__(self, power: int = 3) -> None:
        super().__init__()
        self.gain, self.power = nn.Parameter(torch.tensor([0.5, -1.0, 2.0])), power

    def forward(self, input: Tensor) -> Tensor:
        return self.gain * input**self.power


def network(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), layer, nn.Linear(3, 3)).double()


QUANTITIES = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.Variance())


def check(model: nn.Module, loss: nn.Module | None = None, rules: Any = None) -> tn.Program:
    """Compile; the first-order quantities, the diagonal and the root of the GGN are those of the oracles."""
    loss = loss or nn.MSELoss()
    program = tn.compile(model, loss, (X, Y), (*QUANTITIES, tn.DiagGGN(), tn.SqrtGGN()), rules=rules)
    result = program(X, Y)
    for quantity in QUANTITIES:
        assert_equal(result[quantity.name], getattr(oracle, quantity.name)(model, loss, X, Y), quantity.name)
    assert_equal(result["diag_ggn"], oracle_second.diag_ggn(model, loss, X, Y), "diag_ggn")
    assert_equal(products(result["sqrt_ggn"]), oracle_second.ggn_blocks(model, loss, X, Y), "sqrt_ggn")
    return program


def targets(program: tn.Program) -> list[Any]:
    return [call.target for call in program.compiled.graph.calls]
