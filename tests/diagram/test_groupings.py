"""A parameter that is read with several groupings of its axes: every quantity against autograd."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import tnbackprop as tn

from .. import oracle, oracle_second
from ..models import Branches, Reused, WithParameters
from ..regrouped import regrouped
from ..second_order import TOLERANCE, error

PROGRAMS = int(os.environ.get("TNBACKPROP_PROGRAMS", "4"))
"""How many random programs are tried: raise it after a change of the algebra."""
QUANTITIES = (
    tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.DiagGGN(), tn.HessianDiag(),
    tn.Jacobians(),
)  # fmt: skip


def read(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: WithParameters(function, *shapes)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "flat sum": (read(lambda x, p: x * p + p.flatten().sum(), (2, 3)), (2, 3)),
    "bias from the weight": (read(lambda x, w: F.linear(x, w, w.view(-1)[:2]), (2, 3)), (3,)),
    "flip": (read(lambda x, w: F.linear(x, w, w.flatten().flip(0)[:2]), (2, 3)), (3,)),
    "gather": (read(lambda x, w: F.linear(x, w) + w.flatten()[torch.tensor([5, 0])], (2, 3)), (3,)),
    "pad": (read(lambda x, w: F.linear(x, w) + F.pad(w.flatten(), (1, 1)).view(2, 4).sum(1), (2, 3)), (3,)),
    "reflect": (read(lambda x, w: F.linear(x, w, F.pad(w.view(1, 6), (1, 1), "reflect")[0, 3:5]), (2, 3)), (3,)),
    "roll": (read(lambda x, w: F.linear(x, w) + w.flatten().roll(2, 0).view(2, 3).sum(1), (2, 3)), (3,)),
    "transposed flat": (read(lambda x, w: F.linear(x, w) + w.t().flatten()[1:3], (2, 3)), (3,)),
    "transposed view": (read(lambda x, w: F.linear(x, w) * F.linear(x, w.t().reshape(2, 3)), (2, 3)), (3,)),
    "broadcast, merged": (read(lambda x, w: x + (torch.ones(3, 3, 2).to(w) + w).view(9, 2).sum(0), (2,)), (2,)),
    "2 · 3 and 3 · 2": (read(lambda x, p: F.linear(F.linear(x, p.view(2, 3)).tanh(), p.view(3, 2)), (6,)), (3,)),
    "three ways": (read(lambda x, p: F.linear(x, p.view(3, 4)) * p.view(4, 3)[1] + p.view(2, 6)[:, :3].sum(0), (12,)),
                   (4,)),
    "two shapes in one call": (read(lambda x, w: x @ (w @ w.view(3, 2)), (2, 3)), (2,)),
    "diagonal": (read(lambda x, w: x * w.diagonal() + w.flatten()[2:5], (3, 3)), (3,)),
    "diagonal matrix": (read(lambda x, w: F.linear(x, torch.diag_embed(w)) + w.view(2, 3).sum(0).repeat(2), (6,)),
                        (6,)),
    "symmetric": (read(lambda x, w: F.linear(x, (w + w.t()).view(2, 8)[:, :4]) + w.view(2, 2, 4).sum((0, 2)), (4, 4)),
                  (4,)),
    "axes of size 1": (read(lambda x, w: F.linear(x, w.squeeze()) + w.flatten()[2], (1, 2, 1, 3, 1)), (3,)),
    "one element": (read(lambda x, w: x * w + w.flatten().sum(), (1, 1)), (3,)),
    "a weight by its flat norm": (read(lambda x, w: F.linear(x, w / w.flatten().square().sum().sqrt()), (2, 3)), (3,)),
    "across calls": (lambda: Branches(lambda a, b: a + b.flatten(1)[:, :2], *2 * [Shared()]), (2,)),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv1d(2, 2, 2)), nn.Flatten()), (2, 3)),
    "spectral norm, shared": (lambda: Reused(parametrizations.spectral_norm(nn.Linear(3, 3))), (3,)),
    "weight norm, groups": (lambda: Plain(nn.Conv1d(4, 4, 2, groups=2), 2), (4, 2)),
    "weight norm, groups, first axis": (lambda: Plain(nn.Conv1d(4, 2, 2, groups=2), 0), (4, 2)),
}  # fmt: skip


class Shared(nn.Module):
    """A weight, read as it is and as another matrix by the call after that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(F.linear(x, self.weight)), self.weight.view(2, 3))


class Plain(nn.Module):
    """A convolution with weight norm in plain operations: the kernel's own second derivative in torch is wrong."""

    def __init__(self, layer: nn.Conv1d, dim: int) -> None:
        super().__init__()
        self.v, self.groups = nn.Parameter(layer.weight.detach().clone()), layer.groups
        self.rest = [axis for axis in range(3) if axis != dim]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.v * self.v.square().sum(self.rest, keepdim=True).rsqrt()
        return F.conv1d(x, weight, groups=self.groups).flatten(1)


def expected(name: str, model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    if name == "jacobians":
        theta = oracle.parameters(model)
        rows = oracle_second.jacobians(model, x)
        return {key: J.reshape(*J.shape[:2], *theta[key].shape) for key, J in rows.items()}
    found = getattr(oracle, name, None) or getattr(oracle_second, name)
    return dict(found(model, loss, x, y))


def check(model: nn.Module, x: Tensor, quantities: tuple[tn.Quantity, ...]) -> None:
    loss, y = nn.MSELoss(), torch.randn_like(model(x).detach())
    program = tn.compile(model, loss, (x, y), quantities)
    result = program(x, y)
    for quantity in quantities:
        for name, want in expected(quantity.name, model, loss, x, y).items():
            found = error(result[quantity.name][name].reshape(want.shape), want)
            assert found <= TOLERANCE, f"{quantity.name} of {name}: {found:.3g}\n{model}\n{program.source}"


def some(seed: int | str) -> tuple[tn.Quantity, ...]:
    """Two of all quantities, the same ones every time."""
    return tuple(Random(seed).sample(QUANTITIES, 2))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("what", CASES)
def test_cases(what: str) -> None:
    make, shape = CASES[what]
    model = make().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    check(model, torch.randn(3, *shape, dtype=torch.float64), some(what))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_programs(seed: int) -> None:
    model, x = regrouped(seed)
    check(model, x, some(seed))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("what", ["gather", "transposed view", "2 · 3 and 3 · 2"])
def test_no_table_of_all_pairs_of_elements(what: str) -> None:
    """An axis that is read as others is a view: nothing has the square of the parameter's elements."""
    functions: dict[str, tuple[Callable[..., Tensor], int]] = {
        "gather": (lambda x, w: F.linear(x, w) + w.flatten()[torch.arange(40) * 3], 30),
        "transposed view": (lambda x, w: F.linear(x, w) * F.linear(x, w.t().reshape(40, 30)), 30),
        "2 · 3 and 3 · 2": (lambda x, w: F.linear(F.linear(x, w).tanh(), w.view(30, 40)), 30),
    }
    function, width = functions[what]
    model = WithParameters(function, (40, 30)).double()
    nn.init.normal_(model.parameter[0], std=0.1)
    x = torch.randn(2, width, dtype=torch.float64)
    y = torch.randn_like(model(x))
    for quantity in (tn.Grad(), tn.BatchL2(), tn.DiagGGN()):
        program = tn.compile(model, nn.MSELoss(), (x, y), [quantity])
        assert program.peak_bytes < 8 * 1200**2 / 2, program.source


class Empty(nn.Module):
    """Parameters that are read whole, and through slices that are empty."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.q, self.read = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(4)), read

    def forward(self, x: Tensor) -> Tensor:
        return x * self.q + self.read(self.p) * self.q.tanh()


@pytest.mark.parametrize(
    "read",
    [
        lambda p: F.pad(p[1:], (0, 1)),
        lambda p: p + p[1:].sum(),
        lambda p: p * F.pad(p[1:].reshape(0, 3).reshape(3, 0), (0, 1)).sum(),
        lambda p: torch.cat([p[1:], p]),
    ],
)
def test_what_is_empty_has_no_derivative(read: Callable[[Tensor], Tensor]) -> None:
    """Zero, where a parameter is read through no element of it only."""
    torch.manual_seed(0)
    model, x = Empty(read).double(), torch.randn(3, 4, dtype=torch.float64)
    loss, y = nn.MSELoss(), torch.randn(3, 4, dtype=torch.float64)
    result = tn.compute(model, loss, (x, y), [tn.Grad(), tn.BatchGrad(), tn.DiagGGN()])
    for n in range(3):
        loss(model(x[n : n + 1]), y[n : n + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["batch_grad"][name][n] * 3, parameter.grad)
            parameter.grad = None
    assert all(value.isfinite().all() for value in result["diag_ggn"].values())


class Exponents(nn.Module):
    """A value of parameters that is read with two groupings of its axes, and in whose derivative it stands itself."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        p = self.p.reshape(4, 2)
        rest = p.logsumexp(1, keepdim=True) - p
        return x @ (rest * rest.t().reshape(4, 2).sigmoid()) + self.p.sum()


def test_second_derivatives_of_a_value_that_is_regrouped() -> None:
    torch.manual_seed(0)
    model, x, y = Exponents().double(), torch.randn(3, 4).double(), torch.randn(3, 2).double()
    result = tn.compute(model, nn.MSELoss(), (x, y), [tn.HessianDiag()])
    want = oracle_second.hessian_diag(model, nn.MSELoss(), x, y)
    assert error(result["hessian_diag"]["p"], want["p"]) < TOLERANCE
