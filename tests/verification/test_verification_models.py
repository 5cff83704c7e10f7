"""`tn.verify` of models and programs, and the oracle that it compares with."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.definitions import oracle
from tnbackprop.definitions.oracle import Problem
from tnbackprop.notation.parse import FUNCTIONS
from tnbackprop.verification.models import in_float64

from .. import oracle as first_order
from .. import oracle_second
from ..cases import CASES
from ..models import Apply
from ..verified import AFFINE, DAMPED, FIRST, Affine, Damped

BY_NAME = {case.name: case for case in CASES}
NETS = ("cnn", "attention", "layer_norm", "tied_transposed", "residual")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NETS)
def test_models(name: str) -> None:
    case = BY_NAME[name].build()
    report = tn.verify(case.model, case.x, case.y, loss=case.loss, quantities=(tn.BatchL2(), tn.DiagGGN(), tn.NTK()))
    assert report.ok, report
    assert {"formula", "Jacobian", "batch_l2", "diag_ggn", "ntk"} <= {row.what for row in report.rows}


@pytest.mark.slow
def test_a_program_in_its_own_dtype() -> None:
    """float32, drawn classes; the source that is compared is the one that runs; the model is as it was."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    x, y = torch.randn(4, 1, 4, 4), torch.randint(3, (4,))
    quantities = [tn.BatchL2(scale=tn.Scale.UNSCALED), tn.Variance(scale=tn.Scale.BACKPACK), tn.KFAC(), tn.DiagGGNMC()]
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities)
    for report in (tn.verify(program), tn.verify(program, x, y)):
        assert report.ok, report
        assert not report.left_out and {"kfac", "diag_ggn_mc"} <= {row.what for row in report.rows}
    assert all(torch.equal(before[name], p) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert in_float64(program, model.double()).source == program.source


@contextmanager
def multiplied(program: tn.Program, quantity: str, factor: int) -> Iterator[None]:
    """Programs that are compiled here give a multiple of a quantity."""
    right = program._sizes.example.loaded.function

    def wrong(tensors: dict[str, Tensor]) -> Any:
        loss, output, values, *rest = right(tensors)
        return loss, output, {quantity: {n: factor * value for n, value in values[quantity].items()}}, *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnbackprop.runtime.loaded.load", lambda source: wrong)
        yield


def test_a_wrong_program_is_found() -> None:
    """Rules are right, the quantity is not: the factor is said."""
    model = nn.Linear(3, 2).double()
    program = tn.compile(model, nn.MSELoss(), (torch.randn(4, 3).double(), torch.randn(4, 2).double()), [tn.BatchL2()])
    assert tn.verify(program).ok
    match = r"batch_l2 of 'weight'\[axis0=0\]: the program[^§]*2 times"
    with multiplied(program, "batch_l2", 2), pytest.raises(tn.VerificationError, match=match):
        tn.verify(program)


@pytest.mark.slow
def test_merged_batches_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of the batch give what the whole gives; a wrong power of N is found."""
    model, loss = nn.Linear(3, 2).double(), nn.CrossEntropyLoss(weight=torch.tensor([0.3, 0.7]).double())
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, -100, 0])
    quantities = [tn.Grad(), tn.WeightedGrad(), tn.KFLR(), tn.BatchDot(), tn.DiagGGNMC()]
    report = tn.verify(model, x, y, loss=loss, quantities=quantities)
    assert report.ok, report
    assert {row.of for row in report.rows if row.what == "merged"} == {"grad", "weighted_grad", "kflr"}
    assemble = importlib.import_module("tnbackprop.results.assemble")
    right = assemble.merging

    def wrong(compiled: Any) -> Any:
        found = right(compiled)
        joins = {n: tuple(replace(join, power=join.power - 1) for join in by) for n, by in found.joins["grad"].items()}
        return replace(found, joins={**found.joins, "grad": joins})

    monkeypatch.setattr(assemble, "merging", wrong)
    with pytest.raises(tn.VerificationError, match=r"merged of grad\n  grad of 'weight'\[axis0=0, .*two parts merged"):
        tn.verify(model, x, y, loss=loss, quantities=[tn.Grad()])


@pytest.mark.slow
def test_an_operation_without_a_rule_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Apply(lambda t: torch.cumprod(t, 1)), nn.Linear(3, 2))
    report = tn.verify(model, (4, 3), quantities=(tn.Grad(),))
    assert report.ok
    assert any("cumprod" in note.what and "no rule" in note.why for note in report.left_out)
    assert any(note.what == "hessian_diag" for note in tn.verify(model, (2, 3)).left_out)
    with pytest.raises(tn.UnsupportedError, match="second derivative is not known"):
        tn.verify(model, (4, 3), quantities=(tn.HessianDiag(),))


def test_rules_of_a_model() -> None:
    """A wrong rule is found in the model that uses it."""
    model = nn.Sequential(nn.Linear(3, 3), Damped(3))
    rules = tn.RULES | {Damped: lambda layer: DAMPED.replace("3/2", "2")}
    with pytest.raises(tn.VerificationError, match=r"the model Sequential is wrong: formula[^§]*1\.33333 times"):
        tn.verify(model, (2, 3), rules=rules, quantities=FIRST)


class Two(nn.Module):
    """Two outputs by name, one with a further axis."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.one(x).tanh()
        return {"h": h, "outer": h[:, :, None] * self.two(x)[:, None]}


FIRST_ORDER = {"grad", "batch_grad", "batch_l2", "batch_dot", "second_moment", "variance"}


LSTM = pytest.param(lambda: nn.LSTM(2, 3, batch_first=True), (4, 1, 2), marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("make,x", [(Two, (4, 3)), LSTM])
def test_several_outputs(make: Any, x: tuple[int, ...]) -> None:
    """The squares of all of them; what needs one output is left out. An LSTM's states have the batch on axis 1."""
    report = tn.verify(make(), x)
    assert report.ok, report
    assert FIRST_ORDER <= {row.what for row in report.rows}
    assert {note.what: note.why for note in report.left_out}["kfac_empirical"] == "the model returns several tensors"


def test_a_wrong_value_of_several_outputs_is_found() -> None:
    model, quantities = Two().double(), [tn.BatchGrad()]
    loss = lambda f, y: (f["h"] - y).square().sum() + f["outer"].sum()  # noqa: E731
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    assert tn.verify(model, x, y, loss=loss, quantities=quantities).ok
    program = tn.compile(model, loss, (x, y), quantities)
    match = r"batch_grad of 'one.weight'[^§]*3 times"
    with multiplied(program, "batch_grad", 3), pytest.raises(tn.VerificationError, match=match):
        tn.verify(program, x, y)


def test_a_target_of_several_outputs_needs_its_loss() -> None:
    with pytest.raises(tn.InputError, match=r"Two returns dict, so what y is the target of .*\n.*loss="):
        tn.verify(Two(), (4, 3), (4, 2))


def test_a_model_without_a_parameter() -> None:
    """Nothing is differentiated, so nothing is compared, and the message says why."""
    with pytest.raises(tn.InputError, match=r"(?s)quantities: the model has no trainable parameter.*Nothing could be"):
        tn.verify(nn.Sigmoid(), (4, 3))
    with pytest.raises(tn.InputError, match="grad: Sigmoid has no parameters"):
        tn.verify(nn.Sigmoid(), (4, 3), quantities=[tn.Grad()])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query(x)[:, None], self.key(x)[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, q)[:, 0].sum(1)


@pytest.mark.slow
def test_second_derivatives_of_attention() -> None:
    """torch's fused kernel has none: the oracle takes the one that has."""
    report = tn.verify(Attention(), (2, 3, 3), quantities=[tn.HessianDiag(), tn.HesScale()])
    assert report.ok and not report.left_out, report
    assert {"hessian_diag", "hesscale"} <= {row.what for row in report.rows}


@pytest.mark.slow
def test_it_leaves_the_generator_alone() -> None:
    module = Affine(2, 2)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    tn.verify(AFFINE, module=module, quantities=FIRST)
    assert torch.equal(torch.rand(2), want)


# ---------------------------------------------------------------- the oracle


def test_the_oracle_knows_nothing_of_the_package() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            assert str(node.module).split(".")[0] in ("torch", "__future__", "collections", "dataclasses", "typing")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["mlp_sum", "cross_entropy_weights_ignore", "tied_transposed"])
def test_the_oracle_against_the_other_one(name: str) -> None:
    """That of the tests was written before, from the definitions."""
    case = BY_NAME.get(name) or next(c for c in CASES if "ignore" in c.name)
    p = case.build()
    forward = lambda theta, x: torch.func.functional_call(p.model, dict(theta), (x,))  # noqa: E731
    problem = Problem(forward, p.loss, first_order.parameters(p.model), p.x, p.y, len(p.x))
    pairs = [
        (oracle.gradient(problem), first_order.grad(p.model, p.loss, p.x, p.y)),
        (oracle.individual(problem), first_order.batch_grad(p.model, p.loss, p.x, p.y)),
        (oracle.variance(problem), first_order.variance(p.model, p.loss, p.x, p.y)),
        (oracle.ggn_diagonal(problem, False), oracle_second.diag_ggn(p.model, p.loss, p.x, p.y)),
        (oracle.ggn_traces(problem), oracle_second.ggn_trace(p.model, p.loss, p.x, p.y)),
        (oracle.hessian_diagonal(problem, False), oracle_second.hessian_diag(p.model, p.loss, p.x, p.y)),
        (oracle.hessian_diagonal(problem, True), oracle_second.hessian_diag_per_sample(p.model, p.loss, p.x, p.y)),
    ]
    for got, want in pairs:
        assert list(got) == list(want)
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("curved", [False, True])
def test_operators_that_vmap_differentiates_wrongly(curved: bool) -> None:
    """`cdist` and `solve`: torch.func.jacrev over all rows at once gives other numbers, and none of ours are wrong."""

    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

        def forward(self, input: Tensor) -> Tensor:
            h, p = self.a(input), self.p.exp() if curved else self.p
            solved = torch.linalg.solve(p + 5 * torch.eye(3), h[..., None])[..., 0]
            return torch.cdist(h[:, None], p[None])[:, 0] + solved

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    report = tn.verify(Near(), x, y, loss=nn.MSELoss(), quantities=[tn.KFLR(), tn.DiagGGN(), tn.BatchL2()])
    assert report.ok and {"kflr", "diag_ggn"} <= {row.what for row in report.rows}


OF_ONE = sorted(name for name, (count, _) in FUNCTIONS.items() if count == 1)
QUICK = ("erfc", "sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OF_ONE]
)
def test_every_function_of_a_formula(function: str) -> None:
    """A layer of a formula, whose forward takes any arguments, in a model."""
    formula = f"h[n, o] = w[o, i] * input[n, i] + 2\noutput[n, o] = {function}(h[n, o])"
    layer = tn.einsum_layer(formula, w=((3, 4), lambda w: nn.init.uniform_(w, -0.1, 0.1)))
    quantities = (tn.BatchL2(), tn.HessianDiag())
    report = tn.verify(nn.Sequential(layer, nn.Linear(3, 2)), torch.rand(4, 4), quantities=quantities)
    assert report.ok and {"formula", "Jacobian", "hessian_diag"} <= {row.what for row in report.rows}
    assert tn.verify(layer, (4, 4), quantities=quantities).ok and tn.verify(layer.rule, module=layer).ok


@pytest.mark.slow
@pytest.mark.parametrize("loss", [nn.MSELoss(reduction="sum"), tn.HANDED, tn.HANDED_MEAN], ids=repr)
@pytest.mark.parametrize("given", [False, True])
def test_losses_that_are_sums_and_cotangents(loss: Any, given: bool) -> None:
    """A cotangent is drawn where there is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    y = torch.randn(6, 2) if given or isinstance(loss, nn.Module) else None
    report = tn.verify(model, torch.randn(6, 4), y, loss=loss)
    assert {"grad", "axis_moments", "batch_l2"} <= {row.what for row in report.rows}
