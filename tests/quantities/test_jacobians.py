"""Jacobians, the tangent kernel and the Gram matrix of the root: columns multiplied with each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program.cost import number
from tnbackprop.quantities.jacobian import CrossNTK

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..second_order import IMPRECISE, TOLERANCE, assert_equal, error, run

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.thinned(15)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in IMPRECISE], ids=str)
def test_definition(case: Case) -> None:
    """Without a loss."""
    problem = case.build()
    program = tn.compile(problem.model, None, (problem.x, None), [tn.Jacobians(), tn.NTK()])
    result = program(problem.x)
    want = oracle_second.jacobians(problem.model, problem.x)
    flat = {name: J.reshape(*J.shape[:2], -1) for name, J in result["jacobians"].items()}
    assert_equal(flat, want, "jacobians")
    kernels = {name: torch.einsum("ncp,mdp->ncmd", J, J) for name, J in want.items()}
    assert_equal(result["ntk"], kernels, "ntk")


GRAM = ("cnn", "attention", "layer_norm", "tied_transposed", "cross_entropy_positions", "bmm")


@pytest.mark.parametrize("name", GRAM)
def test_gram(name: str) -> None:
    """V Vᵀ of each block, and its spectrum: that of the GGN and zeros."""
    problem = BY_NAME[name].build()
    quantities = [tn.GGNGram(), tn.SqrtGGN(), tn.BatchDot()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    dense = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)
    for parameter, gram in result["ggn_gram"].items():
        V = result["sqrt_ggn"][parameter].flatten(2)
        assert error(gram, torch.einsum("vnp,wmp->vnwm", V, V)) <= TOLERANCE, parameter
        rows = gram.shape[0] * gram.shape[1]
        spectrum = torch.linalg.eigvalsh(gram.reshape(rows, rows)).flip(0)
        want = torch.linalg.eigvalsh(dense[parameter]).flip(0)
        shared = min(len(spectrum), len(want))
        assert error(spectrum[:shared], want[:shared]) <= TOLERANCE, parameter
        assert float(spectrum[shared:].abs().sum() + want[shared:].abs().sum()) <= TOLERANCE, parameter


@pytest.mark.slow
def test_all_columns_are_propagated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the device likes: what multiplies columns with each other needs all of them."""
    problem = BY_NAME["cnn"].build()
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=1))
    monkeypatch.setattr(search, "WIDER", ())
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.GGNGram(), tn.NTK(), tn.Jacobians()])(
        problem.x, problem.y
    )
    monkeypatch.undo()
    for kind in ("GGNGram", "NTK", "Jacobians"):
        alone = run(problem, kind)
        key = {"GGNGram": "ggn_gram", "NTK": "ntk", "Jacobians": "jacobians"}[kind]
        assert_equal(result[key], dict(alone), kind)


def net() -> nn.Module:
    return seq(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


NET = Case("net", net, (1, 4, 4), classes(3), nn.CrossEntropyLoss, batch=4)


def kernel(problem: Problem, x: Tensor, other: Tensor) -> Tensor:
    one, two = (oracle_second.jacobians(problem.model, batch) for batch in (x, other))
    return sum((torch.einsum("ncp,mdp->ncmd", one[name], two[name]) for name in one), torch.zeros(()))


def test_kernel_of_the_model() -> None:
    """All parameters, and between two batches of other sizes."""
    problem = NET.build()
    other = replace(NET, batch=2, seed=1).build().x
    assert error(tn.ntk(problem.model, problem.x), kernel(problem, problem.x, problem.x)) <= TOLERANCE
    assert error(tn.ntk(problem.model, problem.x, other), kernel(problem, problem.x, other)) <= TOLERANCE
    turned = tn.ntk(problem.model, other, problem.x)
    assert error(turned.permute(2, 3, 0, 1), tn.ntk(problem.model, problem.x, other)) <= TOLERANCE


CROSS = (*GRAM, "residual", "position_table", "scalar_parameter", "unused_and_zero_gradient", "prelu")


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", CROSS)
@pytest.mark.parametrize("first", [1, 2])
def test_kernel_between_batches(name: str, first: int) -> None:
    """Each parameter's block off the diagonal, in the rows of the one batch and of the other."""
    problem = BY_NAME[name].build()
    program = tn.compile(problem.model, None, (problem.x, None), [CrossNTK(first=first)])
    J = oracle_second.jacobians(problem.model, problem.x)
    want = {p: torch.einsum("ncp,mdp->cdnm", V[:first], V[first:]) for p, V in J.items()}
    assert_equal(program(problem.x)["cross_ntk"], want, "cross_ntk")


def test_only_pairs_of_the_two_batches_are_multiplied() -> None:
    """A quarter of the products of N + M samples with themselves, for two batches of one size."""
    model, x = seq(nn.Linear(40, 30, bias=False)), torch.randn(16, 40)
    whole, block = (tn.compile(model, None, (x, None), [q]) for q in (tn.NTK(), CrossNTK(first=8)))
    assert gram_flops(block) == gram_flops(whole) / 4
    assert "[8:]" in block.source
    assert "cross_ntk" in block.explain()


def gram_flops(program: tn.Program) -> float:
    plan = program.compiled.plan
    return sum(number(step.work.flops, plan.batch) for step in plan.steps if "ntk" in step.note)


def test_kernel_predicts_a_small_step() -> None:
    """f(θ - t ∇L) - f(θ) is -t times the kernel on the loss's gradient, up to t²."""
    problem = replace(NET, y=normal, loss=nn.MSELoss).build()
    output = problem.model(problem.x).detach()
    pull = torch.autograd.functional.jacobian(lambda f: problem.loss(f, problem.y), output)
    step = torch.einsum("ncmd,md->nc", tn.ntk(problem.model, problem.x), pull)
    gradient = run(problem, "Grad")
    with torch.no_grad():
        for name, parameter in problem.model.named_parameters():
            parameter -= 1e-6 * gradient[name]
        moved = (problem.model(problem.x) - output) / -1e-6
    assert error(moved, step) <= 1e-5


def test_any_batch_size_and_one_output() -> None:
    case = Case("scalar", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), batch=3)
    small, large = case.build(), replace(case, batch=5, seed=1).build()
    program = tn.compile(large.model, None, (small.x, None), [tn.Jacobians(), tn.NTK()])
    want = oracle_second.jacobians(large.model, large.x)
    result = program(large.x)
    for name, J in want.items():
        assert error(result["jacobians"][name].flatten(2), J) <= TOLERANCE
        assert error(result["ntk"][name], torch.einsum("ncp,mdp->ncmd", J, J)) <= TOLERANCE


def test_errors() -> None:
    problem = NET.build()
    with pytest.raises(tn.InputError, match=r"samples of shape \[1, 5, 5\]"):
        tn.ntk(problem.model, problem.x, torch.zeros(2, 1, 5, 5, dtype=torch.float64))
    with pytest.raises(tn.InputError, match="kernel of 4 with 0 samples is empty"):
        tn.ntk(problem.model, problem.x, problem.x[:0])
    frozen = net().double().requires_grad_(False)
    with pytest.raises(tn.TnError, match="no trainable parameters"):
        tn.ntk(frozen, problem.x)
    with pytest.raises(tn.UnsupportedError, match="diag_ggn need a loss"):
        tn.compile(problem.model, None, (problem.x, None), [tn.Jacobians(), tn.DiagGGN()])


class TwoDtypes(nn.Module):
    """The first layer in bfloat16, the output in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).bfloat16(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.bfloat16()).float().tanh())


def test_columns_have_the_dtype_of_the_output() -> None:
    model, x = TwoDtypes(), torch.randn(4, 3)
    result = tn.compute(model, None, (x, None), [tn.NTK(), tn.Jacobians()])
    want = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x))(dict(model.named_parameters()))
    for name, p in model.named_parameters():
        assert result["jacobians"][name].dtype == p.dtype
        found = result["jacobians"][name].float()
        torch.testing.assert_close(found, want[name].detach().float(), rtol=0.02, atol=0.02)
