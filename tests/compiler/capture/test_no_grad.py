"""Values made under `torch.no_grad()` that views are written to, or that operators are made of others beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ...capturing import Function
from ...rehearsing import check, layers


def blocked(make: Callable[[Any, Tensor], Any], use: Callable[[Any, Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).clone()
        with torch.no_grad():
            v = make(m, h)
        return use(m, h, v)

    return forward


def column(m: Any, h: Tensor, v: Tensor) -> Tensor:
    v[:, 0] = 0
    return m.b(h) * v


def transposed(m: Any, h: Tensor, v: Tensor) -> Tensor:
    v.t().add_(1)
    return m.b(h) * v


def divided(m: Any, h: Tensor, v: Tensor) -> Tensor:
    v.div_(3)
    return m.b(h) * v.t().t()


def other(m: Any, h: Tensor, v: Tensor) -> Tensor:
    """The value with a derivative is the one that is written to."""
    h[:, 0] = v[:, 1]
    return m.b(h)


def several(m: Any, h: Tensor, v: tuple[Tensor, Tensor]) -> Tensor:
    v[0][:, 1] += v[1][:, 0]
    return m.b(h) * v[0] + v[1]


def padded(m: Any, h: Tensor, v: Tensor) -> Tensor:
    """The block takes a part of what has a derivative."""
    h = m.b(h)
    h[:, 2] = 0
    return h * F.pad(v, (0, 1))


def inside(m: Any, h: Tensor) -> Tensor:
    v = m.b(h).softmax(1)
    v[:, 0] *= 2
    return v


CASES: dict[str, Callable[..., Tensor]] = {
    "column": blocked(lambda m, h: m.b(h), column),
    "transposed": blocked(lambda m, h: 2 * h, transposed),
    "divided": blocked(lambda m, h: m.b(h), divided),
    "other": blocked(lambda m, h: 2 * h[:, :2], other),
    "several": blocked(lambda m, h: (m.b(h), h.sigmoid()), several),
    "a part": blocked(lambda m, h: h[:, :2], padded),
    "inside": blocked(inside, column),
}


@pytest.mark.parametrize("name", CASES)
def test_right(name: str) -> None:
    check(Function(CASES[name], **layers()))
