"""A loss is a sum over samples, up to a factor and a constant: any other is refused, whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ... import oracle, oracle_second
from ...models import Apply
from ...second_order import assert_equal

Loss = Callable[[Tensor, Tensor], Tensor]


def each(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="none")


NO_SUM: dict[str, Loss] = {
    "logsumexp": lambda f, y: each(f, y).logsumexp(0),
    "logsumexp of everything": lambda f, y: torch.logsumexp(f, (0, 1)),
    "norm": lambda f, y: each(f, y).norm(),
    "norm of everything": lambda f, y: f.norm(),
    "a norm of order 3": lambda f, y: torch.linalg.vector_norm(f, 3),
    "exp of the mean": lambda f, y: each(f, y).mean().exp(),
    "square of the mean": lambda f, y: each(f, y).mean() ** 2,
    "root of the mean": lambda f, y: each(f, y).mean().sqrt(),
    "log of the mean": lambda f, y: each(f, y).mean().log(),
    "product of means": lambda f, y: each(f, y).mean() * f.mean(),
    "ratio of means": lambda f, y: each(f, y).mean() / f.square().mean(),
    "clamp of the mean": lambda f, y: each(f, y).mean().clamp(min=0.3),
    "focal": lambda f, y: (1 - torch.exp(-F.cross_entropy(f, y))) ** 2 * F.cross_entropy(f, y),
    "Gram matrix": lambda f, y: (f.T @ f).square().sum(),
    "trace of the Gram matrix, without a rule": lambda f, y: (f.T @ f).trace(),
    "logdet of the Gram matrix, without a rule": lambda f, y: torch.logdet(f.T @ f),
    "loss of the mean": lambda f, y: F.mse_loss(f.mean(0), f.new_tensor([0.1, 0.2])),
    "largest": lambda f, y: each(f, y).amax(0),
    "product": lambda f, y: each(f, y).prod(),
    "softmax": lambda f, y: (each(f, y).softmax(0) * each(f, y)).sum(),
    "deviation": lambda f, y: each(f, y).std(),
    "running sums": lambda f, y: each(f, y).cumsum(0).mean(),
}
A_SUM: dict[str, Loss] = {
    "times a number": lambda f, y: 3 * each(f, y).mean() - 1,
    "divided by a number of labels": lambda f, y: (each(f, y) * y).sum() / y.sum(),
    "two means": lambda f, y: each(f, y).mean() + 0.1 * f.square().mean(),
    "norm of order 1": lambda f, y: torch.linalg.vector_norm(f, 1),
    "logsumexp of each": lambda f, y: f.logsumexp(1).mean(),
    "norm of each": lambda f, y: f.norm(dim=1).sum(),
    "square of the norm": lambda f, y: torch.norm(f - y[:, None]) ** 2 / 2,
    "square of the Frobenius norm": lambda f, y: torch.linalg.norm(f - 0.3, "fro").square(),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), Apply(lambda h: h + 0.1)).double()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", NO_SUM)
def test_no_sum(name: str) -> None:
    """The gradient, too: whoever reads it asks for the individual ones next."""
    x, y = torch.randn(4, 3).double(), torch.arange(4) % 2
    for quantity in (tn.Grad(), tn.BatchGrad(), tn.HessianDiag()):
        with pytest.raises(tn.UnsupportedError, match=r"not a sum over samples|mixes samples|samples|works along"):
            tn.compile(model(), NO_SUM[name], (x, y), [quantity])


@pytest.mark.parametrize("name", A_SUM)
def test_a_sum(name: str) -> None:
    made, loss, x, y = model(), A_SUM[name], torch.randn(4, 3).double(), torch.arange(4) % 2
    result = tn.compute(made, loss, (x, y), [tn.Grad(), tn.BatchGrad(), tn.HessianDiag()])
    assert_equal(result["grad"], oracle.grad(made, loss, x, y), "grad")
    assert_equal({k: g.sum(0) for k, g in result["batch_grad"].items()}, dict(result["grad"]), "sum of batch_grad")
    assert_equal(result["hessian_diag"], oracle_second.hessian_diag(made, loss, x, y), "hessian_diag")


def test_what_to_do() -> None:
    """Which operator, and why."""
    x, y = torch.randn(4, 3).double(), torch.arange(4) % 2
    said = r"aten.logsumexp.default in module 'loss' takes of one depends on the others"
    with pytest.raises(tn.UnsupportedError, match=said):
        tn.compile(model(), NO_SUM["logsumexp"], (x, y), [tn.HessianDiag()])
    with pytest.raises(tn.UnsupportedError, match=r"aten.trace.default .* reads a sum over them, and has no rule"):
        tn.compile(model(), NO_SUM["trace of the Gram matrix, without a rule"], (x, y), [tn.Grad()])


def test_the_square_of_a_norm_has_curvature() -> None:
    """As the sum of squares that it is."""
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    found, want = (
        tn.compute(model(), loss, (x, y), [tn.DiagGGN()])["diag_ggn"]
        for loss in (lambda f, y: torch.norm(f - y).pow(2), nn.MSELoss(reduction="sum"))
    )
    assert_equal(found, dict(want), "diag_ggn")
