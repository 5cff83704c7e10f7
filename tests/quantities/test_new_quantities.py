"""The quantities of examples/new_quantities.py on the table of layers, against their definitions from torch.func."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from .. import oracle
from ..cases import CASES, Problem
from ..second_order import assert_equal

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "new_quantities.py"), run_name="example")
BY_NAME = {case.name: case for case in CASES}
LAYERS = (
    "linear", "linear_rank3", "mlp_sum", "frozen_weight", "bilinear", "unused_and_zero_gradient", "tied_transposed",
    "reused_convolution", "position_table", "attention", "einsum_mixer", "weight_normalized", "scalar_parameter",
    "conv2d_stride_padding", "conv1d_groups_dilation", "conv_transpose2d", "prelu_channels", "layer_norm", "group_norm",
    "cross_entropy_sum", "cross_entropy_image",
)  # fmt: skip


def flat(problem: Problem) -> dict[str, Tensor]:
    """∇ℓ_n, [N, P], as the loss scales it."""
    found = oracle.batch_grad(problem.model, problem.loss, problem.x, problem.y)
    return {name: G.reshape(len(G), -1) for name, G in found.items()}


def scale(problem: Problem) -> float:
    """That of ℓ_n in the loss."""
    return 1 / len(problem.x) if problem.loss.reduction == "mean" else 1.0


def pairs(G: Tensor) -> Tensor:
    """The mean of G_n G_m over n ≠ m, one pair after the other, [P]."""
    count = len(G)
    return torch.stack([G[n] * G[m] for n in range(count) for m in range(count) if n != m]).mean(0)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_definitions(name: str) -> None:
    problem = BY_NAME[name].build()
    quantities = [EXAMPLE[name]() for name in ("Signal", "TowardsOthers", "OthersL2", "FisherBlock")]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    gradients, c = flat(problem), scale(problem)
    others = {name: torch.stack([G.sum(0) - row for row in G]) for name, G in gradients.items()}
    shapes = {name: p.shape for name, p in oracle.parameters(problem.model).items()}
    wanted = {
        "signal": {name: pairs(G / c).reshape(shapes[name]) for name, G in gradients.items()},
        "towards_others": {name: (G * others[name]).sum(1) for name, G in gradients.items()},
        "others_l2": {name: R.square().sum(1) for name, R in others.items()},
        "fisher_block": {name: (G / c).T @ (G / c) / len(G) for name, G in gradients.items()},
    }
    for key, values in wanted.items():
        got = {name: value.to_dense() if key == "fisher_block" else value for name, value in result[key].items()}
        assert_equal(got, values, key)


@dataclass(frozen=True)
class Blocks(tn.Quantity):
    """(1/N) Σ_n ∇ℓ_n ∇ℓ_nᵀ as a plain diagram, [*p, *p], or each sample's part of it, [N, *p, *p]."""

    name: str = "blocks"
    per_sample: bool = False

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = (J.T @ g) / g.scale
        block = (G * G.relabel(**{leg.name: f"{leg.name}_copy" for leg in J.legs})) / tn.N
        return block if self.per_sample else block.sum("n")


SHAPED = (*LAYERS, "conv3d", "linear_size_one", "flatten", "class_token")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", SHAPED)
def test_a_block_has_the_shape_of_its_parameter_twice(name: str) -> None:
    """Whatever legs the parameter is read with: groups, merged axes, axes of size 1, one element."""
    problem = BY_NAME[name].build()
    quantities = [Blocks(), Blocks(name="each", per_sample=True)]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    shapes = {name: p.shape for name, p in oracle.parameters(problem.model).items()}
    each = {name: torch.einsum("np,nq->npq", G, G) / scale(problem) ** 2 / len(G) for name, G in flat(problem).items()}
    wanted = {name: E.reshape(len(E), *shapes[name], *shapes[name]) for name, E in each.items()}
    assert_equal(result["each"], wanted, "each")
    assert_equal(result["blocks"], {name: E.sum(0) for name, E in wanted.items()}, "blocks")


def three_samples() -> Problem:
    return BY_NAME["conv2d"].build()


def test_signal_to_noise() -> None:
    problem = three_samples()
    quantities = [EXAMPLE["Signal"](), tn.Variance()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    for name, ratio in EXAMPLE["signal_to_noise"](result).items():
        G = flat(problem)[name] / scale(problem)
        torch.testing.assert_close(ratio.flatten(), pairs(G) / G.var(0, correction=0), rtol=1e-9, atol=1e-12)


def test_cosine_is_that_of_the_whole_gradient() -> None:
    problem = three_samples()
    quantities = [EXAMPLE["TowardsOthers"](), EXAMPLE["OthersL2"](), tn.BatchL2()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    every = torch.cat(list(flat(problem).values()), 1)
    wanted = torch.cosine_similarity(every, every.sum(0) - every)
    torch.testing.assert_close(EXAMPLE["cosine"](result), wanted, rtol=1e-9, atol=1e-12)


def test_two_equal_samples_agree() -> None:
    """Cosine 1; all that is there is signal; the Fisher block has rank 1."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(1, 3, dtype=torch.float64).expand(2, -1), torch.tensor([1, 1])
    result = tn.compile(model, nn.CrossEntropyLoss(), (x, y), EXAMPLE["QUANTITIES"])(x, y)
    torch.testing.assert_close(EXAMPLE["cosine"](result), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)
    gradient = oracle.grad(model, nn.CrossEntropyLoss(), x, y)
    for name, G in gradient.items():
        torch.testing.assert_close(result["signal"][name], G.square(), rtol=1e-12, atol=1e-15)
        assert int(torch.linalg.matrix_rank(result["fisher_block"][name].to_dense(), hermitian=True)) == 1
