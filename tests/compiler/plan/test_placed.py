"""Cotangents of slices go side by side; values against autograd, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ... import oracle
from ...cases import Case, seq
from ...models import Apply
from ...second_order import assert_equal


def gates(h: Tensor) -> Tensor:
    i, f, g, o = h.chunk(4, -1)
    return i.sigmoid() * g.tanh() + f.sigmoid() * o


def heads(h: Tensor) -> Tensor:
    q, k, v = h.view(-1, 3, 2, 2).unbind(1)
    return (q * k.exp() + v.tanh()).flatten(1)


def uneven(h: Tensor) -> Tensor:
    a, b, c = h.split([3, 4, 5], -1)
    return torch.cat([a.sin() * b[:, 1:], c * c], -1)


def gaps(h: Tensor) -> Tensor:
    return h[:, 2:5].exp() + h[:, 7:10] * h[:, 2:5]


def overlapping(h: Tensor) -> Tensor:
    return h[:, :8].exp() * h[:, 4:] + h[:, 2:10]


def read_whole(h: Tensor) -> Tensor:
    return h.tanh() + nn.functional.pad(h[:, 3:6].exp(), (1, 8))


def two_axes(h: Tensor) -> Tensor:
    h = h.view(-1, 3, 4)
    return h[:, 0].exp() * h[:, 1:, 2:].sum((1, 2)).unsqueeze(1) + h[:, 2, 1:3].tanh().sum(1, keepdim=True)


def strided(h: Tensor) -> Tensor:
    return h[:, ::2].exp() * h[:, 1::2]


SPLITS = (gates, heads, uneven, gaps, overlapping, read_whole, two_axes, strided)
PATTERNS = (strided,)
"""A stride is no block: it keeps its pattern."""


@pytest.mark.thinned(4)
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.__name__)
def test_values(split: Callable[[Tensor], Tensor]) -> None:
    problem = Case(split.__name__, lambda: seq(nn.Linear(5, 12), Apply(split)), (5,)).build()
    arguments = problem.model, problem.loss, problem.x, problem.y
    program = tn.compile(*arguments[:2], arguments[2:], [tn.BatchGrad(), tn.DiagGGN(), tn.HessianDiag()])
    result = program(problem.x, problem.y)
    assert_equal(result["batch_grad"], oracle.batch_grad(*arguments), split.__name__)
    assert ("arange" in gradient(problem)) == (split in PATTERNS)


def gradient(problem: object) -> str:
    arguments = problem.model, problem.loss, (problem.x, problem.y)  # type: ignore[attr-defined]
    return tn.compile(*arguments, [tn.BatchGrad()]).source


def test_a_split_is_one_concatenation() -> None:
    source = gradient(Case("gates", lambda: seq(nn.Linear(5, 12), Apply(gates)), (5,)).build())
    assert source.count("torch.cat(") == 1 and "new_zeros" not in source
