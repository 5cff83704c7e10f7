"""Integers and truth values where a formula has numbers: they are read as floating ones, whose products do not wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ..tried import Function, randn

BYTES = torch.randint(100, 256, (5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PARTS = {"w": randn(4), "l": lambda: nn.Linear(4, 4)}
QUANTITIES = (
    tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.DiagGGN(), tn.KFLR(), tn.HessianDiag(),
    tn.HesScale(),
)  # fmt: skip


def scaled(x: Tensor) -> Tensor:
    return x.double() / 255 - 0.5


def quantised(x: Tensor) -> Tensor:
    """A weight in 8 bits; in double precision where everything is."""
    return (torch.arange(-8, 8).view(4, 4) * 15).to(x.dtype if x.is_floating_point() else torch.int8)


READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "image_times": lambda m, x: x * m.w,
    "times_image": lambda m, x: m.w * x,
    "divided": lambda m, x: x / (m.w + 3),
    "divides": lambda m, x: m.w / x,
    "power": lambda m, x: (m.w.abs() + 0.5) ** (x % 3),
    "addcmul": lambda m, x: torch.addcmul(m.w, x, m.w),
    "maximum": lambda m, x: torch.maximum(x, m.w * 200),
    "clamp": lambda m, x: torch.clamp(m.w * 200, min=x),
    "where": lambda m, x: torch.where(m.w > 0, x, m.w * x),
    "cat": lambda m, x: torch.cat([x, m.w.expand(len(x), 4)], 1).square()[:, 2:6],
    "mask_token": lambda m, x: (m.l(scaled(x)) + (x > 150) * m.w).tanh(),
    "token_mask": lambda m, x: (m.l(scaled(x)) + m.w * (x > 150)).tanh(),
    "summed": lambda m, x: (x * m.w).sum(1, keepdim=True) + x * m.w[0],
    "int8_weight": lambda m, x: F.linear(scaled(x), quantised(x) * m.w[:, None]),
}


def results(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    result = tn.compile(model, loss, (x, y), QUANTITIES)(x, y)
    return {q: {n: v if isinstance(v, Tensor) else v.to_dense() for n, v in by.items()} for q, by in result.items()}


def assert_as_doubles(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> None:
    """What comes of integers is what comes of the same numbers in double precision."""
    got, want = results(model, loss, x, y), results(model, loss, x.double(), y.double())
    for quantity, by in want.items():
        for name, value in by.items():
            torch.testing.assert_close(got[quantity][name], value, rtol=1e-6, atol=1e-9, msg=f"{quantity} of {name}")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", READ)
def test_integers_in_a_model(name: str) -> None:
    model = Function(READ[name], PARTS).double()
    with torch.no_grad():
        y = randn(*model(BYTES).shape)
    assert_as_doubles(model, nn.MSELoss(), BYTES, y)


LOSSES = {"mse": nn.MSELoss(), "l1": nn.SmoothL1Loss(), "huber": nn.HuberLoss(delta=50.0)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", LOSSES)
def test_integers_as_targets(name: str, dtype: torch.dtype) -> None:
    model, x = nn.Linear(3, 4).double(), randn(5, 3)
    y = (BYTES > 150) if dtype is torch.bool else BYTES.to(dtype)
    assert_as_doubles(model, LOSSES[name], x, y)


def test_a_dark_example_and_a_bright_batch() -> None:
    """Where the check when it is compiled could not see it."""
    model = Function(lambda m, x: x * m.w, {"w": randn(4)}).double()
    dark, y = BYTES % 16, randn(5, 4)
    program = tn.compile(model, nn.MSELoss(), (dark, y), [tn.HessianDiag(), tn.HesScale()])
    want = 2 / 20 * BYTES.double().square().sum(0)
    for by in program(BYTES, y).values():
        torch.testing.assert_close(by["w"], want)
