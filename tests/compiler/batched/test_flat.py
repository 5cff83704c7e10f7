"""Rows of all samples that stand in a row: by idx + n·arange(N), or every s-th, they are of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import InputError

from ...capturing import Function
from ...oracle_second import diag_ggn
from ...rehearsing import batch, check, layers, refused

Forward = Callable[..., Tensor]


def rows(h: Tensor) -> Tensor:
    """[N, 3] as three rows of two features in each sample."""
    return torch.stack([h, h.square()], 2)


def chosen(x: Tensor) -> Tensor:
    """Other rows for each sample."""
    return x.argsort(1)


def neighbours(m: Any, x: Tensor) -> Tensor:
    """As graph convolutions of point clouds gather them."""
    h, size = rows(m.a(x)), len(x)
    near = torch.cdist(h.detach(), h.detach()).topk(2, -1)[1]
    flat = (near + torch.arange(0, size).view(-1, 1, 1) * 3).view(-1)
    return m.b(h.reshape(size * 3, 2)[flat, :].view(size, 3, 2, 2).amax(2).sum(2))


def by_a_step(m: Any, x: Tensor) -> Tensor:
    base = torch.arange(0, 3 * len(x), 3)
    return m.b(rows(m.a(x)).flatten(0, 1).index_select(0, (base[:, None] + chosen(x)).flatten()).view(-1, 3, 2).sum(2))


def the_same_of_each(m: Any, x: Tensor) -> Tensor:
    flat = torch.tensor([2, 0]) + 3 * torch.arange(len(x))[:, None]
    return m.b(m.a(x)) * rows(m.a(x)).flatten(0, 1)[flat].sum((1, 2))[:, None]


def the_first(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(len(x)) * 3][:, None]


def the_second(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(len(x)) * 3 + 1][:, None]


def every_other(m: Any, x: Tensor) -> Tensor:
    h = torch.cat([m.a(x), m.b(x)[:, :1].sin()], 1).reshape(-1)
    even, odd = torch.arange(0, 4 * len(x), 2), torch.arange(1, 4 * len(x), 2)
    return m.b(m.a(x)) * (h[even] * h[odd].tanh()).view(-1, 2).sum(1)[:, None]


def one_in_three(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(1, 3 * len(x), 3)][:, None]


def taken(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * m.a(x).take(torch.arange(len(x)) * 3 + x.argmax(1))[:, None]


def entries(m: Any, x: Tensor) -> Tensor:
    flat = (chosen(x) + torch.arange(len(x))[:, None] * 3).view(-1, 1).expand(-1, 2)
    return m.b(rows(m.a(x)).view(-1, 2).gather(0, flat).view(-1, 3, 2).sum(2))


def pooled(m: Any, x: Tensor) -> Tensor:
    """The sums of rows by their group."""
    h = rows(m.a(x)).view(-1, 2)
    flat = (chosen(x) % 2 + torch.arange(len(x))[:, None] * 4).view(-1)
    return m.b(torch.zeros(4 * len(x), 2, dtype=h.dtype).index_add(0, flat, h, alpha=2).view(-1, 4, 2)[:, :3].sum(2))


def scattered(m: Any, x: Tensor) -> Tensor:
    h = rows(m.a(x)).view(-1, 2)
    flat = (chosen(x) % 2 + torch.arange(len(x))[:, None] * 3).view(-1, 1).expand_as(h)
    return m.b(torch.zeros_like(h).scatter_add(0, flat, h).view(-1, 3, 2).sum(2))


def reduced(m: Any, x: Tensor) -> Tensor:
    """As libraries of graphs do it."""
    h = rows(m.a(x)).view(-1, 2)
    flat = (chosen(x) % 2 + torch.arange(len(x))[:, None] * 3).view(-1, 1).expand_as(h)
    zeros = h.new_zeros(3 * len(x), 2)
    found = sum(zeros.scatter_reduce(0, flat, h, way) for way in ("sum", "mean", "amax"))
    return m.b(torch.as_tensor(found).view(-1, 3, 2).sum(2))


def moved(m: Any, x: Tensor) -> Tensor:
    h = rows(m.a(x)).view(-1, 2)
    flat = (chosen(x) + torch.arange(len(x))[:, None] * 3).view(-1, 1).expand_as(h)
    return m.b(h.square().scatter(0, flat, h).view(-1, 3, 2).sum(2))


def pairs(m: Any, x: Tensor) -> Tensor:
    h = torch.stack([m.a(x), m.b(x)], 1).flatten(0, 1).sigmoid()
    return h[0::2] * h[1::2]


def some_of_six(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).repeat_interleave(6, 0) * torch.arange(1.0, 7).to(x.dtype).repeat(len(x))[:, None]
    return m.b(h[1::3].sigmoid().view(-1, 2, 3)[:, 1])


def of_each_row(m: Any, x: Tensor) -> Tensor:
    """One entry of each of the rows of all samples, as a loss reads its class."""
    h = rows(m.a(x)).flatten(0, 1)
    return m.b(h[torch.arange(h.size(0)), h.argmax(-1)].view(-1, 3))


def all_rows(m: Any, x: Tensor) -> Tensor:
    h = rows(m.a(x)).flatten(0, 1)
    return m.b(h[torch.arange(len(h))].view(-1, 3, 2).sum(2))


def some_of_each_row(m: Any, x: Tensor) -> Tensor:
    h = (rows(m.a(x))[..., None] * m.b(x)[:, None, None]).flatten(0, 1)
    return h[torch.arange(len(h))[:, None], :, h.detach().sum(1).argsort(-1)[:, :2]].flatten(1).view(-1, 3, 4).sum(2)


def written_to_each_row(m: Any, x: Tensor) -> Tensor:
    """As sparse attention writes what it has computed for some queries."""
    h = (rows(m.a(x)).transpose(1, 2)[..., None] * m.b(x)[:, None, None]).flatten(0, 1)
    top, each = h.detach().sum(2).argsort(-1)[:, :2], torch.arange(len(h))[:, None]
    out = h.cumsum(1).clone()
    out[each, top, :] = h[each, top, :].sin()
    return out.view(-1, 2, 3, 3).sum((1, 2))


def one_column(m: Any, x: Tensor) -> Tensor:
    h = rows(m.a(x)).flatten(0, 1)
    h = h.index_put((torch.arange(len(h)), torch.tensor([1])), m.b(x).flatten(), accumulate=True)
    return m.b(h.view(-1, 3, 2).sum(2))


ALL: list[Forward] = [
    of_each_row, all_rows, some_of_each_row, written_to_each_row, one_column,
    neighbours, by_a_step, the_same_of_each, the_first, the_second, taken, entries, pooled, reduced, scattered, moved,
    pairs, some_of_six, every_other, one_in_three,
]  # fmt: skip


@pytest.mark.parametrize("forward", ALL, ids=lambda forward: forward.__name__)
def test_right(forward: Forward) -> None:
    check(Function(forward, **layers()))


@pytest.mark.parametrize("forward", [neighbours, pooled, pairs, written_to_each_row], ids=lambda f: f.__name__)
def test_other_batches_and_curvature(forward: Forward) -> None:
    model, (x, y) = Function(forward, **layers()).double(), batch(4)
    program = tn.compile(model, nn.MSELoss(), (x[:2], y[:2]), [tn.DiagGGN()])
    for size in (1, 2, 4):
        result = program(x[:size], y[:size])["diag_ggn"]
        for name, value in diag_ggn(model, nn.MSELoss(), x[:size], y[:size]).items():
            torch.testing.assert_close(result[name], value)


def elsewhere(offset: Callable[[Tensor], Any]) -> Forward:
    return lambda m, x: m.b(m.a(x).reshape(-1)[offset(x)][:, None] * m.a.bias)


def test_other_samples() -> None:
    """An index into rows of other samples is refused, whatever its size."""
    for offset in (
        lambda x: torch.arange(len(x)),
        lambda x: 2 * torch.arange(len(x)),
        lambda x: torch.arange(3, 3 * len(x) + 3, 3) % (3 * len(x)),
        lambda x: torch.arange(len(x)) + torch.arange(len(x)),
        lambda x: x.argmax(1),
        lambda x: torch.arange(len(x)) * 3 * (x[:, 0] > 0),
        lambda x: torch.arange(3, 3 * len(x) + 3, 3) - 2,
        lambda x: torch.add(torch.arange(len(x)) * 3, -x.argmax(1), alpha=-1),
    ):
        refused(Function(elsewhere(offset), **layers()), "picks samples of .* idx \\+ n \\* torch.arange")
    refused(Function(lambda m, x: m.b(m.a(x))[::2].repeat(2, 1)[: len(x)], **layers()), "cuts the batch")


def test_rows_of_the_sample_in_front() -> None:
    """An index below zero is one of them, and no row from the back of its own sample."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(len(x)) * 3 + x[:, 0].long()][:, None]

    model, (x, y) = Function(forward, **layers()).double(), batch(4)
    x[:, 0] = 1
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchGrad()])
    program(x, y)
    x[2, 0] = -1
    with pytest.raises(InputError, match="index 3 is out of bounds for dimension 1 with size 3"):
        program(x, y)


def test_rows_that_no_sample_has_alike() -> None:
    def by_the_batch(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(0, 3 * len(x), len(x))]

    def by_six(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(0, 3 * len(x), 6)].sum()

    def but_the_first(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) * m.a(x).reshape(-1)[torch.arange(3, 3 * len(x), 3)].sum()

    for forward in by_six, but_the_first:
        refused(Function(forward, **layers()), "arange.* is no multiple of the batch size N")
    refused(Function(by_the_batch, **layers()), "picks samples of .* idx \\+ n \\* torch.arange")
