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
from ..capturing import Function
from ..oracle_second import hessian_diag
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
    "added": lambda m, x: m.a(x).scatter_add(1, order(x), m.b(x)[:, :2]).tanh(),
    "added to some": lambda m, x: (
        m.a(x).unflatten(1, (2, 2)).scatter_add(1, order(x)[:, :1, None] % 2, m.b(x)[:, :1, None]).flatten(1)
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


def put(f: Tensor, values: Tensor, *index: Any, added: bool = False) -> Tensor:
    places = [None if each is ALL else each for each in index]
    return torch.ops.aten.index_put(f, places, values.to(f.dtype), added)


def through(f: Tensor, values: Tensor) -> Tensor:
    made = f.new_zeros(f.shape[0], 2, 4)
    made.transpose(1, 2)[:] = f[:, :, None] * values[:, None, :2]
    return made.reshape(-1, 8)


ALL = slice(None)
PAIRS = (torch.tensor([[1], [3]]), torch.tensor([2, 1, 0]))
APART = (ALL, torch.tensor([0, 1, 0]), ALL, torch.tensor([3, 0, 1]))
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
    "columns": lambda m, x: put(m.a(x), m.b(x)[:, :3].sin(), ALL, torch.tensor([2, 0, 3])).tanh(),
    "columns added": lambda m, x: put(m.a(x), m.b(x)[:, :1], ALL, torch.tensor([2, 0, 2]), added=True).tanh(),
    "a place": lambda m, x: put(m.a(x), m.b(x)[:, 1].sin(), ALL, torch.tensor(2)).tanh(),
    "numbers": lambda m, x: put(pairs(m.a(x)), torch.tensor(float("-inf")), ALL, torch.tensor([1, 3])).amax(1),
    "pairs": lambda m, x: put(pairs(m.a(x)), m.b(x)[:, :1, None].sin(), ALL, *PAIRS).flatten(1),
    "pairs apart": lambda m, x: (
        put(pairs(m.a(x)).unflatten(1, (2, 2)), m.b(x)[:, :3].T[..., None].sin(), *APART).flatten(1)
    ),
    "copied": lambda m, x: m.a(x).index_copy(1, torch.tensor([2, 0]), m.b(x)[:, :2].sin()).tanh(),
    "filled": lambda m, x: m.a(x).index_fill(1, torch.tensor([2, 0]), float("-inf")).softmax(1) * m.b(x),
    "copied in place": lambda m, x: m.a(x).clone().index_copy_(1, torch.tensor([2, 0]), m.b(x)[:, :2].sin()).tanh(),
    "filled in place": lambda m, x: m.a(x).clone().index_fill_(1, torch.tensor([2]), 2.5) * m.b(x),
    "spread": lambda m, x: m.a(x)[at(x)[0][:, None].expand(-1, 2), order(x)] * m.b(x)[:, :2],
    "repeated": lambda m, x: (
        pairs(m.a(x))[at(x)[0].view(-1, 1, 1).repeat(1, 2, 2), order(x)[:, :, None], order(x)[:, None]].flatten(1)
    ),
    "spread in front": lambda m, x: m.a(x)[at(x)[0].expand(2, -1), order(x).T].T * m.b(x)[:, :2],
    "written where it is spread": lambda m, x: (
        put(m.a(x), m.b(x)[:, :2], at(x)[0][:, None].repeat(1, 2), order(x)).tanh()
    ),
    "through a transpose": lambda m, x: through(m.a(x), m.b(x).sin()),
    "filled by a parameter": lambda m, x: m.a(x).index_fill(-1, torch.tensor([2, 0]), m.p[0]) * m.b(x),
    "several of a sample": lambda m, x: put(m.a(x), m.b(x)[:, :2].sin(), at(x)[0][:, None], order(x)).tanh(),
    "some of a sample": lambda m, x: put(pairs(m.a(x)), m.b(x)[:, None], at(x)[0][:, None], order(x)).flatten(1),
    "an entry": lambda m, x: pairs(m.a(x)).index_put((*at(x), at(x, 1)[1]), m.b(x).sum(1)).flatten(1),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", WRITTEN)
def test_places_of_each_sample(name: str) -> None:
    tried(WRITTEN[name], name).check()


INFINITE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scatter": lambda m, x: m.a(x).scatter(1, order(x)[:, :1], float("-inf")).logsumexp(1, keepdim=True),
    "pad": lambda m, x: nn.functional.pad(m.a(x), (2, 1), value=float("-inf")).softmax(1)[:, 1:6] * m.p[0],
    "pad of two axes": lambda m, x: nn.functional.pad(pairs(m.a(x)), (0, 1, -1, 1), value=float("inf")).amin((1, 2)),
}


@pytest.mark.parametrize("name", INFINITE)
def test_infinite_numbers_hide_places(name: str) -> None:
    tried(INFINITE[name], name).check()


CONSTANT = (
    lambda h, x: put(h, torch.tensor(2.0), ALL, torch.tensor([0, 2])),
    lambda h, x: put(h, torch.tensor(2.0), *at(x)),
    lambda h, x: put(h, torch.tensor(2.0), *at(x), added=True),
    lambda h, x: h.index_fill(1, torch.tensor([1, 2]), 0.5),
    lambda h, x: h.scatter(1, order(x), 0.5),
)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("write", CONSTANT)
def test_second_derivatives_where_a_constant_is_written(write: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    written = Function(lambda m, x: m.b(write(m.a(x).tanh(), x) ** 2), a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    x, y, loss = torch.randn(4, 3).double(), torch.randn(4, 2).double(), nn.MSELoss()
    found = tn.compute(written, loss, (x, y), [tn.HessianDiag()])["hessian_diag"]
    for name, value in hessian_diag(written, loss, x, y).items():
        torch.testing.assert_close(found[name], value)


TWICE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scatter": lambda m, x: m.a(x).scatter(1, torch.zeros_like(x[:, :2], dtype=torch.int64), m.b(x)[:, :2]),
    "index": lambda m, x: put(m.a(x), m.b(x)[:, :2], ALL, torch.zeros(2, dtype=torch.int64)),
    "copy": lambda m, x: m.a(x).index_copy(1, torch.zeros(2, dtype=torch.int64), m.b(x)[:, :2]),
    "index of each sample": lambda m, x: put(m.a(x), m.b(x)[:, :2], at(x)[0][:, None], 0 * order(x)),
}


@pytest.mark.parametrize("name", TWICE)
def test_several_to_one_place(name: str) -> None:
    """The one that torch takes has the derivative. (Its autograd gives one to all of them.)"""
    twice = TWICE[name]

    def last(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.b(x)[:, 1:2], m.a(x)[:, 1:]], 1)

    model, y = tried(twice).build()
    want, _ = tried(last).build()
    result = tn.compile(model, MSE, (X, y), [tn.BatchGrad()], check=False)(X, y)["batch_grad"]
    for name, value in oracle.batch_grad(want, MSE, X, y).items():
        torch.testing.assert_close(result[name], value)


BAD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    r"scatter\.value_reduce .* it fails on a sample by itself \(derivative .* not implemented": lambda m, x: (
        m.a(x).scatter(1, order(x), 2.5, reduce="multiply")
    ),
    r"picks samples of .* by add": lambda m, x: m.a(x).take(at(x)[0] * 3 + at(x)[1])[:, None],
    r"(?s)masked_scatter.* in the order of all samples.*Use torch\.where": lambda m, x: (
        m.a(x).masked_scatter(x[:, :1] > -9, m.b(x))
    ),
    r"picks samples of .* by reshape": lambda m, x: m.a(x)[at(x)[0][:, None].expand(-1, 2).reshape(-1)].reshape(-1, 8),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        tried(BAD[message]).program()


@pytest.mark.parametrize("name", ["scatter", "scatter_add"])
def test_a_source_that_is_too_large(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)src .* is larger than index .*Slice src first"):
        tried(lambda m, x: getattr(m.a(x), name)(1, order(x), m.b(x))).program()


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
