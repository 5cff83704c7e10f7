"""Operators without a rule: tried where they are defined, and of several values and parameters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ...tried import FIRST, GGN, TWICE, Tried, randn

X = randn(4, 3)
LINEAR = {"l": partial(nn.Linear, 3, 4)}
SQUARE = {"l": partial(nn.Linear, 3, 3)}
MATRIX, OTHER, EYE = randn(3, 3), randn(3, 3, seed=1), torch.eye(2, dtype=torch.float64)
LENGTHS = torch.tensor([[2, 2]])


def definite(h: Tensor) -> Tensor:
    return (lambda m: m @ m.mT + EYE)(h.view(-1, 2, 2))


def positive(a: Tensor) -> Tensor:
    return a @ a.T + torch.eye(3, dtype=torch.float64)


def segments(m: nn.Module, x: Tensor) -> Tensor:
    return torch.segment_reduce(m.l(x), "max", lengths=LENGTHS.repeat(x.shape[0], 1), axis=1)


DOMAINS = [
    Tried("cholesky", lambda m, x: torch.linalg.cholesky(definite(m.l(x))).flatten(1), X, LINEAR),
    Tried("cholesky of a parameter", lambda m, x: x @ torch.linalg.cholesky(positive(m.a)), X, {"a": MATRIX}),
    Tried("cholesky_ex", lambda m, x: torch.linalg.cholesky_ex(definite(m.l(x)))[0].flatten(1), X, LINEAR),
    Tried("cholesky_inverse", lambda m, x: torch.cholesky_inverse(torch.linalg.cholesky(definite(m.l(x)))).flatten(1),
          X, LINEAR, FIRST),
    Tried("cholesky_solve",
          lambda m, x: torch.cholesky_solve(m.l(x)[..., None], torch.linalg.cholesky(positive(m.a)))[..., 0],
          X, {**SQUARE, "a": MATRIX}, FIRST),
    Tried("logdet", lambda m, x: torch.logdet(definite(m.l(x)))[:, None], X, LINEAR),
    Tried("logdet of a parameter", lambda m, x: x * torch.logdet(positive(m.a)), X, {"a": MATRIX}),
    Tried("segment_reduce", segments, X, LINEAR, FIRST),
    Tried("mvlgamma", lambda m, x: torch.mvlgamma(m.l(x).exp() + 0.5, 2), X, LINEAR),
    Tried("zeta", lambda m, x: torch.special.zeta(torch.full((4,), 2.0), m.l(x).exp() + 1), X, LINEAR, FIRST),
    Tried("solve", lambda m, x: torch.linalg.solve(m.a, m.l(x)[..., None])[..., 0],
          X, {**SQUARE, "a": MATRIX}),
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("tried", DOMAINS, ids=str)
def test_in_its_domain(tried: Tried) -> None:
    assert "no rule: VJPs by torch.func" in tried.check().explain("bind")


@pytest.mark.parametrize("samples", [1, 2])
def test_few_samples(samples: int) -> None:
    """The one sample is scaled to see what changes, and still in the domain."""
    tried = DOMAINS[0]
    model, y = tried.build()
    program = tn.compile(model, tried.loss, (X[:samples], y[:samples]), [tn.BatchGrad()])
    got = program(X, y)["batch_grad"]["l.weight"]
    want = tried.program()(X, y)["batch_grad"]["l.weight"]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.library.custom_op("tnbackprop_tests::normed", mutates_args=())
def normed(x: Tensor) -> Tensor:
    if (x.norm(dim=1) - 1).abs().max() > 1e-6:
        raise RuntimeError("rows must have norm one")
    return x.clone()


@normed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_a_domain_that_one_sample_leaves() -> None:
    """Scaled, it is outside: whether it mixes samples cannot be seen, so it is refused."""
    model = Tried("normed", lambda m, x: normed(nn.functional.normalize(m.l(x))), X, LINEAR).build()[0]
    with pytest.raises(tn.UnsupportedError, match=r"on one that is scaled .rows must have norm one"):
        tn.compile(model, nn.MSELoss(), (X[:1], randn(1, 4)), [tn.Grad()])


def test_what_draws_is_not_said_to_mix() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.RReLU())
    with pytest.raises(tn.UnsupportedError, match=r"module '1' \(RReLU\) has no rule, .*it draws random numbers"):
        tn.compile(model, nn.MSELoss(), (X.float(), randn(4, 4).float()), [tn.Grad()])


class Twice(nn.Module):
    """A primitive and a module with a rule before an operator without one: the trial runs them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tn.einsum_layer("output[n, o] = w[o, i] * input[n, i]", w=(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(doubled(self.first(x)))


@tn.primitive
def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_rules_before_it() -> None:
    rules = tn.RULES | {doubled: lambda call: "output[...] = 2 * x[...]"}
    options = {"rules": rules}
    Tried("after a rule", lambda m, x: m.l(x), X, {"l": Twice}, GGN, options=options).check()


PAIR = {**LINEAR, "k": partial(nn.Linear, 3, 4)}
BOTH = {**SQUARE, "k": partial(nn.Linear, 3, 3)}
SMALL = randn(2, 2)
SEVERAL = [
    Tried("kron", lambda m, x: x @ torch.kron(m.a, m.b), randn(4, 4), {"a": SMALL, "b": SMALL + 1}, TWICE),
    Tried("logaddexp", lambda m, x: torch.logaddexp(m.l(x), m.b), X, {**LINEAR, "b": randn(4)}, TWICE),
    Tried("logaddexp of parameters", lambda m, x: x @ torch.logaddexp(m.a, m.b), X, {"a": MATRIX, "b": OTHER}, TWICE),
    Tried("hypot", lambda m, x: torch.hypot(m.l(x), m.b), X, {**LINEAR, "b": randn(4)}, TWICE),
    Tried("cross", lambda m, x: torch.linalg.cross(m.l(x), m.a.expand_as(x)), X, {**SQUARE, "a": randn(3)}, TWICE),
    Tried("old cross", lambda m, x: torch.cross(m.l(x), m.k(x), dim=1), X, BOTH, TWICE),
    Tried("cdist", lambda m, x: torch.cdist(m.l(x), m.b), X, {"l": partial(nn.Linear, 3, 2), "b": randn(5, 2, seed=1)}),
    Tried("cdist of parameters", lambda m, x: x @ torch.cdist(m.a, m.b), X, {"a": MATRIX, "b": OTHER}),
    Tried("multi_dot", lambda m, x: torch.linalg.multi_dot([x, m.a, m.b, m.a]), X, {"a": MATRIX, "b": OTHER}, TWICE),
    Tried("block_diag", lambda m, x: x @ torch.block_diag(m.a, m.b), randn(4, 5), {"a": SMALL, "b": MATRIX}, TWICE),
    Tried("diag_embed", lambda m, x: torch.diag_embed(m.l(x), -1).tanh().flatten(1), X, LINEAR, TWICE),
    Tried("diag_embed on other axes", lambda m, x: x @ torch.diag_embed(m.a, 1, 2, 0).sum(1),
          X, {"a": randn(3, 2)}, TWICE),
    Tried("trapezoid", lambda m, x: torch.trapezoid(m.l(x), dim=1)[:, None] ** 2, X, LINEAR, TWICE),
    Tried("matrix_power", lambda m, x: torch.linalg.matrix_power(m.l(x).view(-1, 2, 2), 3).flatten(1),
          X, LINEAR, TWICE),
    Tried("atan2", lambda m, x: torch.atan2(m.l(x), m.k(x)), X, PAIR),
    Tried("solve of parameters", lambda m, x: x @ torch.linalg.solve(m.a, m.b), X, {"a": MATRIX, "b": OTHER}),
    Tried("solve_triangular",
          lambda m, x: torch.linalg.solve_triangular(m.a.tril(), m.l(x)[..., None], upper=False)[..., 0],
          X, {**SQUARE, "a": MATRIX}),
    Tried("solve of columns", lambda m, x: torch.linalg.solve(m.a, m.l(x).T).T, X, {**SQUARE, "a": MATRIX}),
]  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("tried", SEVERAL, ids=str)
def test_several_operands(tried: Tried) -> None:
    tried.check()


VIEWS = [
    Tried(name, lambda m, x, name=name: x @ getattr(m.a, name), X, {"a": randn(2, 3)}, TWICE)
    for name in ("mT", "mH", "H", "T")
] + [
    Tried("adjoint", lambda m, x: (lambda h: (h.adjoint() @ h).flatten(1))(m.l(x).view(-1, 2, 2)), X, LINEAR, TWICE),
    Tried("moveaxis", lambda m, x: (lambda h: (torch.moveaxis(h, 1, 2) @ h).flatten(1))(m.l(x).view(-1, 2, 2)),
          X, LINEAR, TWICE),
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("tried", VIEWS, ids=str)
def test_transposed(tried: Tried) -> None:
    assert "by torch.func" not in tried.check().explain("bind")


EMPTY = [
    Tried("of one axis", lambda m, x: (lambda h: torch.cat([h.new_zeros(0), h], -1) ** 2)(m.l(x)), X, LINEAR, TWICE),
    Tried("two of them", lambda m, x: (lambda h: torch.cat([h, h.new_zeros(0), h.new_zeros(0)], 1))(m.l(x)), X, LINEAR),
    Tried("slices", lambda m, x: (lambda h: torch.cat([h[:, :0], h, h[:, 2:2]], 1) ** 2)(m.l(x)), X, LINEAR, TWICE),
    Tried("a parameter", lambda m, x: m.l(x) + torch.cat([m.e, m.a]), X, {**LINEAR, "e": randn(0), "a": randn(4)}),
    Tried("stacked", lambda m, x: (lambda h: torch.cat([torch.stack([h[:, :0]] * 2, 1).flatten(1), h], 1))(m.l(x)),
          X, LINEAR),
    Tried("summed", lambda m, x: m.l(x) + m.l(x)[:, :0].sum(1, keepdim=True), X, LINEAR),
]  # fmt: skip


@pytest.mark.parametrize("tried", EMPTY, ids=str)
def test_empty_tensors(tried: Tried) -> None:
    tried.check()
