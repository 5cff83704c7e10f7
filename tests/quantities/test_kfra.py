"""KFRA: where it is KFLR, where it is not, against its recursion, and what it says about memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

import tnbackprop as tn

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..models import Apply
from ..second_order import DIFFERENT, TOLERANCE, dense, error, run

BY_NAME = {case.name: case for case in CASES}
# Uses that swap the sides of the factors, or have other legs, have no common factors.
UNLIKE_USES = (
    "tied_transposed", "embedding_tied", "vector_products", "lerp", "quotients", "weight_normalized",
    "weight_sum_of_two",
)  # fmt: skip


@pytest.mark.thinned(10)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in UNLIKE_USES], ids=str)
def test_one_sample_is_kflr(case: Case) -> None:
    """Through convolution, pooling, norms, attention, residual branches, parameters used twice."""
    problem = case.build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.KFRA(), tn.KFLR()])
    result = program(problem.x[-1:], problem.y[-1:])
    assert list(result["kfra"]) == list(result["kflr"])
    for name, factors in result["kflr"].items():
        assert error(result["kfra"][name].to_dense(), factors.to_dense()) <= TOLERANCE, name


def chain() -> nn.Module:
    return seq(
        nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2, padding=1), nn.MaxPool2d(2, 1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


CHAIN = Case("chain", chain, (2, 4, 4), classes(3), nn.CrossEntropyLoss, batch=3)


def matrices(problem: Problem) -> dict[str, Tensor]:
    """Ḡ at the output of every layer of a chain: Σ_n H_n at the end, then the mean of Jᵀ Ḡ J, layer by layer."""
    layers = list(problem.model.named_children())
    values = [problem.x]
    for _, layer in layers:
        values.append(layer(values[-1]).detach())
    G = oracle_second.loss_hessians(problem.loss, values[-1], problem.y, len(problem.x)).sum(0)
    found = {}
    for (name, layer), value in zip(reversed(layers), reversed(values[:-1]), strict=True):
        found[name] = G
        each = [jacrev(layer)(u.unsqueeze(0)).reshape(len(G), -1).detach() for u in value]
        G = torch.stack([J.T @ G @ J for J in each]).mean(0)
    return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize("loss, y", [(nn.CrossEntropyLoss, classes(3)), (nn.MSELoss, normal)])
@pytest.mark.parametrize("sharing", ["EXPAND", "REDUCE"])
def test_recursion(sharing: str, loss: Callable[[], nn.Module], y: Callable[[int, Tensor], Tensor]) -> None:
    """B of a convolution: its block of Ḡ with the positions tied, or summed on both sides."""
    problem = replace(CHAIN, loss=loss, y=y).build()
    factors, other = run(problem, "KFRA", sharing=sharing), run(problem, "KFLR", sharing=sharing)
    for layer, G in matrices(problem).items():
        if f"{layer}.weight" not in factors:
            continue
        outputs = problem.model.get_submodule(layer).weight.shape[0]
        blocks = G.reshape(outputs, -1, outputs, len(G) // outputs)
        B = torch.einsum("otpt->op" if sharing == "EXPAND" else "otpu->op", blocks)
        got = factors[f"{layer}.weight"].factors
        assert error(got[0], B) <= TOLERANCE, layer
        assert error(got[1], other[f"{layer}.weight"].factors[1]) <= TOLERANCE, layer
        assert error(factors[f"{layer}.bias"].to_dense(), B) <= TOLERANCE, layer


def test_several_samples_are_not_kflr() -> None:
    """But for the last layer, which nothing has been averaged for."""
    problem = replace(CHAIN, seed=1).build()
    found, other = dense(problem, "KFRA"), dense(problem, "KFLR")
    for name, value in found.items():
        if name.startswith("6."):
            assert error(value, other[name]) <= TOLERANCE, name
        else:
            assert error(value, other[name]) > DIFFERENT, name


def test_copies_of_one_input_are_kflr() -> None:
    problem = CHAIN.build()
    same = replace(problem, x=problem.x[:1].expand(3, -1, -1, -1).clone(), y=problem.y[:1].expand(3).clone())
    found, other = dense(same, "KFRA"), dense(same, "KFLR")
    assert all(error(value, other[name]) <= TOLERANCE for name, value in found.items())


def test_a_linear_chain_is_kflr() -> None:
    """Jacobians that are the same for all samples lose nothing in the mean; those of two activations do."""
    layers = lambda middle: lambda: seq(nn.Linear(3, 4), middle(), nn.Linear(4, 4), middle(), nn.Linear(4, 2))  # noqa: E731
    for middle, same in ((nn.Identity, True), (nn.Tanh, False)):
        problem = Case("chain", layers(middle), batch=4, seed=2).build()
        problem.x.mul_(3)
        gap = error(dense(problem, "KFRA")["0.weight"], dense(problem, "KFLR")["0.weight"])
        assert gap <= TOLERANCE if same else gap > DIFFERENT, middle


def test_memory_is_named_before_it_is_taken() -> None:
    """The largest matrix, the value that it belongs to, and what else there is."""
    problem = CHAIN.build()
    batch = (problem.x, problem.y)
    with pytest.raises(tn.UnsupportedError, match=r"KFRA needs a matrix of \d+ x \d+ .* for layer_\d.*memory_limit"):
        tn.compile(problem.model, problem.loss, batch, [tn.KFRA()], memory_limit=500)
    wide = seq(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64 * 64, 2))
    x, y = torch.randn(2, 1, 64, 64), torch.tensor([0, 1])
    with pytest.raises(tn.UnsupportedError, match=r"262144 x 262144 features \(256 GiB\)[\s\S]*KFLR"):
        tn.compile(wide, nn.CrossEntropyLoss(), (x, y), [tn.KFRA()])


def test_explain_shows_the_matrices() -> None:
    problem = CHAIN.build()
    text = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.KFRA()]).explain("derive")
    assert "K_layer_5[" in text and "(1/N) Σ_{n" in text


def test_refused_where_it_is_not_defined() -> None:
    for name in UNLIKE_USES:
        for kind in ("KFRA", "KFLR"):
            with pytest.raises(tn.UnsupportedError, match="different Kronecker structure"):
                run(BY_NAME[name].build(), kind, strict=True)
    case = Case("no_rule", lambda: seq(nn.Linear(3, 3), Apply(torch.special.i0e), nn.Linear(3, 2)))
    with pytest.raises(tn.UnsupportedError, match="has no rule, and KFRA needs its Jacobian"):
        run(case.build(), "KFRA")
