"""Terms of one use of a parameter: their sum is separated, however the formula is spelt; what has no data is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnbackprop as tn

from .. import oracle_second
from ..capturing import Function
from ..second_order import TOLERANCE, error

LOSS = nn.CrossEntropyLoss()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, input: Tensor) -> Tensor:
        return self.weight * (input + input.sin())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input - 2 * input.sin(), self.weight)


SPELT = {
    Scaled: (
        """h[n, i] = input[n, i] + sin(input[n, i])
           output[n, i] = weight[i] * h[n, i]""",
        "output[n, i] = weight[i] * input[n, i] + weight[i] * sin(input[n, i])",
    ),
    Mixed: (
        """h[n, i] = input[n, i] - 2 * sin(input[n, i])
           output[n, o] = weight[o, i] * h[n, i]""",
        "output[n, o] = weight[o, i] * input[n, i] - 2 * weight[o, i] * sin(input[n, i])",
    ),
}


def data(model: nn.Module, size: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.randn_like(model(x)).softmax(1)


def factors(model: nn.Module, x: Tensor, y: Tensor, quantity: tn.Quantity, rules: Any = None) -> dict[str, Any]:
    return dict(tn.compile(model, LOSS, (x, y), [quantity], rules=rules)(x, y, seed=0)[quantity.name])


def spelt(layer: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), layer()).double()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("layer", SPELT)
@pytest.mark.parametrize(
    "quantity", [tn.KFLR(), tn.KFAC(), tn.KFRA(), tn.KFLR(sharing=tn.Sharing.REDUCE), tn.KFLR(bias=tn.Bias.JOINED)]
)
def test_the_spelling_is_no_matter(layer: type[nn.Module], quantity: tn.Quantity) -> None:
    model = spelt(layer)
    x, y = data(model)
    one, two = (factors(model, x, y, quantity, tn.RULES | {layer: tn.Rule(text)}) for text in SPELT[layer])
    for name, K in one.items():
        assert len(K.factors) == len(two[name].factors)
        assert error(two[name].to_dense(), K.to_dense()) <= TOLERANCE, name


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layer", SPELT)
def test_their_sum_is_right(layer: type[nn.Module]) -> None:
    model = spelt(layer)
    x, y = data(model)
    rules = tn.RULES | {layer: tn.Rule(SPELT[layer][1])}
    tn.verify(model, x, y, loss=LOSS, quantities=[tn.KFLR(), tn.KFRA()], rules=rules)


def with_parameters(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    w, a, b = (nn.Parameter(torch.randn(*sizes)) for sizes in ((2, 3), (3,), (3,)))
    return Function(forward, w=w, a=a, b=b).double()


def swish(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w * m.w.sigmoid())


def centred(m: Any, x: Tensor) -> Tensor:
    return torch.lerp(x, m.a.expand(3), m.b.sigmoid()) @ m.w.T


@pytest.mark.parametrize("forward", [swish, centred])
def test_one_sample_is_the_block(forward: Callable[..., Any]) -> None:
    """Without a second sample nothing is independent of anything; the terms' mixed products are there."""
    model = with_parameters(forward)
    x, y = data(model, 1)
    blocks = oracle_second.ggn(model, LOSS, x, y)
    for name, K in factors(model, x, y, tn.KFLR()).items():
        got, want = K.to_dense(), blocks[name]
        assert error(got.diagonal(), want.diagonal()) <= TOLERANCE, name
    tn.verify(model, x, y, loss=LOSS, quantities=[tn.KFLR()])


FREE: dict[str, Callable[..., Any]] = {
    "exp": lambda m, x: F.linear(x, m.w) + m.a[:2].exp(),
    "low rank": lambda m, x: F.linear(x, m.w) + m.w @ m.a,
    "two paths": lambda m, x: F.linear(x, m.w) + m.a[:2].exp() * m.a[1:].sigmoid(),
    "positions": lambda m, x: (x[..., None] + m.w.T.exp() * m.b[:2].tanh()).flatten(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("forward", FREE.values(), ids=FREE)
def test_what_has_no_data_is_the_block_itself(forward: Callable[..., Any]) -> None:
    """A value of parameters alone is the same for every sample: its block is exact, in one factor."""
    model = with_parameters(forward)
    x, y = data(model)
    found, blocks = factors(model, x, y, tn.KFLR()), oracle_second.ggn(model, LOSS, x, y)
    exact = [name for name, K in found.items() if error(K.to_dense(), blocks[name]) <= TOLERANCE]
    assert set(exact) >= ({"w", "b"} if "flatten" in forward.__code__.co_names else {"a"})
    tn.verify(model, x, y, loss=LOSS, quantities=[tn.KFLR(), tn.KFRA()])
