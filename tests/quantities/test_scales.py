"""Scales: each quantity and `Scale` as a multiple of its definition in the ∇ℓ_n, for a mean and for a sum.

BACKPACK's rows are BackPACK 1.7.1's definitions: everything of the gradients as the loss scales them, s = 1/N or 1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from .. import oracle
from ..cases import Case, classes, seq
from .test_first_order import assert_equal

KINDS = {
    "batch_grad": tn.BatchGrad,
    "batch_l2": tn.BatchL2,
    "batch_dot": tn.BatchDot,
    "second_moment": tn.SecondMoment,
    "variance": tn.Variance,
}


def flat(G: Tensor) -> Tensor:
    return G.flatten(1)


# From the scaled or unscaled individual gradients G [N, *p] to each quantity.
DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_grad": lambda G: G,
    "batch_l2": lambda G: flat(G).square().sum(1),
    "batch_dot": lambda G: flat(G) @ flat(G).T,
    "second_moment": lambda G: G.square().mean(0),
    "variance": lambda G: G.square().mean(0) - G.mean(0).square(),
}
UNSCALED = ("second_moment", "variance")
"""Of the ∇ℓ_n in the paper's table too."""


def wanted(kind: str, scale: tn.Scale, G: Tensor, s: float) -> Tensor:
    """The definition, with G the unscaled ∇ℓ_n and s·G what the loss makes of them."""
    if kind == "second_moment" and scale is tn.Scale.BACKPACK:
        return (s * G).square().sum(0)
    unscaled = scale is tn.Scale.UNSCALED or (scale is tn.Scale.PAPER and kind in UNSCALED)
    return DEFINITIONS[kind](G if unscaled else s * G)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", tn.Scale)
def test_scale(scale: tn.Scale, reduction: str, batch: int) -> None:
    """One program with all quantities; each has the shape and the factor of its definition."""
    model = lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))  # noqa: E731
    loss = lambda: nn.CrossEntropyLoss(reduction=reduction)  # noqa: E731
    problem = Case("mlp", model, (3,), classes(3), loss, batch=batch).build()
    s = 1 / batch if reduction == "mean" else 1.0
    scaled = oracle.batch_grad(problem.model, problem.loss, problem.x, problem.y)
    quantities = [make(scale=scale) for make in KINDS.values()]
    result = tn.compute(problem.model, problem.loss, (problem.x, problem.y), quantities)
    for kind in KINDS:
        want = {name: wanted(kind, scale, G / s, s) for name, G in scaled.items()}
        assert_equal(result[kind], want, f"{kind} {scale}")


@pytest.mark.parametrize("centred", [False, True])
def test_variance_of_a_mean_is_smaller_by_the_square_of_the_batch(centred: bool) -> None:
    """BackPACK's variance of a mean is 1/N² of the paper's, and so is its sum of squares 1/N of the moment."""
    problem = Case("mlp", lambda: seq(nn.Linear(3, 3)), (3,), classes(3), nn.CrossEntropyLoss, batch=4).build()
    quantities = [
        tn.Variance("paper", centred=centred),
        tn.Variance("backpack", tn.Scale.BACKPACK, centred),
        tn.SecondMoment("moment"),
        tn.SecondMoment("sum", tn.Scale.BACKPACK),
    ]
    result = tn.compute(problem.model, problem.loss, (problem.x, problem.y), quantities)
    for name, variance in result["paper"].items():
        torch.testing.assert_close(result["backpack"][name], variance / 4**2)
        torch.testing.assert_close(result["sum"][name], result["moment"][name] / 4)


MASKED = {
    "over": lambda f, y: ((f - y[0]).square() * y[1]).sum() / y[1].sum(),
    "at least one": lambda f, y: ((f - y[0]).square() * y[1]).sum() / y[1].sum().clamp(min=1),
    "times the reciprocal": lambda f, y: ((f - y[0]).square() * y[1]).sum() * y[1].sum().reciprocal(),
    "as weights": lambda f, y: ((f - y[0]).square() * (y[1] / y[1].sum())).sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", MASKED)
def test_a_divisor_that_is_counted_in_the_batch(how: str) -> None:
    """A masked mean has all quantities that the sum of the masked losses has, times a constant."""
    torch.manual_seed(0)
    model = seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), (torch.randn(5, 2).double(), (torch.rand(5, 2) > 0.4).double())
    count = float(y[1].sum())
    quantities = [
        tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.DiagGGN(), tn.HessianDiag(), tn.KFLR(),
        tn.SqrtGGNMC(),
    ]  # fmt: skip
    constant = lambda f, y: ((f - y[0]).square() * y[1]).sum() / count  # noqa: E731
    found, want = (tn.compute(model, loss, (x, y), quantities, seed=0) for loss in (MASKED[how], constant))
    for quantity in (q.name for q in quantities):
        for name, value in want[quantity].items():
            got = found[quantity][name]
            if isinstance(value, tn.KroneckerFactors):
                got, value = got.to_dense(), value.to_dense()
            torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12)
    assert 0 < count < 10, "the mask matters"
    with pytest.raises(tn.UnsupportedError, match=r"not a sum over samples: what comes after .* is not linear in it"):
        tn.compile(model, lambda f, y: f.square().sum() / f.abs().sum(), (x, y[0]), [tn.Grad()])


def test_a_root_of_the_number_of_samples() -> None:
    """A loss may be divided by any power of it."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, y, reduction="sum") * output.shape[0] ** -0.5

    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchGrad(scale=tn.Scale.UNSCALED)])
    for size in (6, 2):
        result = program(x[:size], y[:size])
        wanted = torch.autograd.grad(loss(model(x[:size]), y[:size]), list(model.parameters()))
        for (name, got), want in zip(result["grad"].items(), wanted, strict=True):
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(result["batch_grad"][name].sum(0), want * size**0.5)
