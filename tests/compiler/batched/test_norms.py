"""The square of the 2-norm of the whole batch is a sum over samples; no other power and no other norm of it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ...capturing import Function
from ...oracle import grad
from ...rehearsing import batch, check, compiled, layers, refused

Loss = Callable[[Tensor, Tensor], Tensor]


def model() -> Function:
    return Function(lambda m, x: m.b(m.a(x).tanh()), **layers())


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: torch.norm(f - y) ** 2,
        lambda f, y: torch.linalg.norm(f - y).square(),
        lambda f, y: torch.norm(f - y, dim=(0, 1)) ** 2,
    ],
    ids=["power", "square", "both axes"],
)
def test_a_sum(loss: Loss) -> None:
    """No mean, so gradients of single samples are as they are, not over N."""
    own, (x, y) = model(), batch()
    result = compiled(own, loss=loss)(x, y)
    each = [grad(own, loss, x[n : n + 1], y[n : n + 1]) for n in range(len(x))]
    for name, value in grad(own, loss, x, y).items():
        torch.testing.assert_close(result["grad"][name], value)
        torch.testing.assert_close(result["batch_l2"][name], torch.stack([g[name].square().sum() for g in each]))


def test_of_each_sample() -> None:
    check(model(), loss=lambda f, y: (torch.norm(f - y, dim=1) ** 2).mean())


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: torch.norm(f - y) ** 3,
        lambda f, y: torch.norm(f - y, p=1) ** 2,
        lambda f, y: torch.norm(f - y, p=1).square(),
        lambda f, y: torch.norm(f - y),
    ],
    ids=["cube", "1-norm", "its square", "no power"],
)
def test_no_sum(loss: Loss) -> None:
    refused(model(), "the loss is not a sum over samples: .*linalg_vector_norm", loss=loss)
