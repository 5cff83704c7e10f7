"""HesScale and BL89 against their recursion, layer by layer with torch.func; laws and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn import functional as F

import tnbackprop as tn

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..models import Apply
from ..second_order import DIFFERENT, assert_equal, error, run

BY_NAME = {case.name: case for case in CASES}
# The diagonal Hessian of MSE is exact one layer further back.
LAST = {
    "cnn": ("6.",),
    "residual": ("1.", "0.body.2."),
    "layer_norm": ("2.", "1."),
    "cross_entropy_positions": ("0.",),
}


def chain(activation: Callable[[], nn.Module], loss: Callable[[], nn.Module] = nn.CrossEntropyLoss) -> Case:
    layers = lambda: seq(  # noqa: E731
        nn.Conv2d(2, 3, 2, stride=2, dilation=2, padding=1), activation(), nn.Conv2d(3, 2, 3, padding=1),
        nn.MaxPool2d(2), activation(), nn.Flatten(), nn.Linear(2, 4), activation(), nn.Linear(4, 3),
    )  # fmt: skip
    return Case("chain", layers, (2, 4, 4), classes(3) if loss is nn.CrossEntropyLoss else normal, loss, batch=3)


def recursion(problem: Problem, at_output: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """[N, *p]: h_in = (J∘J)ᵀ h + diag ∂²(g·layer)/∂in², from h at the output back through the layers of a chain."""
    found: dict[str, list[Tensor]] = {}
    layers = list(problem.model.named_children())
    values = [problem.x]
    for _, layer in layers:
        values.append(layer(values[-1]).detach())
    G = grad(lambda f: problem.loss(f, problem.y))(values[-1])
    H = at_output(values[-1], problem.y)
    for n in range(len(problem.x)):
        g, h = G[n : n + 1], H[n : n + 1]
        for (name, layer), value in zip(reversed(layers), reversed(values[:-1]), strict=True):
            u = value[n : n + 1]
            for key, p in layer.named_parameters():
                by_parameter = partial(with_parameter, layer, u, key)
                found.setdefault(f"{name}.{key}", []).append(through(by_parameter, p.detach(), g, h))
            g, h = torch.autograd.functional.vjp(layer, u, g)[1], through(layer, u, g, h)
    order = [key for key, _ in problem.model.named_parameters()]
    return {key: torch.stack(found[key]) for key in order}


def with_parameter(layer: nn.Module, u: Tensor, name: str, value: Tensor) -> Tensor:
    return functional_call(layer, {name: value}, (u,))


def through(layer: Callable[[Tensor], Tensor], u: Tensor, g: Tensor, h: Tensor) -> Tensor:
    J = jacrev(layer)(u).reshape(g.numel(), u.numel())
    R = hessian(lambda v: (layer(v) * g).sum())(u).reshape(u.numel(), u.numel())
    return ((J * J).T @ h.reshape(-1) + R.diagonal()).reshape(u.shape).detach()


def exact(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: torch.stack(
        [H.diagonal() for H in oracle_second.loss_hessians(loss, f, y, len(f))]
    ).reshape(f.shape)


def of_own_logit(f: Tensor, y: Tensor) -> Tensor:
    """-log p of the label, with p = exp(logit - c) / (exp(logit - c) + rest), the rest held: t p (1 - p) / N."""
    rest = torch.logsumexp(f.unsqueeze(1).masked_fill(torch.eye(f.shape[1], dtype=torch.bool), -torch.inf), -1)
    alone = lambda a: -torch.log_softmax(torch.stack([a, rest], -1), -1)[..., 0]  # noqa: E731
    second = grad(lambda a: grad(lambda b: alone(b).sum())(a).sum())(f)
    return second * F.one_hot(y, f.shape[1]) / len(f)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
def test_hesscale(activation: Callable[[], nn.Module], loss: Callable[[], nn.Module]) -> None:
    """Also strides, dilations, padding and pooling: two windows on one image agree where they differ in one leg."""
    problem = chain(activation, loss).build()
    want = recursion(problem, exact(problem.loss))
    assert_equal(run(problem, "HesScale", per_sample=True), want, "per sample")
    assert_equal(run(problem, "HesScale"), {name: h.sum(0) for name, h in want.items()}, "hesscale")


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_bl89(activation: Callable[[], nn.Module]) -> None:
    problem = chain(activation).build()
    want = recursion(problem, of_own_logit)
    assert_equal(run(problem, "BL89", per_sample=True), want, "per sample")
    found, other = run(problem, "BL89"), run(problem, "HesScale")
    assert_equal(found, {name: h.sum(0) for name, h in want.items()}, "bl89")
    assert all(error(found[name], value) > DIFFERENT for name, value in other.items())


def test_without_a_softmax_they_are_one() -> None:
    problem = chain(nn.Tanh, nn.MSELoss).build()
    assert_equal(run(problem, "BL89"), dict(run(problem, "HesScale")), "MSE")


@pytest.mark.parametrize("name", LAST)
def test_exact_on_the_last_layer(name: str) -> None:
    """And on none before it."""
    problem = BY_NAME[name].build()
    found = run(problem, "HesScale")
    want = oracle_second.hessian_diag(problem.model, problem.loss, problem.x, problem.y)
    for key, value in want.items():
        if key.startswith(LAST[name]):
            assert error(found[key], value) <= 1e-9, key
        else:
            assert error(found[key], value) > DIFFERENT, key


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["attention", "tied_transposed", "weight_normalized", "layer_norm", "position_table"])
def test_any_graph(name: str) -> None:
    """Products of values, ties and norms have their recursion line by line; samples sum to the total."""
    problem = BY_NAME[name].build()
    each, total = run(problem, "HesScale", per_sample=True), run(problem, "HesScale")
    assert_equal(total, {key: value.sum(0) for key, value in each.items()}, name)
    assert all(torch.isfinite(value).all() and float(value.abs().max()) > 0 for value in total.values())


@pytest.mark.slow
def test_with_other_quantities() -> None:
    problem = chain(nn.Sigmoid).build()
    quantities = [tn.HesScale(), tn.BL89(), tn.Grad(), tn.DiagGGN(), tn.HessianDiag(), tn.KFLR()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    for kind in ("HesScale", "BL89", "DiagGGN", "HessianDiag"):
        name = {"HesScale": "hesscale", "BL89": "bl89", "DiagGGN": "diag_ggn", "HessianDiag": "hessian_diag"}[kind]
        assert_equal(result[name], dict(run(problem, kind)), name)


def test_one_column_of_curvature() -> None:
    """Two classes: the root has one column."""
    problem = Case("two", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), classes(2),
                   nn.CrossEntropyLoss).build()  # fmt: skip
    want = recursion(problem, exact(problem.loss))
    assert_equal(run(problem, "HesScale", per_sample=True), want, "two classes")


def test_a_layer_without_a_rule_is_refused() -> None:
    problem = Case("no_rule", lambda: seq(nn.Linear(3, 3), Apply(torch.special.i0e), nn.Linear(3, 2))).build()
    with pytest.raises(tn.UnsupportedError, match="has no rule, and only its VJP is known"):
        run(replace(problem), "HesScale")
