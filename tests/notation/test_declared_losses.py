"""Losses with a rule of one's own: the formula gives the Hessian, and its root and sampler where it is elementwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop import UnsupportedError

from .. import oracle_second
from ..declaring import Power, X, Y, check, network, targets


class LogCosh(nn.Module):
    """Mean of log cosh of the difference."""

    reduction = "mean"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - target).cosh().log().mean()


class Mahalanobis(nn.Module):
    """(1/2N) Σ_n ‖P (f_n - y_n)‖²."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.3, 0.0, 1.0]]))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ((input - target) @ self.factor.T).square().sum() / (2 * input.shape[0])


MAHALANOBIS = """d[n, r] = factor[r, c] * input[n, c] - factor[r, c] * target[n, c]
                 output[] = d[n, r]**2 / (2 * N)"""
ROOT = tn.Root(
    columns=3,
    code="({factor}.unsqueeze(1) / {input}.shape[0]**0.5).expand(3, {input}.shape[0], 3)",
    sample="(2 * ({noise} < 0.5).to({input}.dtype) - 1) @ {factor} / {input}.shape[0]**0.5",
)
LOSSES: dict[str, tuple[type[nn.Module], tn.Rule]] = {
    "elementwise": (LogCosh, tn.Rule("output[] = log(cosh(input[n, c] - target[n, c])) / (N * C)")),
    "root": (Mahalanobis, tn.Rule(MAHALANOBIS, root=ROOT)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str) -> None:
    """The formula of a loss gives the Hessian, its root, and samples with that covariance."""
    loss, model = LOSSES[name][0]().double(), network(Power())
    with tn.registered({LOSSES[name][0]: LOSSES[name][1]}):
        assert LOSSES[name][0] in targets(check(model, loss))
        program = tn.compile(model, loss, (X, Y), [tn.DiagGGNMC(mc_samples=4000), tn.KFLR()])
    result, want = program(X, Y, seed=0), oracle_second.ggn(model, loss, X, Y)
    for parameter, block in want.items():
        sampled = result["diag_ggn_mc"][parameter].reshape(-1)
        assert 0 < float((sampled - block.diagonal()).norm() / block.diagonal().norm()) < 0.1
    torch.testing.assert_close(result["kflr"]["3.bias"].to_dense(), want["3.bias"])


def test_loss_without_a_root() -> None:
    with tn.registered({Mahalanobis: MAHALANOBIS}):
        loss = Mahalanobis().double()
        assert "grad" in tn.compute(network(Power()), loss, (X, Y), [tn.Grad()])
        message = r"(?s)Hessian of Mahalanobis in .*not elementwise.*root=tnbackprop.Root"
        with pytest.raises(UnsupportedError, match=message):
            tn.compile(network(Power()), loss, (X, Y), [tn.DiagGGN()])
