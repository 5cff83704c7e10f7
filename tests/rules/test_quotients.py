"""Divisions of a model in float32: derivatives stay in range where the quotient does, as torch's do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "exponentials": (lambda u: u.exp() / (1 + u.exp()), (80.0, 70.0)),
    "softmax by hand": (lambda u: u.exp() / u.exp().sum(-1, keepdim=True), (80.0, 79.5)),
    "the function of Bernoulli": (lambda u: u * u.exp() / (u.exp() - 1), (60.0, 80.0)),
    "hyperbolic": (lambda u: u.sinh() / u.cosh(), (60.0, 80.0)),
    "a norm of nothing": (lambda u: u / (u.norm(dim=-1, keepdim=True) + 1e-20), (0.0, 0.0)),
    "a square of nothing": (lambda u: u / (u.square().sum(-1, keepdim=True) + 1e-30), (0.0, 0.0)),
    "a clamped denominator": (lambda u: u / u.abs().clamp(min=1e-25), (0.0, 2.0)),
    "large": (lambda u: u / (u + 1e25), (1e25, 3e24)),
    "addcdiv": (lambda u: torch.addcdiv(u, u.exp(), 1 + u.exp()), (80.0, 70.0)),
    "logaddexp": (lambda u: torch.logaddexp(2 * u, u - 10), (10.0, 30.0)),
    "logaddexp2": (lambda u: torch.logaddexp2(2 * u, u - 10), (10.0, 30.0)),
    "hypot": (lambda u: torch.hypot(u, u.flip(-1)), (1e25, 3e24)),
    "a tiny hypot": (lambda u: torch.hypot(u, u.flip(-1)), (1e-25, 3e-24)),
    "a square below": (lambda u: (-u).exp() / (1 + (-u).exp()) ** 2, (-40.0, -30.0)),
}


class Scaled(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(2)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.scale)


@pytest.mark.parametrize("name", CASES)
def test_models(name: str) -> None:
    """As near to float64 as autograd in float32 is, up to roundings of the terms that cancel."""
    function, at = CASES[name]
    x = torch.tensor([at])
    quantities = [tn.BatchGrad("each", tn.Scale.UNSCALED), tn.Grad()]
    result = tn.compute(Scaled(function), lambda f, y: f.sum(), (x, torch.zeros(1)), quantities)

    def slope(dtype: torch.dtype) -> Tensor:
        scale = torch.ones(2, dtype=dtype, requires_grad=True)
        return torch.autograd.grad(function(x.to(dtype) * scale).sum(), scale)[0].double()

    want = slope(torch.float64)
    error = (slope(torch.float32) - want).abs().max()
    for found in (result["each"]["scale"][0], result["grad"]["scale"]):
        assert (found.double() - want).abs().max() <= 3 * error + 1e-5 * max(1.0, want.abs().max())


def test_a_quotient_reads_as_one() -> None:
    """What people read, and no power of the denominator in the program."""
    x = torch.ones(1, 2)
    program = tn.compile(Scaled(CASES["exponentials"][0]), lambda f, y: f.sum(), (x, torch.zeros(1)), [tn.Grad()])
    assert "−exp[n,a]/add[n,a]/add[n,a]" in program.explain()
    assert "exp / add / add" in program.source
