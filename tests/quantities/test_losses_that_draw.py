"""Losses that draw numbers: their curvature is of those that the loss was computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

N, C = 5, 4
Loss = Callable[[Any, Any], Tensor]


def sampled(f: Tensor, y: Tensor) -> Tensor:
    """A draw from a mean and a logarithm of a deviation."""
    return ((f[:, :2] + torch.randn_like(f[:, :2]) * f[:, 2:].exp() - y[:, :2]) ** 2).sum(1).mean()


DRAWN: dict[str, Loss] = {
    "of a distribution": sampled,
    "of labels": lambda f, y: ((F.gumbel_softmax(f) - y) ** 2).sum(1).mean(),
    "in place": lambda f, y: ((torch.empty_like(f).exponential_() * f).exp().sum(1) ** 2).mean(),
}


@pytest.mark.parametrize("name", DRAWN)
def test_numbers_that_a_loss_draws(name: str) -> None:
    """The curvature is of those that the loss was computed with."""
    torch.manual_seed(0)
    model, loss, x, y = nn.Linear(3, C).double(), DRAWN[name], torch.randn(N, 3).double(), torch.randn(N, C).double()
    program = tn.compile(model, loss, (x, y), [tn.DiagGGN(), tn.HessianDiag()], indefinite=tn.Indefinite.CLIP)
    torch.manual_seed(3)
    result = program(x, y)

    def same(f: Tensor) -> Tensor:
        torch.manual_seed(3)
        return loss(f, y)

    output = model(x).detach()
    torch.testing.assert_close(result.loss, same(output))
    whole = torch.autograd.functional.hessian(same, output)
    H = torch.stack([whole[n, :, n, :] for n in range(N)])
    values, vectors = torch.linalg.eigh(H)
    clipped = vectors @ (values.clamp(min=0)[..., None] * vectors.mT)
    for key, each in (("diag_ggn", clipped), ("hessian_diag", H)):
        torch.testing.assert_close(result[key]["bias"], each.diagonal(dim1=1, dim2=2).sum(0), rtol=1e-9, atol=1e-12)


def test_draws_of_the_output_are_refused() -> None:
    loss = lambda f, y: (F.dropout(f, 0.5) - y).norm(dim=1).mean()  # noqa: E731
    with pytest.raises(tn.UnsupportedError, match=r"dropout.*draws random numbers.*\n.*or in the model"):
        tn.compile(nn.Linear(3, C), loss, (torch.randn(N, 3), torch.randn(N, C)), [tn.DiagGGN()])
