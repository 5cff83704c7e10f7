"""Both gradients of a convolution in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn


class Sum(nn.Module):
    """Two convolutions with one cotangent, of the same input or of two."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.same = same
        self.before = nn.ModuleList(nn.Conv2d(2, 3, 3, padding=1) for _ in range(2))
        self.after = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = (conv(x).tanh() for conv in self.before)
        other = one if self.same else other
        return sum(conv(h) for conv, h in zip(self.after, (one, other), strict=True)).flatten(1)


def test_source() -> None:
    """The first layer has no gradient by its input."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.randn(16, 2, 8, 8), torch.randint(3, (16,))
    program = tn.compile(model, F.cross_entropy, (x, y), [tn.Grad()])
    assert "(True, True, False)" in program.source and "= conv2d_weight(x, " in program.source
    assert "conv2d_input(" not in program.source
    assert "joined" in program.explain("program") and "[1]" in program.explain("program")


@pytest.mark.parametrize("same", [True, False])
def test_values(same: bool) -> None:
    """Any gradient by a weight may stand next to any by an input: each reads the cotangent and its own operand."""
    torch.manual_seed(0)
    model = Sum(same).double()
    x, y = torch.randn(6, 2, 8, 8).double(), torch.randint(3, (6,))
    program = tn.compile(model, F.cross_entropy, (x, y), [tn.Grad()])
    assert program.source.count("(True, True, False)") >= 1
    loss = F.cross_entropy(model(x), y)
    want = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    got = program(x, y)["grad"]
    for (name, _), value in zip(model.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)
