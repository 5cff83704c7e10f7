"""What is copied or summed for one reader is there for the others."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn


class Attention(nn.Module):
    """Queries, keys and values from one projection: its cotangent is put together in another order of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 5, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 5, 6)


def test_a_leg_of_several_strided_axes_is_copied_once() -> None:
    """By the individual gradients, the bias and what goes further down."""
    model = nn.Sequential(nn.Linear(6, 6), Attention(), nn.Flatten(), nn.Linear(30, 3))
    x, y = torch.randn(4, 5, 6), torch.randint(3, (4,))
    source = tn.compile(model, F.cross_entropy, (x, y), [tn.Grad(), tn.BatchL2()]).source
    (name,) = re.findall(r"(\w+) = \w+\.permute\(1, 3, 0, 2, 4\)", source)
    assert len(re.findall(rf"\b{name}\.reshape\(", source)) == 1


def test_the_gradient_of_a_bias_is_the_sum_of_the_individual_ones() -> None:
    """A sum over positions is something to build, too."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(64, 50, 6), torch.randn(64, 50, 4)
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad(), tn.BatchL2()])
    lines = program.explain("plan").splitlines()
    shown = lines[next(k for k, line in enumerate(lines) if line.startswith("2.bias")) :][:4]
    assert "built: G" in " ".join(shown)
