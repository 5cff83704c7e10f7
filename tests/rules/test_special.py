"""Special functions, angles and remainders: gradients and the Hessian's diagonal are autograd's, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

special = torch.special
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lgamma": torch.lgamma,
    "gammaln": special.gammaln,
    "digamma": torch.digamma,
    "psi": special.psi,
    "erfinv": torch.erfinv,
    "ndtri": special.ndtri,
    "erfcx": special.erfcx,
    "entr": special.entr,
    "sinc": torch.sinc,
    "degrees": lambda u: torch.deg2rad(torch.rad2deg(u).square()),
    "fmod": lambda u: torch.fmod(u.square(), 0.25) * u,
    "remainder": lambda u: torch.remainder(u.square(), 0.25) * u,
    "xlogy": lambda u: torch.xlogy(u, u.flip(-1)),
    "xlogy of a number": lambda u: torch.xlogy(2.0, u) + torch.xlogy(u.square(), 3.0),
    "xlogy of a row": lambda u: torch.xlogy(u, u[:, :1]),
    "xlog1py": lambda u: special.xlog1py(u, u.flip(-1)),
    "logaddexp2": lambda u: torch.logaddexp2(u, u.flip(-1).square()),
    "atan2": lambda u: torch.atan2(u - 0.5, u.flip(-1) - 0.4),
    "atan2 of a row": lambda u: torch.atan2(u, u[:, 1:2]),
    "ldexp": lambda u: torch.ldexp(u, torch.tensor([1, 2, 0])).square(),
    "trapz": lambda u: torch.trapz(u.square(), dim=-1)[:, None],
    "beta": lambda u: torch.distributions.Beta(u + 1, u.flip(-1) + 2).log_prob(torch.full((3,), 0.3).double()),
}  # fmt: skip


class Inside(nn.Module):
    """A function of numbers between 0.1 and 0.9."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.own(x).sigmoid() * 0.8 + 0.1)


def mean_square(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().sum() / len(y)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_derivatives(name: str) -> None:
    torch.manual_seed(0)
    model, x = Inside(FUNCTIONS[name]).double(), torch.randn(4, 3).double()
    y = torch.randn_like(model(x))
    result = tn.compute(model, mean_square, (x, y), [tn.Grad(), tn.HessianDiag()])
    own = list(model.parameters())
    slopes = torch.autograd.grad(mean_square(model(x), y), own, create_graph=True)
    for parameter, slope, (key, found) in zip(own, slopes, result["grad"].items(), strict=True):
        torch.testing.assert_close(found, slope.detach())
        rows = [torch.autograd.grad(each, parameter, retain_graph=True)[0].flatten() for each in slope.flatten()]
        torch.testing.assert_close(result["hessian_diag"][key], torch.stack(rows).diag().view_as(parameter))


EDGES: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "xlogy": (lambda u: torch.xlogy(u[:, :1], u[:, 1:]), [0.0, 0.5]),
    "atan2": (lambda u: torch.atan2(u[:, :1], u[:, 1:]), [0.0, 0.0]),
    "sinc": (torch.sinc, [0.0, 1.0]),
    "fmod": (lambda u: torch.fmod(u, 0.5), [0.5, -1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    """What torch chooses where a function has no derivative, or a formula of it none."""
    function, at = EDGES[name]
    x = torch.tensor([at]).double()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2).double())

        def forward(self, x: Tensor) -> Tensor:
            return function(x + self.shift)

    model = Own()
    program = tn.compile(model, lambda f, y: f.sum(), (torch.rand(2, 2).double(), torch.zeros(2)), [tn.Grad()])
    found = program(x, torch.zeros(1))["grad"]["shift"]
    (want,) = torch.autograd.grad(model(x).sum(), model.shift)
    torch.testing.assert_close(found, want.nan_to_num(0))  # torch 2.7 has no number for the angle at the origin


def test_in_a_formula() -> None:
    """The words of formulas have these functions, too."""
    torch.manual_seed(0)
    formula = "output[n, i] = lgamma(w[i] * input[n, i]) + digamma(input[n, i]) * w[i]"
    layer = tn.einsum_layer(formula, w=((3,), nn.init.ones_))
    x, y = torch.rand(4, 3).double() + 0.5, torch.rand(4, 3).double()
    model = layer.double()
    result = tn.compute(model, mean_square, (x, y), [tn.Grad(), tn.HessianDiag()])
    w = torch.ones(3).double().requires_grad_()
    (slope,) = torch.autograd.grad(mean_square(torch.lgamma(w * x) + torch.digamma(x) * w, y), w, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), w)
    torch.testing.assert_close(result["grad"]["w"], slope.detach())
    torch.testing.assert_close(result["hessian_diag"]["w"], second)
