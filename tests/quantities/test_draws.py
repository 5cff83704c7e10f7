"""Drawn columns: weighted with its probability every draw gives the exact root; those of two classes are residuals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ..cases import Case, Problem, classes, normal, seq, unit
from ..second_order import DIFFERENT, assert_equal, error, make, mlp, products, run, tensors

DRAWS = 2000
LOSSES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "with logits": (nn.BCEWithLogitsLoss(), lambda f: (torch.rand_like(f) < 0.5).to(f)),
    "of probabilities": (nn.BCELoss(), lambda f: (torch.rand_like(f) < 0.5).to(f)),
    "soft margin": (nn.SoftMarginLoss(), lambda f: (torch.rand_like(f) < 0.5).to(f) * 2 - 1),
}


class Outputs(nn.Module):
    """Its parameter is its output, sample by sample."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.free = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None] * self.free[None]


@pytest.mark.parametrize("name", LOSSES)
def test_the_columns_are_residuals(name: str) -> None:
    """One of two values for each output, over the root of the Hessian; y = 1 as often as the model says."""
    loss, draw = LOSSES[name]
    p = torch.tensor([0.02, 0.3, 0.5, 0.97], dtype=torch.float64)
    model = Outputs(p if name == "of probabilities" else torch.logit(p))
    x = torch.ones(1, dtype=torch.float64)
    y = draw(model(x).detach())
    root = tn.compute(model, loss, (x, y), [tn.SqrtGGNMC(mc_samples=DRAWS)], seed=0)["sqrt_ggn_mc"]["free"][:, 0]
    hessian = torch.func.jacrev(torch.func.jacrev(lambda f: loss(f, y)))(model(x).detach()).reshape(4, 4).diagonal()
    columns = root * DRAWS**0.5 / hessian.sqrt()
    ones, zeros = -((1 - p) / p).sqrt(), (p / (1 - p)).sqrt()
    labels = (columns - ones).abs() < 1e-9
    assert ((columns - zeros).abs() < 1e-9).logical_xor(labels).all()
    frequency = labels.double().mean(0)
    assert ((frequency - p).abs() < 4 * (p * (1 - p) / DRAWS).sqrt()).all(), frequency


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated(dtype: torch.dtype) -> None:
    """Certain labels, p = 0 or 1: no spread, and finite."""
    model, x = Outputs(torch.tensor([-200.0, 200.0, 0.0], dtype=dtype)), torch.ones(2, dtype=dtype)
    y = torch.ones(2, 3, dtype=dtype)
    root = tn.compute(model, F.binary_cross_entropy_with_logits, (x, y), [tn.SqrtGGNMC(mc_samples=50)], seed=1)
    columns = root["sqrt_ggn_mc"]["free"]
    assert columns.isfinite().all() and columns[..., :2].abs().max() < 1e-12 < columns[..., 2].abs().min()


# Every draw of a sampler, weighted with its probability, is the exact root.

SAMPLED = ("SqrtGGNMC", "DiagGGNMC", "KFAC")
EXACT = {"SqrtGGNMC": "SqrtGGN", "DiagGGNMC": "DiagGGN", "KFAC": "KFLR"}
Draws = list[tuple[Tensor, float]]
"""Uniform noise as the program asks for it, and the probability of what is drawn from it."""


def labels(problem: Problem) -> Draws:
    """For every combination of labels the noise that draws it: the middle of the label's share of what adds up to 1."""
    p = torch.softmax(problem.model(problem.x).detach(), 1).movedim(1, -1)
    found = []
    for drawn in product(range(p.shape[-1]), repeat=p[..., 0].numel()):
        label = torch.tensor(drawn).reshape(p.shape[:-1])
        middle, share = ((each.gather(-1, label.unsqueeze(-1))).squeeze(-1) for each in (p.cumsum(-1) - p / 2, p))
        found.append((middle.unsqueeze(0), float(share.prod())))
    return found


def signs(problem: Problem) -> Draws:
    """For normal noise all combinations of ±1 in one sample, with equal weights: they have its covariance."""
    shape = problem.model(problem.x).shape
    found = []
    for drawn in product((-1.0, 1.0), repeat=shape[1:].numel()):
        z = torch.tensor(drawn, dtype=torch.float64).reshape(1, 1, *shape[1:]).expand(1, *shape)
        found.append(((torch.erf(z / 2**0.5) / (1 - 2.0**-52) + 1) / 2, 2.0 ** -len(drawn)))
    return found


def classes_of_two(problem: Problem) -> Draws:
    """All labels 0 or 1 of one sample, as often as the model says."""
    p = torch.sigmoid(problem.model(problem.x).detach())
    found = []
    for drawn in product((False, True), repeat=p.numel()):
        y = torch.tensor(drawn).reshape(p.shape)
        found.append((torch.where(y, 1e-300, 1 - 1e-15)[None], float(torch.where(y, p, 1 - p).prod())))
    return found


POSITIONS = Case("positions", lambda: seq(nn.Conv1d(2, 3, 2), nn.Tanh()), (2, 3), classes(3, 2), nn.CrossEntropyLoss, 1)
WEIGHTS = torch.tensor([0.3, 2.0, 0.9], dtype=torch.float64)
DRAWN: Mapping[str, tuple[Case, Callable[[Problem], Draws]]] = {
    "cross_entropy": (mlp(), labels),
    "cross_entropy_sum": (mlp(lambda: nn.CrossEntropyLoss(reduction="sum"), batch=2), labels),
    "cross_entropy_everything": (
        replace(mlp(lambda: nn.CrossEntropyLoss(WEIGHTS, ignore_index=0, label_smoothing=0.1)), y=classes(3, ignore=0)),
        labels,
    ),
    "cross_entropy_positions": (POSITIONS, labels),
    "mse": (Case("mse", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), normal, batch=4), signs),
    "bce": (replace(mlp(nn.BCEWithLogitsLoss, batch=1), y=unit), classes_of_two),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", DRAWN)
def test_every_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ_draws probability · (the sampled quantity) = the exact one; other probabilities give something else."""
    case, draws = DRAWN[name]
    problem = case.build()
    batch = (problem.x, problem.y)
    program = tn.compile(problem.model, problem.loss, batch, [make(kind, name=kind) for kind in SAMPLED])
    exact = {kind: run(problem, EXACT[kind]) for kind in SAMPLED}
    want = {kind: products(v) if kind == "SqrtGGNMC" else tensors(v) for kind, v in exact.items()}
    every = draws(problem)
    assert sum(weight for _, weight in every) == pytest.approx(1)
    total = sum(k**2 for k in range(len(every) + 1))
    skewed = [(noise, (k + 1) ** 2 / total) for k, (noise, _) in enumerate(every)]
    for chosen, same in ((every, True), (skewed, False)):
        mean: dict[str, dict[str, Tensor]] = {kind: {} for kind in SAMPLED}
        for noise, weight in chosen:
            monkeypatch.setattr(torch, "rand", lambda shape, noise=noise, **options: noise.expand(*shape).clone())
            result = program(*batch)
            for kind in SAMPLED:
                values = products(result[kind]) if kind == "SqrtGGNMC" else tensors(result[kind])
                mean[kind] = {key: mean[kind].get(key, 0) + weight * value for key, value in values.items()}
        for kind in SAMPLED:
            if same:
                assert_equal(mean[kind], want[kind], kind)
        gap = max(error(mean["SqrtGGNMC"][key], value) for key, value in want["SqrtGGNMC"].items())
        assert same or gap > DIFFERENT
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normal_columns_in_few_bits(dtype: torch.dtype) -> None:
    """Uniform noise of 8 bits is 0 once in 256 draws, whose normal number is not finite, and has too few large ones."""
    model = nn.Linear(3, 4).to(dtype)
    x, y = torch.randn(4096, 3).to(dtype), torch.randn(4096, 4).to(dtype)
    program = tn.compile(model, nn.MSELoss(reduction="sum"), (x[:4], y[:4]), [tn.SqrtGGNMC()])
    columns = program(x, y, seed=0)["sqrt_ggn_mc"]["bias"].float()
    assert columns.isfinite().all()
    assert columns.unique().numel() > 256
    assert abs(columns.square().mean() - 2) < 0.06, "the Hessian of the squared error, in 4 standard deviations"
