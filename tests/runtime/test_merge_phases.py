"""What is made of totals between two phases joins where each sample has its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

Weights = Callable[[Tensor], Tensor]


def program_and_batch(weights: Weights) -> tuple[tn.Program, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    return tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.ClippedGrad(mode=weights)]), x, y


@pytest.mark.parametrize(
    "weights",
    [
        lambda n: torch.minimum(1 / n, torch.ones_like(n)),
        lambda n: torch.minimum(1 / n, n.new_ones(())),
        lambda n: torch.where(n > 1, 1 / n, 1.0),
        lambda n: torch.where(n > 1, 2.0, 1.0).to(n.dtype),
        lambda n: (n < 1).to(n.dtype),
        lambda n: (1 / n.float()).clamp(max=1).to(n.dtype),
        lambda n: (1 / n).masked_fill(n < 1, 1.0),
        lambda n: torch.full_like(n, 0.5),
        lambda n: F.logsigmoid(-n).exp(),
        lambda n: (1 / n.detach()).clamp(max=1),
    ],
)
def test_weights_of_each_sample(weights: Weights) -> None:
    program, x, y = program_and_batch(weights)
    whole = program(x, y)["clipped_grad"]
    for sizes in ((4, 5), (1, 8), (3, 3, 3)):
        found = tn.over(program, zip(x.split(sizes), y.split(sizes), strict=True))["clipped_grad"]
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "weights",
    [
        lambda n: n / n.amax(),
        lambda n: n - n.mean(),
        lambda n: n.flip(0),
        lambda n: n.cumsum(0),
        lambda n: n.roll(1),
        lambda n: F.softmax(n, 0),
        lambda n: n.sort().values,
    ],
)
def test_weights_of_the_batch(weights: Weights) -> None:
    program, x, y = program_and_batch(weights)
    with pytest.raises(tn.InputError, match="cannot be merged: what is made of its totals depends on the whole batch"):
        tn.over(program, zip(x.split(3), y.split(3), strict=True))
