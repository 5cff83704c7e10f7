"""A row of the zoo: a tiny model of a kind that people have, with its loss and how a batch of it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tnbackprop as tn

N = 3
seq = nn.Sequential
CE, MSE, BCE = nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()
Draw = Callable[[int], Any]
"""Of the batch size: a tensor, or several in a tuple or dict."""


class Net(nn.Module):
    """Modules and parameters by name, and the forward as a function of this module and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


@dataclass(frozen=True)
class Problem:
    """A model in float64 and evaluation mode, and a batch of N samples."""

    model: nn.Module
    loss: Callable[..., Tensor]
    x: Any
    y: Any


@dataclass(frozen=True)
class Row:
    """name; what builds the model; what draws x and y; the loss, a mean over samples.

    convex  the loss is convex in the output, so that it has a GGN; where not, KFAC is the empirical one
    exact   the model is small enough for the GGN's diagonal by its definition
    inside  what the model computes in: a part of some is in float32, whatever they are given
    """

    name: str
    build: Callable[[], nn.Module]
    x: Draw
    y: Draw
    loss: Callable[..., Tensor] = MSE
    convex: bool = True
    exact: bool = True
    inside: torch.dtype = torch.float64

    @property
    def kfac(self) -> tn.KFAC:
        return tn.KFAC() if self.convex else tn.KFAC(fisher=tn.Fisher.EMPIRICAL)

    def problem(self) -> Problem:
        """The same for every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().double().eval()
            with torch.no_grad():  # no parameter or statistic at a value where a derivative of it is zero or one
                for p in model.parameters():
                    p.add_(0.1 * torch.randn_like(p))
                for name, b in model.named_buffers():
                    if name.endswith("running_mean"):
                        b.add_(0.1 * torch.randn_like(b))
                    if name.endswith("running_var"):
                        b.add_(0.5 * torch.rand_like(b))
            return Problem(model, self.loss, self.x(N), self.y(N))


def normal(*shape: int) -> Draw:
    """[N, *shape], standard normal."""
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def uniform(*shape: int) -> Draw:
    """[N, *shape] in [0, 1)."""
    return lambda n: torch.rand(n, *shape, dtype=torch.float64)


def ids(size: int, *shape: int) -> Draw:
    """[N, *shape] of 0 … size - 1: tokens, labels."""
    return lambda n: torch.randint(size, (n, *shape))


def binary(*shape: int) -> Draw:
    """[N, *shape] of 0.0 and 1.0."""
    return lambda n: torch.randint(2, (n, *shape)).double()


def several(*draws: Draw) -> Draw:
    """A tuple of inputs."""
    return lambda n: tuple(draw(n) for draw in draws)


def named(**draws: Draw) -> Draw:
    """Inputs by name."""
    return lambda n: {name: draw(n) for name, draw in draws.items()}


def tokenwise(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy over all positions: logits [N, T, C], y [N, T]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
