"""Ops without a rule: VJPs by torch.func, right, and named in the report; an op that mixes samples is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from . import oracle
from .models import Apply
from .test_first_order import QUANTITIES, assert_equal


class Unknown(nn.Module):
    """i0 of a value, hypot of a value and a parameter, the inverse of a parameter: none has a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.matrix, self.leg = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.special.i0(self.first(x))
        return self.last(torch.hypot(hidden, self.leg) @ torch.linalg.inv(self.matrix))


def test_values_and_report() -> None:
    torch.manual_seed(0)
    model, loss = Unknown().double(), nn.MSELoss()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    program = tn.compile(model, loss, (x, y), QUANTITIES)
    for batch in (5, 1):
        result = program(x[:batch], y[:batch])
        for quantity in QUANTITIES:
            want = getattr(oracle, quantity.name)(model, loss, x[:batch], y[:batch])
            assert_equal(result[quantity.name], want, quantity.name)
    report = program.explain()
    for op in ("aten.special_i0.default", "aten.hypot.default", "aten.linalg_inv.default"):
        assert op in report
    assert report.count("torch.func") >= 3


@torch.library.custom_op("tnbackprop_tests::halved", mutates_args=())
def halved(value: Tensor) -> Tensor:
    return value / 2


@halved.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return halved(self.first(x))


def test_an_op_without_a_derivative() -> None:
    """Told when it is compiled, not when it runs."""
    with pytest.raises(tn.UnsupportedError, match=r"(?s)halved.default in .* no derivative of it.*Declare one"):
        tn.compile(Halved(), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])


class Mixing(nn.Module):
    """Every sample sees the ranks of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.renorm(self.first(x), 2, 1, 0.1)


def test_an_op_that_mixes_samples() -> None:
    with pytest.raises(tn.UnsupportedError, match=r"renorm.*mixes samples"):
        tn.compile(Mixing(), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])


def total(output: Tensor, y: Tensor) -> Tensor:
    return torch.nansum(output - y)


@pytest.mark.parametrize("loss", [nn.MultiMarginLoss(), total])
def test_a_reduction_over_samples_is_refused(loss: Callable[..., Tensor]) -> None:
    """One VJP per sample says nothing of a sum over them; left out, it would be a gradient of zero."""
    x, f = torch.randn(4, 3), torch.randn(4, 2).sign()
    y = torch.randint(2, (4,)) if isinstance(loss, nn.MultiMarginLoss) else f
    with pytest.raises(tn.UnsupportedError, match=r"reduces over the samples of .*\n.*Declare one"):
        tn.compile(nn.Linear(3, 2), loss, (x, y), [tn.Grad()])


def test_the_same_op_twice() -> None:
    """Two calls that compute the same are one step; the second one's derivative finds it."""
    torch.manual_seed(0)
    twice = Apply(lambda t: t.tanh() * t.sin() + t.tanh().exp())
    model, loss = nn.Sequential(nn.Linear(3, 2), twice).double(), nn.MSELoss()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    found = tn.compute(model, loss, (x, y), [tn.BatchGrad()])["batch_grad"]
    assert_equal(found, oracle.batch_grad(model, loss, x, y), "batch_grad")
