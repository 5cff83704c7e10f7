"""Terms of the loss in what is made of parameters alone and is the same for all samples: each sample has its share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import tnbackprop as tn

Output = tuple[Tensor, Tensor]


class Actor(nn.Module):
    """A Gaussian with one scale for all states."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Linear(3, 2), nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Output:
        mean = self.mean(x)
        return mean, self.log_scale.expand_as(mean)


def log_prob(output: Output, y: Tensor) -> Tensor:
    return Normal(output[0], output[1].exp()).log_prob(y).sum(1)


def entropy(output: Output) -> Tensor:
    return Normal(output[0], output[1].exp()).entropy().sum(1)


LOSSES: dict[str, Callable[[Output, Tensor], Tensor]] = {
    "two means": lambda f, y: -log_prob(f, y).mean() - 0.1 * entropy(f).mean(),
    "the other way round": lambda f, y: 0.1 * entropy(f).mean() - log_prob(f, y).mean(),
    "one mean": lambda f, y: (-log_prob(f, y) - 0.1 * entropy(f)).mean(),
    "two sums": lambda f, y: 0.1 * entropy(f).sum() - log_prob(f, y).sum(),
    "not linear in it": lambda f, y: -log_prob(f, y).mean() - entropy(f).mean().square(),
    "alone": lambda f, y: entropy(f).mean(),
}


def gradients(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    own = list(model.parameters())
    return list(torch.autograd.grad(loss(model(x), y), own, allow_unused=True, materialize_grads=True))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients(loss: Callable[[Output, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x, y = Actor().double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchGrad("each", tn.Scale.UNSCALED), tn.BatchL2()])
    for size in (5, 3, 1):
        result = program(x[:size], y[:size])
        each = [gradients(model, loss, x[n : n + 1], y[n : n + 1]) for n in range(size)]
        for k, (name, whole) in enumerate(zip(result["grad"], gradients(model, loss, x[:size], y[:size]), strict=True)):
            torch.testing.assert_close(result["grad"][name], whole)
            torch.testing.assert_close(result["each"][name], torch.stack([own[k] for own in each]))


class Prompted(nn.Module):
    """Words of a prompt, made of parameters alone for each sample, in front of the sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.own, self.head = nn.Embedding(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.tokens: Tensor
        self.register_buffer("tokens", torch.arange(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens.unsqueeze(0).expand(len(x), -1)[:1]  # the first of many, and again for each
        prompt = self.own(self.prompt(tokens)).tanh().repeat(len(x), 1, 1)
        return self.head(torch.cat([prompt, x], 1).softmax(1)).sum(1)


def test_a_prompt() -> None:
    """What each sample reads of it differs, though what it is made of is the same for all."""
    torch.manual_seed(0)
    model, loss = Prompted().double(), nn.MSELoss()
    x, y = torch.randn(4, 3, 3).double(), torch.randn(4, 2).double()
    result = tn.compute(model, loss, (x, y), [tn.Grad(), tn.BatchGrad("each", tn.Scale.UNSCALED)])
    each = [gradients(model, loss, x[n : n + 1], y[n : n + 1]) for n in range(4)]
    for k, (name, whole) in enumerate(zip(result["grad"], gradients(model, loss, x, y), strict=True)):
        torch.testing.assert_close(result["grad"][name], whole)
        torch.testing.assert_close(result["each"][name], torch.stack([own[k] for own in each]))


def test_a_sum_beside_a_mean() -> None:
    """As of any other term: samples would have different shares in batches of different sizes."""
    model, x, y = Actor(), torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(tn.UnsupportedError, match="both averages and sums over samples"):
        tn.compile(model, lambda f, y: entropy(f).sum() - log_prob(f, y).mean(), (x, y), [tn.Grad()])


def test_a_term_without_samples() -> None:
    """What was not made for each sample belongs to none."""
    model, x, y = Actor(), torch.randn(5, 3), torch.randn(5, 2)
    loss = lambda f, y: -log_prob(f, y).mean() + model.log_scale.square().sum()  # noqa: E731
    with pytest.raises(tn.UnsupportedError, match=r"in the parameters log_scale alone.* belongs to no sample"):
        tn.compile(model, loss, (x, y), [tn.Grad()])
