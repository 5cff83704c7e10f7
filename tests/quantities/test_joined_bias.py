"""Weight and bias in one block: the input of the layer ends in a 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import tnbackprop as tn

from .. import oracle_second
from ..cases import Case, Problem, classes, seq
from ..second_order import DIFFERENT, TOLERANCE, error, run

CNN = Case(
    "cnn", lambda: seq(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4, bias=False), nn.Tanh(),
                       nn.LayerNorm(4), nn.Linear(4, 3)), (2, 4, 4), classes(3), nn.CrossEntropyLoss, batch=3,
)  # fmt: skip
JOINED = {"0.weight", "6.weight"}


def joined(problem: Problem, kind: str, **options: object) -> dict[str, object]:
    return dict(run(problem, kind, bias="JOINED", **options))


def with_ones(problem: Problem, layer: str, reduce: bool) -> oracle_second.Factors:
    """The factors of a layer whose input has one more channel of ones, with a window of one."""
    plain = oracle_second.kronecker(problem.model, layer, problem.loss, problem.x, problem.y, reduce=reduce)
    module = problem.model.get_submodule(layer)
    pairs = [oracle_second._layer(problem.model, module, x.unsqueeze(0))[0] for x in problem.x]
    a = torch.stack([torch.cat([each, torch.ones_like(each[:, :1])], 1) for each in pairs])
    positions = a.shape[1]
    a = a.sum(1, keepdim=True) / positions if reduce else a
    A = torch.einsum("nti,ntj->ij", a, a) / (len(a) * a.shape[1])
    return replace(plain, A=A)


@pytest.mark.parametrize("sharing", ["EXPAND", "REDUCE"])
def test_definition(sharing: str) -> None:
    problem = CNN.build()
    found = joined(problem, "KFLR", sharing=sharing)
    assert set(found) == JOINED | {"3.weight", "5.weight", "5.bias"}
    for name in JOINED:
        want = with_ones(problem, name.removesuffix(".weight"), sharing == "REDUCE")
        factors = found[name]
        assert isinstance(factors, tn.KroneckerFactors)
        assert error(factors.factors[0], want.B) <= TOLERANCE
        assert error(factors.factors[1], want.A) <= TOLERANCE
        assert factors.shape == (len(want.B), len(want.A))
        assert factors.name == f"{name}, {name.replace('weight', 'bias')}"
    own = run(problem, "KFLR", sharing=sharing)
    for name in set(found) - JOINED:
        assert error(found[name].to_dense(), own[name].to_dense()) <= TOLERANCE, name


def test_one_sample_is_the_ggn_of_both() -> None:
    """The block of weight and bias together, cross terms included; with several samples it is not."""
    for batch, same in ((1, True), (4, False)):
        problem = replace(CNN, batch=batch).build()
        factors = joined(problem, "KFLR")["6.weight"]
        theta = {name: p.detach() for name, p in problem.model.named_parameters()}
        both = torch.cat([theta["6.weight"], theta["6.bias"].unsqueeze(1)], 1)

        def output(matrix: torch.Tensor, problem: Problem = problem) -> torch.Tensor:
            own = {"6.weight": matrix[:, :-1], "6.bias": matrix[:, -1]}
            return functional_call(problem.model, own, (problem.x,))

        J = jacrev(output)(both).reshape(len(problem.x), 3, -1)
        H = oracle_second.loss_hessians(problem.loss, output(both), problem.y, len(problem.x))
        gap = error(factors.to_dense(), (J.mT @ H @ J).sum(0))
        assert gap <= TOLERANCE if same else gap > DIFFERENT


OTHERS = (("KFAC", {"fisher": "EMPIRICAL"}), ("KFAC", {"mc_samples": 2}), ("KFRA", {}))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind, options", OTHERS)
def test_other_factors(kind: str, options: dict[str, object]) -> None:
    """The same joint input factor with every B."""
    problem = CNN.build()
    own, both = run(problem, kind, seed=1, **options), run(problem, kind, seed=1, bias="JOINED", **options)
    A = joined(problem, "KFLR")["0.weight"].factors[1]
    assert error(both["0.weight"].factors[0], own["0.weight"].factors[0]) <= TOLERANCE
    assert error(both["0.weight"].factors[1], A) <= TOLERANCE
    assert "0.bias" in own and "0.bias" not in both


class TwoWeights(nn.Module):
    """left x + right x² + first + second, in one line."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("left", "right"):
            self.register_parameter(name, nn.Parameter(torch.zeros(3, 3)))
        for name in ("first", "second"):
            self.register_parameter(name, nn.Parameter(torch.zeros(3)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.left.T + input**2 @ self.right.T + self.first + self.second


FORMULA = "output[n, o] = left[o, i] * input[n, i] + right[o, i] * input[n, i]**2 + first[o] + second[o]"


def test_no_bias_joins_two_weights() -> None:
    """Two weights and two biases of one line have one cotangent: they pair off."""
    problem = Case("two", TwoWeights, (3,), classes(3), nn.CrossEntropyLoss).build()
    with tn.registered({TwoWeights: FORMULA}):
        found = joined(problem, "KFLR")
    assert {name: value.name for name, value in found.items()} == {"left": "left, first", "right": "right, second"}
    assert [value.shape for value in found.values()] == [(3, 4), (3, 4)]


class Bilinears(nn.Module):
    def __init__(self, one: int, other: int) -> None:
        super().__init__()
        self.one = one
        self.bilinear, self.head = nn.Bilinear(one, other, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bilinear(x[:, : self.one], x[:, self.one :]))


@pytest.mark.parametrize("sizes", [(3, 3), (3, 2)])
@pytest.mark.parametrize("kind,options", [("KFLR", {}), ("KFAC", {"fisher": "EMPIRICAL"})])
def test_more_factors_than_two(kind: str, options: dict[str, str], sizes: tuple[int, int]) -> None:
    """Beside a weight that is joined: they are what they are without it."""
    problem = Case("bilinear", lambda: Bilinears(*sizes), (sum(sizes),), classes(3), nn.CrossEntropyLoss).build()
    found, own = joined(problem, kind, **options), run(problem, kind, **options)
    assert set(found) == {"bilinear.weight", "bilinear.bias", "head.weight"}
    for name in ("bilinear.weight", "bilinear.bias"):
        for factor, want in zip(found[name].factors, own[name].factors, strict=True):
            assert error(factor, want) <= TOLERANCE
