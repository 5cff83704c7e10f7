"""Random models: sharing, branching, groups, axes of size 1, frozen parameters; every quantity against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from .. import oracle
from ..models import Apply, Branches, Residual, Reused, WithParameters, Written

QUANTITIES = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
TOLERANCE = 1e-10
SETTINGS = settings(max_examples=30, deadline=None, derandomize=True, database=None)

width = st.integers(1, 3)


@dataclass(frozen=True)
class Drawn:
    """A model with its loss and data; `text` is what a failure shows."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor

    def __repr__(self) -> str:
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        return f"{self.model}\nloss {self.loss}, x {list(self.x.shape)}, y {list(self.y.shape)}, frozen {frozen}"


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Tanh,
    nn.ReLU,
    nn.Sigmoid,
    nn.GELU,
    nn.Softplus,
    lambda: nn.LeakyReLU(0.3),
)


def activation() -> st.SearchStrategy[nn.Module]:
    return st.sampled_from(ACTIVATIONS).map(lambda make: make())


class Tied(nn.Module):
    """One matrix, used plain and transposed."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inner, outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class Pointwise(WithParameters):
    """A function with parameters that broadcast; a class of its own, so that a failure shows its shapes."""

    def extra_repr(self) -> str:
        return str([list(p.shape) for p in self.parameter])


def two(combine: Callable[[Tensor, Tensor], Tensor], make: Callable[[], nn.Module]) -> nn.Module:
    return Branches(combine, make(), make())


COMBINE: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda a, b: a * b,
    lambda a, b: a - 2 * b,
    lambda a, b: torch.cat([a, b], dim=1),
    lambda a, b: torch.stack([a, b], dim=1).tanh().sum(1),
    lambda a, b: a / (1 + b**2),
)


@st.composite
def dense(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    """A stage for [N, *s, d]."""
    d, w = shape[-1], draw(width)
    kind = draw(st.integers(0, 8))
    match kind:
        case 0 | 1:
            return nn.Linear(d, w, bias=draw(st.booleans()))
        case 2:
            return Residual(nn.Sequential(nn.Linear(d, d), draw(activation())))
        case 3:
            return Reused(nn.Linear(d, d, bias=draw(st.booleans())))
        case 4:
            return two(draw(st.sampled_from(COMBINE)), lambda: nn.Linear(d, w))
        case 5:
            return Tied(w, d)
        case 6:
            return Pointwise(lambda x, s, b: torch.tanh(x * s) + b, (d,), ())
        case 7:
            return Pointwise(lambda x, a, b: torch.einsum("...i,ij,kj->...k", x, a, b), (d, w), (2, w))
        case _:
            return Pointwise(lambda x, w: x @ (w * w.exp()).t(), (w, d))


@st.composite
def sequence(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    """A stage for [N, t, d]."""
    t, d = shape
    match draw(st.integers(0, 7)):
        case 0:
            return nn.Flatten()
        case 1:
            return Apply(lambda x: x.mean(1))
        case 2:
            return Pointwise(lambda x, w: torch.einsum("ntd,ts->nsd", x, w), (t, draw(width)))
        case 3:
            return Pointwise(lambda x, p: x + p, (t, d))
        case 4:
            return Apply(lambda x: x.transpose(1, 2))
        case 5:
            return nn.Conv1d(t, draw(width), draw(st.integers(1, d)), padding=draw(st.integers(0, 1)))
        case 6:
            return Apply(lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x)
        case _:
            return draw(dense(shape))


@st.composite
def image(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    """A stage for [N, c, h, w]."""
    c, h, w = shape
    match draw(st.integers(0, 6)):
        case 0 | 1 | 2:
            groups = draw(st.sampled_from([g for g in (1, 2, c) if c % g == 0]))
            kernel = draw(st.integers(1, h)), draw(st.integers(1, w))
            stride, padding = (draw(st.integers(1, 2)), draw(st.integers(1, 2))), draw(st.integers(0, 1))
            return nn.Conv2d(c, groups * draw(width), kernel, stride, padding, groups=groups, bias=draw(st.booleans()))
        case 3:
            return nn.Flatten(draw(st.integers(1, 2)))
        case 4:
            return nn.AvgPool2d((min(2, h), 1), stride=1) if draw(st.booleans()) else nn.MaxPool2d((1, min(2, w)))
        case 5:
            return Reused(nn.Conv2d(c, c, 3, padding=1))
        case _:
            return Pointwise(lambda x, s: x * s, (c, 1, 1))


@st.composite
def stages(draw: st.DrawFn, shape: tuple[int, ...]) -> nn.Module:
    if draw(st.integers(0, 3)) == 0:
        return draw(activation())
    return draw({1: dense, 2: sequence, 3: image}[len(shape)](shape))


@st.composite
def problems(draw: st.DrawFn, most: int = 4) -> Drawn:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    batch = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(batch, *shape, dtype=torch.float64)
    layers, hidden = [], x
    for _ in range(draw(st.integers(1, most))):
        layers.append(draw(stages(tuple(hidden.shape[1:]))).double())
        hidden = layers[-1](hidden).detach()
    if draw(st.booleans()) and len(layers) > 1 and hidden.shape == x.shape:
        layers = [Residual(nn.Sequential(*layers))]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden[0].numel(), draw(st.integers(1, 3)))).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    for parameter in list(model.parameters())[:-1]:
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    output = model(x).detach()
    loss, y = draw(losses(output))
    return Drawn(model, loss, x, y)


@st.composite
def losses(draw: st.DrawFn, output: Tensor) -> tuple[nn.Module, Tensor]:
    reduction = draw(st.sampled_from(["mean", "sum"]))
    match draw(st.integers(0, 3)):
        case 0:
            return nn.CrossEntropyLoss(reduction=reduction), torch.randint(output.shape[1], output.shape[:1])
        case 1:
            return nn.BCEWithLogitsLoss(reduction=reduction), torch.rand_like(output)
        case 2:
            return Written(lambda f, y: 3 * ((f - y) ** 4).sum(1).mean()), torch.randn_like(output)
        case _:
            return nn.MSELoss(reduction=reduction), torch.randn_like(output)


def check(drawn: Drawn) -> None:
    program = tn.compile(drawn.model, drawn.loss, (drawn.x, drawn.y), QUANTITIES)
    longer = torch.cat([drawn.x, drawn.x.flip(0)]), torch.cat([drawn.y, drawn.y])
    for x, y in ((drawn.x, drawn.y), longer):
        result = program(x, y)
        torch.testing.assert_close(result.output, drawn.model(x))
        for quantity in QUANTITIES:
            want = getattr(oracle, quantity.name)(drawn.model, drawn.loss, x, y)
            assert list(result[quantity.name]) == list(want)
            for name, expected in want.items():
                got = result[quantity.name][name]
                assert got.shape == expected.shape, f"{quantity.name} of {name}"
                error = (got - expected).abs().max() / expected.abs().max().clamp(min=1.0)
                assert error <= TOLERANCE, f"{quantity.name} of {name}: {error:.3g}\n{program.source}"


ONCE_WRONG: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "squared diagonal": (Pointwise(lambda x, w: x * torch.einsum("ii,ii->", w, w), (3, 3)), (3,)),
    "trace of a square": (Pointwise(lambda x, w: x * torch.einsum("ij,ji->", w, w), (3, 3)), (3,)),
    "diagonal through a function": (Pointwise(lambda x, w: x * w.diagonal().exp(), (3, 3)), (3,)),
    "trace of activations": (Apply(lambda x: torch.einsum("nii->ni", x).tanh()), (3, 3)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("what", ONCE_WRONG)
def test_models_that_were_wrong_once(what: str) -> None:
    torch.manual_seed(0)
    layer, shape = ONCE_WRONG[what]
    x, y = torch.randn(3, *shape, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    check(Drawn(model, nn.MSELoss(), x, y))


@SETTINGS
@given(problems())
def test_random_programs(drawn: Drawn) -> None:
    check(drawn)


@pytest.mark.slow
@settings(SETTINGS, max_examples=300)
@given(problems(most=6))
def test_many_random_programs(drawn: Drawn) -> None:
    check(drawn)
