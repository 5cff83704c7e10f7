"""The Hessian's diagonal: every case of `cases.py` against `oracle_second.py`, laws, edges, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.program import cost

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..models import Apply, Written
from ..second_order import DIFFERENT, IMPRECISE, assert_equal, error, run

BY_NAME = {case.name: case for case in CASES}
PER_SAMPLE = (
    "cnn", "attention", "residual", "layer_norm", "reused_module", "weight_normalized", "merged_output", "mlp_sum",
)  # fmt: skip


def want(problem: Problem) -> oracle_second.Values:
    return oracle_second.hessian_diag(problem.model, problem.loss, problem.x, problem.y)


@pytest.mark.thinned(15)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in IMPRECISE], ids=str)
def test_diagonal(case: Case) -> None:
    """Second derivatives of activations, softmax, norms; products of values, branches, parameters used twice."""
    problem = case.build()
    assert_equal(run(problem, "HessianDiag"), want(problem), "hessian_diag")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_per_sample(name: str) -> None:
    """Each sample's share, also with first-order quantities and the GGN in the same program."""
    problem = BY_NAME[name].build()
    quantities = [tn.HessianDiag(per_sample=True), tn.BatchGrad(), tn.DiagGGN(), tn.HessianDiag(name="total")]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    each = oracle_second.hessian_diag_per_sample(problem.model, problem.loss, problem.x, problem.y)
    assert_equal(result["hessian_diag"], each, "per sample")
    assert_equal(result["total"], want(problem), "total")
    assert_equal(result["total"], {name: h.sum(0) for name, h in each.items()}, "sum over samples")
    ggn = oracle_second.diag_ggn(problem.model, problem.loss, problem.x, problem.y)
    assert_equal(result["diag_ggn"], ggn, "the GGN beside it")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["cnn", "attention", "reused_module", "cross_entropy_positions"])
def test_columns_in_rounds(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One column at a time, two at a time, and rounds that must be filled up give what all at once give."""
    problem = BY_NAME[name].build()
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    monkeypatch.setattr(search, "WIDER", ())
    quantities = [tn.HessianDiag(), tn.SqrtGGN(), tn.KFLR(), tn.DiagGGN(per_sample=True), tn.SqrtGGNMC(mc_samples=5)]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    assert re.search(r"for (column|draw)_\d", program.source)
    result = program(problem.x, problem.y, seed=3)
    assert_equal(result["hessian_diag"], want(problem), "hessian_diag")
    monkeypatch.undo()
    for quantity in quantities[1:]:
        alone = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [quantity])
        values = alone(problem.x, problem.y, seed=3)[quantity.name]
        for parameter, value in values.items():
            pairs = [(result[quantity.name][parameter], value)]
            if isinstance(value, tn.KroneckerFactors):
                pairs = list(zip(result[quantity.name][parameter].factors, value.factors, strict=True))
            assert all(error(got, expected) <= 1e-9 for got, expected in pairs), (quantity.name, parameter)


# Laws.


def mlp(activation: Callable[[], nn.Module]) -> Case:
    model = lambda: seq(nn.Linear(3, 4), activation(), nn.Linear(4, 4), activation(), nn.Linear(4, 3))  # noqa: E731
    return Case("mlp", model, (3,), classes(3), nn.CrossEntropyLoss, batch=4)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("activation, equal", [(nn.ReLU, True), (nn.LeakyReLU, True), (nn.Tanh, False)])
def test_piecewise_linear_nets_have_only_the_ggn(activation: Callable[[], nn.Module], equal: bool) -> None:
    problem = mlp(activation).build()
    hessian, ggn = run(problem, "HessianDiag"), run(problem, "DiagGGN")
    last = list(hessian)[-2:]
    for name, value in hessian.items():
        if equal or name in last:
            assert error(value, ggn[name]) <= 1e-12, name
        else:
            assert error(value, ggn[name]) > DIFFERENT, name


def test_loss_times_a_constant() -> None:
    plain, scaled = (
        replace(mlp(nn.Tanh), y=normal, loss=lambda c=c: Written(lambda f, y: c * F.mse_loss(f, y))).build()
        for c in (1.0, -2.5)
    )
    before = run(plain, "HessianDiag")
    assert_equal(run(scaled, "HessianDiag"), {name: -2.5 * value for name, value in before.items()}, "c L")


@pytest.mark.slow
@pytest.mark.parametrize("reduction, factor", [("mean", 1.0), ("sum", 2.0)])
def test_duplicated_data(reduction: str, factor: float) -> None:
    problem = replace(mlp(nn.Sigmoid), loss=lambda: nn.CrossEntropyLoss(reduction=reduction)).build()
    twice = replace(problem, x=torch.cat([problem.x] * 2), y=torch.cat([problem.y] * 2))
    once = run(problem, "HessianDiag")
    assert_equal(run(twice, "HessianDiag"), {name: factor * value for name, value in once.items()}, reduction)


class Exponential(nn.Module):
    """x exp(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return input * input.exp()


@pytest.mark.parametrize("jacobian", ["output[n, i] + exp(input[n, i])", "output[n, i] * (1 + 1 / input[n, i])"])
def test_declared_jacobians(jacobian: str) -> None:
    """One that reads the line's own value beside its operand varies by both."""
    declared = tn.Rule(
        jacobian={"input": jacobian},
        legs={"input": "n, i", "output": "n, i"},
        forward="{input} * {input}.exp()",
    )
    problem = Case("declared", lambda: seq(nn.Linear(3, 4), Exponential(), nn.Linear(4, 2))).build()
    with tn.registered({Exponential: declared}):
        assert_equal(run(problem, "HessianDiag"), want(problem), "hessian_diag")


class Ratio(nn.Module):
    """A loss that is not convex in the output: the Hessian has no real root."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        gap = (output - y).square().sum(1)
        return (gap / (1 + gap)).mean()


class Cosine(nn.Module):
    """The same, and elementwise."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return torch.cos(output - y).mean()


@pytest.mark.parametrize("loss", [Ratio, Cosine])
def test_indefinite_losses(loss: Callable[[], nn.Module]) -> None:
    """Curvature of either sign is right for the Hessian."""
    problem = replace(mlp(nn.Tanh), y=normal, loss=loss).build()
    hessian = run(problem, "HessianDiag")
    assert_equal(hessian, want(problem), "hessian_diag")
    assert min(float(value.min()) for value in hessian.values()) < 0 < max(float(v.max()) for v in hessian.values())


@pytest.mark.slow
def test_edges() -> None:
    """One sample, one class, a perfect fit, saturated logits in float32: finite and right."""
    one = replace(mlp(nn.Tanh), batch=1).build()
    assert_equal(run(one, "HessianDiag"), want(one), "N = 1")
    lone = Case("one_class", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), (3,), classes(1),
                nn.CrossEntropyLoss).build()  # fmt: skip
    assert all(float(value.abs().max()) <= 1e-15 for value in run(lone, "HessianDiag").values())
    fitted = replace(mlp(nn.Tanh), y=normal, loss=nn.MSELoss).build()
    fitted = replace(fitted, y=fitted.model(fitted.x).detach())
    assert_equal(run(fitted, "HessianDiag"), dict(run(fitted, "DiagGGN")), "zero residual")
    sure = replace(mlp(nn.Tanh).build(), loss=nn.CrossEntropyLoss())
    with torch.no_grad():
        sure.model[-1].bias.copy_(torch.tensor([200.0, -200.0, 0.0]))
    sure = replace(sure, model=sure.model.float(), x=sure.x.float())
    assert all(torch.isfinite(value).all() for value in run(sure, "HessianDiag").values())


def test_explain_names_the_columns() -> None:
    problem = mlp(nn.Sigmoid).build()
    text = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.HessianDiag()]).explain("derive")
    assert "for each column column_0 of the root at layer_4, all" in text
    assert "one-hot columns at layer_2, weighted" in text
    assert "hessian_diag" in text


def test_a_layer_without_a_rule_is_refused() -> None:
    """Its second derivative is not known: never left out."""
    model = lambda: seq(nn.Linear(3, 3), Apply(torch.special.i0e), nn.Linear(3, 2))  # noqa: E731
    problem = Case("no_rule", model).build()
    with pytest.raises(tn.UnsupportedError, match="has no rule, so its second derivative is not known"):
        run(problem, "HessianDiag")


def test_shares_with_the_ggn() -> None:
    """Beside DiagGGN the columns of the root are swept once: equal roots are one value, and equal code is one step."""
    problem = mlp(nn.ReLU).build()
    batch = (problem.x, problem.y)
    alone = tn.compile(problem.model, problem.loss, batch, [tn.DiagGGN()])
    both = tn.compile(problem.model, problem.loss, batch, [tn.DiagGGN(), tn.HessianDiag()])
    assert len(both.compiled.plan.steps) == len(alone.compiled.plan.steps)


class Heads(nn.Module):
    """Two of one layer's outputs, the second of width 1: an axis that the diagrams do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)


def test_a_head_of_width_one() -> None:
    model, x = Heads().double(), torch.randn(5, 4).double()
    y = torch.randn(5, 2).double(), torch.randn(5, 1).double()

    def loss(f: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(f[0], y[0]) + F.mse_loss(f[1], y[1])

    found = tn.compute(model, loss, (x, y), [tn.HessianDiag()])["hessian_diag"]
    squares = x.square().sum(0)
    torch.testing.assert_close(found["value.weight"], 2 / 5 * squares.expand(1, 4))
    torch.testing.assert_close(found["policy.weight"], 1 / 5 * squares.expand(2, 4))
