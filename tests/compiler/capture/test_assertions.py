"""Checks of values in a forward are left out, and told; other questions to a tensor are refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

import tnbackprop as tn

from ...tried import FIRST, MSE, TWICE, Tried, randn

X, LABELS = randn(4, 3), torch.arange(4)
LINEAR = {"l": partial(nn.Linear, 3, 4)}
HESSIAN = (*FIRST, "hessian_diag")
COUNTS = torch.tensor([[0.0, 1, 2, 1], [3, 0, 0, 1], [1, 1, 2, 2], [0, 5, 1, 1]], dtype=torch.float64)


def negative_log(make: object, y: Tensor | None = None, name: str = "") -> Tried:
    """The mean of -log p(y) of a distribution that is made from four numbers for each sample."""
    return Tried(name, lambda m, x: m.l(x), X, LINEAR, HESSIAN, lambda f, y: -make(f).log_prob(y).mean(),
                 randn(4, 2, seed=9) if y is None else y)  # fmt: skip


DISTRIBUTIONS = [
    negative_log(lambda f: D.Normal(f[:, :2], f[:, 2:].exp()), name="Normal"),
    negative_log(lambda f: D.Normal(f[:, :2], f[:, 2:].exp(), validate_args=True), name="validated"),
    negative_log(lambda f: D.Laplace(f[:, :2], f[:, 2:].exp()), name="Laplace"),
    negative_log(lambda f: D.StudentT(4.0, f[:, :2], f[:, 2:].exp()), name="StudentT"),
    negative_log(lambda f: D.Gamma(f[:, :2].exp(), f[:, 2:].exp()), randn(4, 2).exp(), "Gamma"),
    negative_log(lambda f: D.Beta(f[:, :2].exp(), f[:, 2:].exp()), randn(4, 2).sigmoid(), "Beta"),
    negative_log(lambda f: D.LogNormal(f[:, :2], f[:, 2:].exp()), randn(4, 2).exp(), "LogNormal"),
    negative_log(lambda f: D.Independent(D.Normal(f[:, :2], f[:, 2:].exp()), 1), name="Independent"),
    negative_log(lambda f: D.Categorical(logits=f), LABELS, "Categorical"),
    negative_log(lambda f: D.Categorical(probs=f.softmax(1)), LABELS, "Categorical of probabilities"),
    negative_log(lambda f: D.Bernoulli(logits=f), COUNTS.clamp(max=1), "Bernoulli"),
    negative_log(lambda f: D.Poisson(f.exp()), COUNTS, "Poisson"),
    negative_log(lambda f: D.NegativeBinomial(5.0, logits=f), COUNTS, "NegativeBinomial"),
    negative_log(lambda f: D.MixtureSameFamily(D.Categorical(logits=f[:, :2]), D.Normal(f[:, 2:], 1.0)),
                 randn(4, seed=9), "MixtureSameFamily"),
    Tried("covariance", lambda m, x: m.l(x), X, LINEAR, FIRST, lambda f, y: -D.MultivariateNormal(
        f, torch.eye(4, dtype=f.dtype)).log_prob(y).mean(), randn(4, 4, seed=9)),
]  # fmt: skip


@pytest.fixture
def validated() -> Iterator[None]:
    """Distributions validate by default, until torch.compile turns that off for all of the process."""
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(True)
    yield
    D.Distribution.set_default_validate_args(before)


@pytest.mark.thinned(8)
@pytest.mark.usefixtures("validated")
@pytest.mark.parametrize("tried", DISTRIBUTIONS, ids=str)
def test_distributions(tried: Tried) -> None:
    text = tried.check().explain("capture")
    assert "not checked" in text and "distribution.py" in text


def test_two_distributions() -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return D.kl_divergence(D.Normal(f[:, :2], f[:, 2:].exp()), D.Normal(0.0, 1.0)).sum(1).mean()

    Tried("kl", lambda m, x: m.l(x), X, LINEAR, HESSIAN, loss, randn(4, 2)).check()


GAUSSIAN = [
    Tried("gaussian_nll_loss", lambda m, x: m.l(x), X, LINEAR, HESSIAN,
          lambda f, y, options=options: F.gaussian_nll_loss(f[:, :2], y, f[:, 2:].exp(), **options), randn(4, 2))
    for options in ({}, {"full": True, "eps": 0.4}, {"reduction": "sum"})
] + [
    Tried("module", lambda m, x: m.l(x), X, LINEAR, TWICE,
          lambda f, y: nn.GaussianNLLLoss()(f, y, torch.ones_like(f)), randn(4, 4)),
    Tried("one variance", lambda m, x: m.l(x), X, LINEAR, FIRST,
          lambda f, y: nn.GaussianNLLLoss()(f[:, :3], y, f[:, 3].exp()), randn(4, 3)),
]  # fmt: skip


@pytest.mark.parametrize("tried", GAUSSIAN, ids=str)
def test_gaussian_nll(tried: Tried) -> None:
    """Below eps the derivative by the variance is that at eps, not zero."""
    tried.check()


def checked(f: Tensor, y: Tensor) -> Tensor:
    assert (f.square() >= 0).all(), "squares"
    if not (f < 100).all() or (f < -100).any():
        raise ValueError("large")
    return MSE(f, y)


def test_checks_of_ones_own() -> None:
    text = Tried("own", lambda m, x: m.l(x), X, LINEAR, TWICE, checked).check().explain("capture")
    assert text.count("not checked") == 2 and "assert (f.square() >= 0).all()" in text


def branching(f: Tensor, y: Tensor) -> Tensor:
    if (f > 100).any():
        f = f / 2
    return MSE(f, y)


def test_a_branch_is_no_check() -> None:
    with pytest.raises(tn.UnsupportedError, match="depends on the data"):
        Tried("branch", lambda m, x: m.l(x), X, LINEAR, FIRST, branching).program()


def test_a_check_that_fails() -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        if (f < 100).any():
            raise ValueError("too small")
        return MSE(f, y)

    with pytest.raises(tn.InputError, match="fails on the example: too small"):
        tn.compile(nn.Linear(3, 2), loss, (X.float(), randn(4, 2).float()), [tn.Grad()])
