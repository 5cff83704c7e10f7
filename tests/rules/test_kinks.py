"""Kinks: at each of them the program has the derivative that the installed torch has."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.errors import UnsupportedError
from tnbackprop.rules.writing import kinks
from tnbackprop.rules.writing.kinks import KINKS, Kink, slope

from ..models import Apply
from ..tried import Tried, randn

INF = float("inf")
ENDS = torch.tensor([-1.0, 0.0, 0.5]).double(), torch.tensor([1.0, 0.0, 0.5]).double()
CROSSED = torch.tensor([1.0, 1.0, 2.0]).double(), torch.tensor([-1.0, 0.0, 0.5]).double()
ONE = torch.ones(1).double()
TABLE: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...]]] = {
    # a function of [N, 3], and what its three columns are given
    "relu": (F.relu, (0,)),
    "relu6": (F.relu6, (0, 6)),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), (0,)),
    "prelu": (lambda x: F.prelu(x, 0.25 * ONE), (0,)),
    "elu": (lambda x: F.elu(x, 2.0), (0,)),
    "celu": (lambda x: F.celu(x, 2.0), (0,)),
    "selu": (F.selu, (0,)),
    "threshold": (lambda x: F.threshold(x, 0.5, 2.0), (0.5,)),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 2.0), (-0.5, 2)),
    "hardsigmoid": (F.hardsigmoid, (-3, 3)),
    "hardswish": (F.hardswish, (-3, 3)),
    "hardshrink": (F.hardshrink, (-0.5, 0.5)),
    "softshrink": (F.softshrink, (-0.5, 0.5)),
    "softplus": (F.softplus, (20,)),
    "abs": (torch.abs, (0,)),
    "frac": (torch.frac, (1, -2)),
    "clamp": (lambda x: x.clamp(-1, 2), (-1, 2)),
    "clamp_min": (lambda x: x.clamp(min=0.5), (0.5,)),
    "clamp_max": (lambda x: x.clamp(max=0.5), (0.5,)),
    "clamp_one_point": (lambda x: x.clamp(1, 1), (1, 0, 2)),
    "clamp_crossed": (lambda x: x.clamp(2, 1), (1, 2, 1.5)),
    "clamp_infinite": (lambda x: x.clamp(-INF, INF), (0, 1)),
    "clamp_half_infinite": (lambda x: x.clamp(-INF, 1), (0, 1, 2)),
    "clamp_to_tensors": (lambda x: x.clamp(*ENDS), (-1, 0, 0.5, 1)),
    "clamp_to_crossed_tensors": (lambda x: x.clamp(*CROSSED), (-1, 0, 0.5, 1, 2)),
    "clamp_to_a_least_tensor": (lambda x: x.clamp(min=ENDS[0]), (-1, 0, 0.5)),
    "clamp_to_a_largest_tensor": (lambda x: x.clamp(max=ENDS[1]), (1, 0, 0.5)),
    "ends_of_a_clamp": (lambda x: ENDS[1].clamp(x - 1, x), (0, 1, 0.5, 2, 1.5)),
    "crossed_ends_of_a_clamp": (lambda x: ENDS[1].clamp(x, x - 1), (0, 1, 0.5, 2, 1.5)),
    "maximum": (lambda x: torch.maximum(x, ONE), (1,)),
    "minimum": (lambda x: torch.minimum(x.sin(), x), (0,)),
    "fmax": (lambda x: torch.fmax(x, ONE), (1,)),
    "max": (lambda x: x.max(1, keepdim=True)[0] * x, (1, 1, 0)),
    "max_pool": (lambda x: F.max_pool1d(x.unsqueeze(1), 2, 1).flatten(1), (1, 1, 0)),
    "norm": (lambda x: x.norm(dim=1, keepdim=True) + x, (0,)),
    "norm_1": (lambda x: x.norm(1, 1, keepdim=True) + x, (0, 1)),
    "where": (lambda x: torch.where(x > 0, x, 2 * x), (0,)),
    "remainder": (lambda x: torch.remainder(x, 1), (1, 2)),
}
LOSSES: dict[str, tuple[nn.Module, float]] = {
    "l1": (nn.L1Loss(), 0),
    "smooth_l1": (nn.SmoothL1Loss(), 1),
    "huber": (nn.HuberLoss(), 1),
    "hinge": (nn.HingeEmbeddingLoss(), 1),
}


def points(values: tuple[float, ...]) -> Tensor:
    """Every value in every column, and some that are at no kink."""
    rows = [[values[(k + shift) % len(values)] for k in range(3)] for shift in range(max(3, len(values)))]
    return torch.tensor([*rows, [0.3, -0.7, 1.9]]).double()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", TABLE)
def test_the_slope_is_that_of_torch(name: str) -> None:
    """Of x + p at p = 0: gradients, individual gradients and Jacobians."""
    function, values = TABLE[name]
    x = points(values)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return function(x + self.p)

    model, y = Shifted(), torch.randn_like(function(x))
    result = tn.compute(model, nn.MSELoss(reduction="sum"), (x, y), [tn.BatchGrad(), tn.Jacobians()])
    for n in range(len(x)):
        output = model(x[n : n + 1])
        rows = [torch.autograd.grad(out, model.p, retain_graph=True)[0] for out in output.flatten()]
        torch.testing.assert_close(result["jacobians"]["p"][n], torch.stack(rows))
        (want,) = torch.autograd.grad((output - y[n : n + 1]).square().sum(), model.p)
        torch.testing.assert_close(result["batch_grad"]["p"][n], want)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "threshold": lambda h: F.threshold(h, 0.2, 0.0),
    "hardtanh": lambda h: F.hardtanh(h, 0, 1),
    "hardsigmoid": lambda h: F.hardsigmoid(4 * h),
    "hardshrink": lambda h: F.hardshrink(h.exp(), 1),
    "softshrink": lambda h: F.softshrink(h.exp(), 1),
    "clamp": lambda h: h.clamp(0, 1),
    "clamp_max": lambda h: -h.clamp(max=0),
    "clamp_to_a_tensor": lambda h: h.clamp(min=torch.zeros_like(h)),
    "where": lambda h: torch.where(h > 0, h, 0.0),
    "where_other": lambda h: torch.where(h < 0, torch.zeros_like(h), h),
    "masked_fill": lambda h: h.masked_fill(h < 0, 0),
    "maximum": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "minimum": lambda h: -torch.minimum(h, torch.zeros_like(h)),
    "triangle": lambda h: h.exp().reshape(-1, 2, 2).tril().flatten(1),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", GATES)
def test_an_infinite_slope_does_not_pass_a_shut_gate(name: str) -> None:
    """√ at 0 behind a function with slope 0 there: gradients and columns are chosen, not multiplied by 0."""
    gate = GATES[name]
    parts = {"a": lambda: nn.Linear(3, 4), "b": lambda: nn.Linear(4, 2)}
    bound = 1e-6 if name == "hardsigmoid" else 1e-8  # its slope in torch is 1/6 in single precision
    Tried(name, lambda m, x: m.b(gate(m.a(x)).sqrt()), randn(5, 3), parts, bound=bound).check()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LOSSES)
def test_the_slope_of_a_loss(name: str) -> None:
    loss, distance = LOSSES[name]
    model = Apply(lambda t: t)
    linear = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3))
    y = torch.ones(4, 3).double() if name != "hinge" else -torch.ones(4, 3).double()
    x = y + distance * torch.tensor([1.0, -1.0, 0.5]).double() if name != "hinge" else torch.ones(4, 3).double()
    model = nn.Sequential(linear, model)
    (want,) = torch.autograd.grad(loss(model(x), y), linear.weight)
    torch.testing.assert_close(tn.compute(model, loss, (x, y), [tn.Grad()])["grad"]["0.weight"], want)


@pytest.mark.parametrize("name", KINKS)
def test_a_slope_that_no_row_knows_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a next version of torch, say: refused with what it is, and nothing is remembered of it."""
    assert slope(name) in KINKS[name].known
    other = Kink(lambda x: 0.25 * KINKS[name].function(x), KINKS[name].point, KINKS[name].known)
    slope.cache_clear()
    with monkeypatch.context() as changed:
        changed.setattr(kinks, "KINKS", MappingProxyType({name: other}))
        message = rf"torch \d.* has 0\.\d+ as the derivative of {name} at its end.*\n.*Declare a rule"
        if slope_of(other) not in other.known:
            with pytest.raises(UnsupportedError, match=message):
                slope(name)
    slope.cache_clear()
    with torch.inference_mode():
        assert slope(name) in KINKS[name].known


def slope_of(kink: Kink) -> float:
    x = torch.tensor([kink.point], dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(kink.function(x).sum(), x)[0])
