"""Elements at computed indices: `scatter` with a tensor and with a number, taken along an axis, copies of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import UnsupportedError

from .. import oracle
from ..tried import Part, Tried, randn

MSE, WIDTH = nn.MSELoss(), 3
X = randn(6, WIDTH, seed=4)


def order(x: Tensor) -> Tensor:
    """Two places of each sample."""
    return x.argsort(-1)[:, :2] + (x[:, :1] > 0)


SCATTERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "replaces": lambda m, x: m.a(x).scatter(1, order(x), m.b(x)[:, :2]),
    "one for a smaller axis": lambda m, x: (
        m.a(x).unflatten(1, (2, 2)).scatter(1, order(x)[:, :1, None] % 2, m.b(x)[:, :1, None]).flatten(1)
    ),
    "a number": lambda m, x: m.a(x).scatter(1, order(x), 2.5) * m.b(x),
    "a parameter": lambda m, x: m.a(x).scatter(1, order(x), m.p.expand(x.shape[0], 2)),
}
SCATTER: dict[str, Part] = {"a": lambda: nn.Linear(WIDTH, 4), "b": lambda: nn.Linear(WIDTH, 4), "p": randn(2, seed=7)}


def tried(function: Callable[[Any, Tensor], Tensor], name: str = "scatter") -> Tried:
    return Tried(name, function, X, SCATTER)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SCATTERED)
def test_scatter(name: str) -> None:
    tried(SCATTERED[name], name).check()


def test_scatter_of_several_to_one_place() -> None:
    """The one that torch takes has the derivative. (Its autograd gives one to all of them.)"""

    def twice(m: Any, x: Tensor) -> Tensor:
        return m.a(x).scatter(1, torch.zeros_like(x[:, :2], dtype=torch.int64), m.b(x)[:, :2])

    def last(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.b(x)[:, 1:2], m.a(x)[:, 1:]], 1)

    model, y = tried(twice).build()
    want, _ = tried(last).build()
    result = tn.compile(model, MSE, (X, y), [tn.BatchGrad()], check=False)(X, y)["batch_grad"]
    for name, value in oracle.batch_grad(want, MSE, X, y).items():
        torch.testing.assert_close(result[name], value)
    with pytest.raises(UnsupportedError, match=r"(?s)src .* is larger than index .*Slice src first"):
        tried(lambda m, x: m.a(x).scatter(1, order(x), m.b(x))).program()


DRAWS = randn(2, 4, seed=8)
COPIED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # several draws for each sample, next to each other or one batch after the other; and rows by index
    "repeat_interleave": lambda m, x: spread(m.a(x).repeat_interleave(2, 0), m).unflatten(0, (-1, 2)).mean(1),
    "repeat": lambda m, x: m.a(x).repeat(2, 1).unflatten(0, (2, -1)).tanh().mul(m.p[:, None, None]).sum(0),
    "take_along_dim": lambda m, x: torch.take_along_dim(m.a(x), order(x), 1) * m.p,
    "take_along_dim of a table": lambda m, x: torch.take_along_dim(m.b(x)[:, :, None], order(x)[:, None] % 1, 2) * m.p,
}


def spread(h: Tensor, m: Any) -> Tensor:
    return (h.unflatten(0, (-1, 2)) + DRAWS * m.p[:, None]).flatten(0, 1).tanh()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", COPIED)
def test_copies_of_a_batch(name: str) -> None:
    tried(COPIED[name], name).check()
