"""Operators with several outputs: any of them may be used, once or together, and indices are plain values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ...tried import FIRST, GGN, TWICE, Tried, randn

X, IMAGE = randn(4, 3), randn(3, 2, 4, 4)
LINEAR = {"l": partial(nn.Linear, 3, 4)}
CONV = {"l": partial(nn.Conv2d, 2, 2, 1)}
MATRIX, OTHER, EYE = randn(3, 3), randn(3, 3, seed=1), torch.eye(2, dtype=torch.float64)


def definite(h: Tensor) -> Tensor:
    return (lambda m: m @ m.mT + EYE)(h.view(-1, 2, 2))


def picked(name: str, *args: object, **options: object) -> Tried:
    """The values times what their indices pick of another layer's output."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        h = m.l(x)
        values, indices = getattr(torch, name)(h, *args, **options)
        return values * m.k(x).gather(1, indices)

    return Tried(name, function, X, {**LINEAR, "k": partial(nn.Linear, 3, 4)}, TWICE)


INDEXED = [
    picked("topk", 2, 1), picked("sort", 1), picked("sort", 1, True), picked("cummax", 1), picked("cummin", 1),
    *(picked(name, 1, keepdim=True) for name in ("max", "min", "median", "nanmedian", "mode")),
    picked("kthvalue", 2, 1, keepdim=True),
    Tried("indices alone", lambda m, x: (lambda h: h.gather(1, h.topk(2, 1).indices))(m.l(x)), X, LINEAR, TWICE),
    Tried("unpooled", lambda m, x: F.max_unpool2d(*F.max_pool2d(m.l(x), 2, return_indices=True), 2).flatten(1),
          IMAGE, CONV),
    Tried("adaptive", lambda m, x: torch.mul(*F.adaptive_max_pool2d(m.l(x), 2, return_indices=True)).flatten(1),
          IMAGE, CONV),
    Tried("of a parameter", lambda m, x: x @ torch.mul(*m.a.topk(2, 1)), X, {"a": MATRIX}, TWICE),
    Tried("cummax of a parameter", lambda m, x: x @ (m.a.cummax(0)[0] * m.b), X, {"a": MATRIX, "b": OTHER}, TWICE),
]  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("tried", INDEXED, ids=str)
def test_indices(tried: Tried) -> None:
    tried.check()


def both(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in tensors], 1)


def of_matrices(name: str, function: object, *, quantities: tuple[str, ...] = FIRST) -> Tried:
    return Tried(name, lambda m, x: function(definite(m.l(x))), X, LINEAR, quantities)


PARTS = [
    of_matrices("eigh", lambda a: (lambda e: both((e[0], e[1].square())))(torch.linalg.eigh(a))),
    of_matrices("svd", lambda a: (lambda u, s, v: both((u.square(), s, v.square())))(*torch.linalg.svd(a))),
    of_matrices("qr", lambda a: both(torch.linalg.qr(a))),
    of_matrices("R of qr", lambda a: torch.linalg.qr(a)[1].flatten(1), quantities=GGN),
    of_matrices("lu", lambda a: both(torch.linalg.lu(a)[1:])),
    of_matrices("slogdet", lambda a: torch.linalg.slogdet(a)[1][:, None], quantities=GGN),
    Tried("slogdet and its sign", lambda m, x: torch.mul(*torch.slogdet(m.l(x).view(-1, 2, 2)))[:, None], X, LINEAR),
    Tried("slogdet of a parameter", lambda m, x: x * torch.slogdet(m.a)[1], X, {"a": MATRIX}),
    Tried("svd of a parameter", lambda m, x: x @ torch.linalg.svd(m.a)[1].diag(), X, {"a": MATRIX}),
    Tried("Q of qr of a parameter", lambda m, x: x @ torch.linalg.qr(m.a)[0], X, {"a": MATRIX}),
    Tried("layer norm with its mean",
          lambda m, x: torch.mul(*torch.native_layer_norm(m.l(x), [4], None, None, 0.1)[:2]), X, LINEAR),
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("tried", PARTS, ids=str)
def test_outputs_by_torch_func(tried: Tried) -> None:
    tried.check()


GRIDS = {"a": randn(2), "b": randn(3, seed=1)}
MADE = [
    Tried("aminmax", lambda m, x: torch.mul(*torch.aminmax(m.l(x), dim=1, keepdim=True)), X, LINEAR, TWICE,
          plain=lambda m, x: (lambda h: h.amin(1, True) * h.amax(1, True))(m.l(x))),  # torch 2.7 has no derivative
    Tried("var_mean", lambda m, x: torch.mul(*torch.var_mean(m.l(x), 1, keepdim=True)), X, LINEAR, TWICE),
    Tried("meshgrid", lambda m, x: x * torch.meshgrid(m.a, m.b, indexing="ij")[1], randn(4, 2, 3), GRIDS, TWICE),
    Tried("meshgrid xy", lambda m, x: x * torch.mul(*torch.meshgrid(m.a, m.b, indexing="xy")),
          randn(4, 3, 2), GRIDS, TWICE),
    Tried("hsplit", lambda m, x: torch.mul(*torch.hsplit(m.l(x), 2)), X, LINEAR, TWICE),
    Tried("dsplit", lambda m, x: torch.mul(*torch.dsplit(m.l(x).view(-1, 2, 2), 2)).flatten(1), X, LINEAR, TWICE),
    Tried("vsplit of a parameter", lambda m, x: x @ torch.mul(*torch.vsplit(m.a, 2)).T, X, {"a": randn(4, 3)}, TWICE),
    Tried("atleast_2d", lambda m, x: torch.mul(*torch.atleast_2d(m.l(x), m.a)), X, {**LINEAR, "a": randn(4)}, TWICE),
]  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("tried", MADE, ids=str)
def test_outputs_of_operators_that_are_others(tried: Tried) -> None:
    tried.check()


def test_one_call_for_all_outputs() -> None:
    """In the forward; the VJP of each output that is used is one of its own."""
    tried = PARTS[0]
    assert tried.program().source.split("return")[0].count("torch.ops.aten.linalg_eigh.default(") == 1 + 2


def test_an_output_without_a_spelling() -> None:
    """The mask of a dropout would be that of another draw."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        return torch.mul(*torch.ops.aten.native_dropout.default(m.l(x), 0.5, True))

    with pytest.raises(tn.UnsupportedError, match="output 1 is used: only the first"):
        Tried("dropout", function, X, LINEAR, FIRST).program()
