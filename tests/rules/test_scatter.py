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


def at(x: Tensor, shift: int = 0) -> tuple[Tensor, Tensor]:
    """One place of each sample, as `f[torch.arange(N), label]` writes it."""
    return torch.arange(len(x)), (x.argmax(-1) + shift) % 4


def pairs(f: Tensor) -> Tensor:
    return f[:, :, None] * f[:, None, :]


def margin(m: Any, x: Tensor) -> Tensor:
    f = m.a(x).tanh().clone()
    f[at(x)] -= m.p[0] * f[at(x)].square()
    return f


def row(m: Any, x: Tensor, *index: Any) -> Tensor:
    f = pairs(m.a(x)).clone()
    f[index] = m.b(x).sin()
    return f.flatten(1)


WRITTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a margin": margin,
    "a number": lambda m, x: m.a(x).index_put(at(x), torch.tensor(2.5, dtype=x.dtype)) * m.b(x),
    "hidden": lambda m, x: m.a(x).index_put(at(x), torch.tensor(float("-inf"), dtype=x.dtype)).softmax(1) * m.b(x),
    "a parameter": lambda m, x: m.a(x).index_put(at(x), m.p[0]) * m.b(x),
    "added": lambda m, x: m.a(x).index_put(at(x), m.b(x).sin().sum(1), accumulate=True).tanh(),
    "a number added": lambda m, x: m.a(x).index_put(at(x), torch.ones((), dtype=x.dtype), accumulate=True).tanh(),
    "of zeros": lambda m, x: torch.zeros_like(m.a(x)).index_put(at(x), m.b(x).sum(1)) * m.a(x),
    "a row": lambda m, x: row(m, x, *at(x)),
    "a column": lambda m, x: row(m, x, at(x)[0], slice(None), at(x)[1]),
    "an entry": lambda m, x: pairs(m.a(x)).index_put((*at(x), at(x, 1)[1]), m.b(x).sum(1)).flatten(1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_one_place_of_each_sample(name: str) -> None:
    tried(WRITTEN[name], name).check()


def test_several_places_of_a_sample() -> None:
    def wrong(m: Any, x: Tensor) -> Tensor:
        return m.a(x).index_put((torch.arange(len(x))[:, None], order(x)), m.b(x)[:, :2])

    with pytest.raises(UnsupportedError, match=r"(?s)index_put.* it writes several places of a sample.*Use scatter"):
        tried(wrong).program()


INFINITE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scatter": lambda m, x: m.a(x).scatter(1, order(x)[:, :1], float("-inf")).logsumexp(1, keepdim=True),
    "pad": lambda m, x: nn.functional.pad(m.a(x), (2, 1), value=float("-inf")).softmax(1)[:, 1:6] * m.p[0],
    "pad of two axes": lambda m, x: nn.functional.pad(pairs(m.a(x)), (0, 1, -1, 1), value=float("inf")).amin((1, 2)),
}


@pytest.mark.parametrize("name", INFINITE)
def test_infinite_numbers_hide_places(name: str) -> None:
    tried(INFINITE[name], name).check()


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
