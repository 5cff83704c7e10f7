"""Operands that broadcast, and what is masked: individual gradients against autograd of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn


class Own(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.function = nn.Linear(3, 4), function
        self.b, self.one = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(1, 4))
        self.register_buffer("powers", torch.tensor([0.0, 1, 2, 3]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "powers": lambda m, x: m.l(x).relu() ** m.powers,
    "powers of each": lambda m, x: (m.l(x).relu()[..., None] ** m.powers).sum(-1),
    "whole powers": lambda m, x: m.l(x) ** torch.tensor([0, 1, 2, 3]),
    "learned powers": lambda m, x: (m.l(x).relu() + 0.1) ** m.one,
    "a mask with more axes": lambda m, x: m.b.masked_fill((x > 0)[:, None, :, None], 0).sum((1, 2)),
    "a mask of samples": lambda m, x: m.b[None].masked_fill((x > 0)[:, None, :, None], -1.0).tanh().sum((1, 2)),
    "a mask over one row": lambda m, x: m.one.masked_fill(x[:, :1] > 0, 0.5) * m.l(x),
    "a wider mask": lambda m, x: m.l(x)[:, :1].masked_fill(m.powers > 1, 2.0),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_gradients(forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Also where a linear layer gives zeros alone."""
    model, loss = Own(forward), nn.MSELoss(reduction="sum")
    x = torch.randn(4, 3).double()
    y = torch.randn_like(model(x).detach())
    program = tn.compile(model, loss, (x, y), [tn.BatchGrad()])
    for zero in (False, True):
        if zero:
            nn.init.zeros_(model.l.bias)
            x = torch.zeros_like(x)
        found = program(x, y)["batch_grad"]
        for n in range(len(x)):
            value, own = loss(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters())
            want = torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close([each[n] for each in found.values()], list(want))
