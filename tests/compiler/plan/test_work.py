"""What a forward is said to cost: twice its multiplications, each once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.program.cost import number

N, IN, OUT, S = 4, 2, 3, 5  # samples, channels in and out, positions along an axis of the input

LAYERS = {
    "linear": (lambda: nn.Linear(IN, OUT), (IN,), 2 * N * IN * OUT + N * OUT),
    "convolution": (
        lambda: nn.Conv2d(IN, OUT, 2), (IN, S, S), 2 * N * OUT * IN * 4 * (S - 1) ** 2 + N * OUT * (S - 1) ** 2,
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(IN, OUT, 2, stride=2), (IN, S, S),
        2 * N * OUT * IN * 4 * S**2 + N * OUT * (2 * S) ** 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_flops_of_a_forward(name: str) -> None:
    build, shape, want = LAYERS[name]
    model, x = nn.Sequential(build(), nn.Flatten()), torch.randn(N, *shape)
    program = tn.compile(model, lambda f, y: f.sum() + 0 * y.sum(), (x, torch.zeros(N)), [tn.Grad()], check=False)
    step = program.compiled.plan.steps[0]
    assert number(step.work.flops, N) == want, step
