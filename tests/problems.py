"""What a case is: a model, its loss, random data; and short ways to write one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import Apply, WithParameters

Make = Callable[[], nn.Module]
Draw = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What a case builds."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor


def normal(batch: int, output: Tensor) -> Tensor:
    return torch.randn_like(output)


@dataclass(frozen=True)
class Case:
    """A model, its loss and random data in float64.

    x      shape of one sample
    y      from (batch size, the model's output) to the targets; default: normal, shaped as the output
    train  mode of the model; random layers then draw from `seed`
    """

    name: str
    model: Make
    x: tuple[int, ...] = (3,)
    y: Draw = normal
    loss: Make = nn.MSELoss
    batch: int = 3
    seed: int = 0
    train: bool = False
    prepare: Callable[[Tensor], Tensor] = torch.clone

    def __str__(self) -> str:
        return self.name

    def build(self) -> Problem:
        """The same problem each time."""
        torch.default_generator.manual_seed(self.seed)
        model = self.model().double().train(self.train)
        loss = self.loss().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.7)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
            x = self.prepare(torch.randn(self.batch, *self.x, dtype=torch.float64))
            y = self.y(self.batch, model(x))
        return Problem(model, loss, x, y)


def classes(count: int, *shape: int, ignore: int | None = None) -> Draw:
    """Class indices [N, *shape]; the first is `ignore` if that is given."""

    def draw(batch: int, output: Tensor) -> Tensor:
        labels = torch.randint(count, (batch, *shape))
        if ignore is not None:
            labels.view(-1)[0] = ignore
        return labels

    return draw


def probabilities(batch: int, output: Tensor) -> Tensor:
    return torch.softmax(torch.randn_like(output), 1)


def tokens(count: int) -> Callable[[Tensor], Tensor]:
    """Integers below `count` from normal numbers."""
    return lambda x: (x.abs() * 10).long() % count


def unit(batch: int, output: Tensor) -> Tensor:
    return torch.rand_like(output)


def seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


def after_linear(name: str, make: Make, x: tuple[int, ...] = (3,), width: int = 4) -> Case:
    """A layer behind a linear one."""
    return Case(name, lambda: seq(nn.Linear(x[-1], width), make()), x)


def function(name: str, apply: Callable[[Tensor], Tensor], x: tuple[int, ...] = (3,), width: int = 4) -> Case:
    return after_linear(name, lambda: Apply(apply), x, width)


def with_parameters(
    name: str, apply: Callable[..., Tensor], *shapes: tuple[int, ...], x: tuple[int, ...] = (3,)
) -> Case:
    return Case(name, lambda: WithParameters(apply, *shapes), x)


def pool(name: str, make: Make, x: tuple[int, ...]) -> Case:
    """A pool behind a convolution with kernel 1."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(x) - 1]
    return Case(name, lambda: seq(conv(x[0], 2, 1), make()), x)


def classifier(name: str, loss: Make, y: Draw, outputs: int = 3, x: tuple[int, ...] = (3,), batch: int = 4) -> Case:
    return Case(name, lambda: nn.Linear(x[-1], outputs), x, y, loss, batch)


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
