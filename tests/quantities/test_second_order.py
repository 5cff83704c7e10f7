"""GGN roots, diagonals and traces: every case of `cases.py` against `oracle_second.py`, laws, Monte Carlo, edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from .. import oracle, oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..models import Apply, Written
from ..second_order import DIFFERENT, IMPRECISE, assert_equal, dense, error, make, products, run

BY_NAME = {case.name: case for case in CASES}
KINDS: Mapping[str, tuple[str, dict[str, object]]] = {
    "sqrt_ggn": ("SqrtGGN", {}),
    "diag_ggn": ("DiagGGN", {}),
    "diag_ggn_per_sample": ("DiagGGN", {"per_sample": True}),
    "ggn_trace": ("GGNTrace", {}),
}
"""Key -> class and options; the oracle has a function of the same name, but for the root."""
ALONE = (
    "cnn", "residual", "attention", "layer_norm", "tied_transposed", "position_table", "conv2d_groups",
    "cross_entropy_positions", "cross_entropy_everything", "merged_output", "max_pool2d_overlapping", "frozen_weight",
)  # fmt: skip


def check(key: str, got: Mapping[str, Tensor], problem: Problem) -> None:
    """A value of `KINDS` against the oracle; the root by its products."""
    arguments = (problem.model, problem.loss, problem.x, problem.y)
    if key != "sqrt_ggn":
        assert_equal(got, getattr(oracle_second, key)(*arguments), key)
        return
    theta = oracle.parameters(problem.model)
    for name, V in got.items():
        assert V.shape[1:] == (len(problem.x), *theta[name].shape), f"{key} of {name}"
    assert_equal(products(got), oracle_second.ggn_blocks(*arguments), key)


@pytest.mark.thinned(15)
@pytest.mark.parametrize("case", [c for c in CASES if c.name not in IMPRECISE], ids=str)
def test_all_together(case: Case) -> None:
    """One program with all quantities, which share what they can."""
    problem = case.build()
    quantities = [make(kind, name=key, **options) for key, (kind, options) in KINDS.items()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    for key in KINDS:
        check(key, result[key], problem)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str, key: str) -> None:
    """A program of its own, whose plan has nothing to share."""
    problem = BY_NAME[name].build()
    kind, options = KINDS[key]
    check(key, run(problem, kind, **options), problem)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["cnn", "attention", "cross_entropy_positions", "mlp_sum"])
def test_with_first_order(name: str) -> None:
    """Gradient and roots in one backward pass leave each other alone."""
    problem = BY_NAME[name].build()
    both = [tn.Grad(), tn.BatchGrad(), tn.Variance(), make("DiagGGN"), make("GGNTrace")]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), both)(problem.x, problem.y)
    for quantity in both:
        source = oracle if hasattr(oracle, quantity.name) else oracle_second
        want = getattr(source, quantity.name)(problem.model, problem.loss, problem.x, problem.y)
        assert_equal(result[quantity.name], want, quantity.name)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("name", ["cnn", "linear_rank4", "cross_entropy_ignore", "bce_with_logits"])
def test_another_batch_size(name: str, batch: int) -> None:
    """A program takes any batch size, and its scales follow."""
    small, other = BY_NAME[name].build(), replace(BY_NAME[name], batch=batch, seed=1).build()
    quantities = [make(kind, name=key, **options) for key, (kind, options) in KINDS.items()]
    program = tn.compile(other.model, small.loss, (small.x, small.y), quantities)
    result = program(other.x, other.y)
    for key in KINDS:
        check(key, result[key], other)


# Laws. Each says how diagonal, root product and traces answer to a change of the problem.


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> Case:
    model = lambda: seq(nn.Linear(3, 4), activation(), nn.Linear(4, 3))  # noqa: E731
    return Case("mlp", model, (3,), classes(3), nn.CrossEntropyLoss, batch=4)


def totals(problem: Problem) -> dict[str, dict[str, Tensor]]:
    """What belongs to the batch as a whole."""
    return {
        "diag": dict(run(problem, "DiagGGN")),
        "product": {name: G.sum(0) for name, G in products(run(problem, "SqrtGGN")).items()},
        "trace": {name: t.sum(0, keepdim=True) for name, t in run(problem, "GGNTrace").items()},
        "kflr": dense(problem, "KFLR"),
    }


def times(values: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("reduction, factor", [("mean", 1.0), ("sum", 2.0)])
def test_duplicated_data(reduction: str, factor: float) -> None:
    """Every sample twice: a mean stays, a sum doubles."""
    problem = replace(mlp(), loss=lambda: nn.CrossEntropyLoss(reduction=reduction)).build()
    twice = replace(problem, x=torch.cat([problem.x] * 2), y=torch.cat([problem.y] * 2))
    once, double = totals(problem), totals(twice)
    for key, values in once.items():
        assert_equal(double[key], times(values, factor), key)


def test_loss_times_a_constant() -> None:
    """c L has c times the GGN and c² times the empirical Fisher."""
    plain, scaled = (
        replace(mlp(), y=normal, loss=lambda c=c: Written(lambda f, y: c * F.mse_loss(f, y))).build()
        for c in (1.0, 2.5)
    )
    before, after = totals(plain), totals(scaled)
    for key, values in before.items():
        assert_equal(after[key], times(values, 2.5), key)
    ef = dense(plain, "KFAC", fisher="EMPIRICAL")
    assert_equal(dense(scaled, "KFAC", fisher="EMPIRICAL"), times(ef, 2.5**2), "empirical")


def test_permuted_batch() -> None:
    """The order of the samples is that of the per-sample values, and of nothing else."""
    problem = mlp().build()
    order = torch.tensor([2, 0, 3, 1])
    permuted = replace(problem, x=problem.x[order], y=problem.y[order])
    before, after = totals(problem), totals(permuted)
    for key, values in before.items():
        assert_equal(after[key], values, key)
    for kind, options in (("GGNTrace", {}), ("DiagGGN", {"per_sample": True})):
        values, moved = run(problem, kind, **options), run(permuted, kind, **options)
        assert_equal(moved, {name: value[order] for name, value in values.items()}, kind)
        assert all(error(moved[name], value) > DIFFERENT for name, value in values.items())


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_one_value_many_ways(dtype: torch.dtype, bound: float) -> None:
    """Squares of the root, sum over samples, traces: all agree."""
    problem = BY_NAME["cnn"].build()
    problem = replace(problem, model=problem.model.to(dtype), x=problem.x.to(dtype))
    quantities = [make(kind, name=key, **options) for key, (kind, options) in KINDS.items()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    for name, diagonal in result["diag_ggn"].items():
        single = result["diag_ggn_per_sample"][name]
        assert diagonal.dtype == dtype
        assert error(result["sqrt_ggn"][name].square().sum((0, 1)), diagonal) <= bound
        assert error(single.sum(0), diagonal) <= bound
        assert error(result["ggn_trace"][name], single.flatten(1).sum(1)) <= bound


@pytest.mark.thinned(3)
@pytest.mark.parametrize("activation, same", [(nn.ReLU, True), (nn.LeakyReLU, True), (nn.Tanh, False)])
def test_diagonal_of_the_hessian(activation: Callable[[], nn.Module], same: bool) -> None:
    """A piecewise linear net's GGN has the Hessian's diagonal; a tanh net's has not."""
    problem = mlp(activation).build()
    want = oracle_second.hessian_diag(problem.model, problem.loss, problem.x, problem.y)
    got = run(problem, "DiagGGN")
    if same:
        assert_equal(got, want, "diag_ggn")
    else:
        assert error(got["0.weight"], want["0.weight"]) > DIFFERENT
        assert error(got["2.weight"], want["2.weight"]) <= 1e-9


# Monte Carlo columns.

SAMPLED = (
    "cross_entropy", "cross_entropy_sum", "cross_entropy_weights", "cross_entropy_ignore", "cross_entropy_smoothing",
    "cross_entropy_positions", "cross_entropy_image", "merged_output", "mse_sum", "mse_rank4", "bce_with_logits",
    "bce_with_logits_weights",
)  # fmt: skip


def test_seeds() -> None:
    """The same seed gives the same columns, another one others; without one torch's own generator is drawn from."""
    problem = mlp().build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [make("DiagGGNMC", mc_samples=2)])

    def value(**noise: object) -> Tensor:
        return program(problem.x, problem.y, **noise)["diag_ggn_mc"]["0.weight"]

    zero = value(seed=0)
    assert torch.equal(zero, value(seed=0))
    assert torch.equal(zero, value(generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    assert torch.equal(zero, value())
    assert error(value(), zero) > DIFFERENT
    state = torch.random.get_rng_state()
    assert error(value(seed=1), zero) > DIFFERENT
    assert torch.equal(state, torch.random.get_rng_state())


def test_one_seed_one_draw() -> None:
    """All quantities of a program with as many samples see the same columns."""
    problem = mlp().build()
    quantities = [make(kind, mc_samples=3) for kind in ("SqrtGGNMC", "DiagGGNMC")]
    quantities.append(make("DiagGGNMC", name="single", mc_samples=3, per_sample=True))
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    result = program(problem.x, problem.y, seed=5)
    for name, V in result["sqrt_ggn_mc"].items():
        assert V.shape[:2] == (3, len(problem.x))
        assert error(V.square().sum((0, 1)), result["diag_ggn_mc"][name]) <= 1e-12
        assert error(V.square().sum(0), result["single"][name]) <= 1e-12


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", SAMPLED)
def test_mean_is_the_ggn(name: str) -> None:
    """Many samples of the model's own distribution give the GGN of each loss, off the diagonal too."""
    problem = BY_NAME[name].build()
    got = products(run(problem, "SqrtGGNMC", seed=0, mc_samples=20_000))
    assert_equal(got, oracle_second.ggn_blocks(problem.model, problem.loss, problem.x, problem.y), name, bound=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DiagGGNMC", "KFAC"])
def test_rate(kind: str) -> None:
    """The error falls as 1/sqrt(M): by 4 for 16 times the samples, twice in a row, so there is no bias."""
    problem = mlp().build()
    exact = run(problem, "DiagGGN") if kind == "DiagGGNMC" else dense(problem, "KFLR")
    errors = [_mean_error(problem, kind, exact, samples) for samples in (4, 64, 1024)]
    for coarse, fine in pairwise(errors):
        assert 2.7 < coarse / fine < 5.9, errors


def test_seeds_are_independent() -> None:
    """The mean over 256 seeds of one sample is 16 times as close as one seed."""
    problem = mlp().build()
    exact = run(problem, "DiagGGN")["0.weight"]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [make("DiagGGNMC", mc_samples=1)])
    draws = torch.stack([program(problem.x, problem.y, seed=s)["diag_ggn_mc"]["0.weight"] for s in range(256)])
    single = (draws - exact).flatten(1).norm(dim=1).mean()
    assert 8 < single / (draws.mean(0) - exact).norm() < 32


def _mean_error(problem: Problem, kind: str, exact: Mapping[str, Tensor], samples: int, seeds: int = 24) -> float:
    """Distance to the exact value, averaged over seeds and summed over parameters."""
    quantity = make(kind, name="sampled", mc_samples=samples)
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [quantity])
    found = 0.0
    for seed in range(seeds):
        for name, value in program(problem.x, problem.y, seed=seed)["sampled"].items():
            matrix = value if isinstance(value, Tensor) else value.to_dense()
            found += float((matrix - exact[name]).norm()) / seeds
    return found


# Edges: finite and right.


@pytest.mark.thinned(3)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_saturated_logits(size: float) -> None:
    """p = 0 or 1 in float32: the GGN is zero up to rounding, never nan."""
    problem = mlp().build()
    model = seq(problem.model.float(), Apply(lambda f: size * f))
    saturated = Problem(model, problem.loss.float(), problem.x.float(), problem.y)
    for kind in ("SqrtGGN", "DiagGGN", "DiagGGNMC", "SqrtGGNMC", "GGNTrace"):
        for name, value in run(saturated, kind).items():
            assert torch.isfinite(value).all(), f"{kind} of {name}"
    for kind in ("KFLR", "KFAC"):
        for name, value in dense(saturated, kind).items():
            assert torch.isfinite(value).all(), f"{kind} of {name}"


@pytest.mark.parametrize("kind", ["DiagGGN", "GGNTrace", "DiagGGNMC"])
def test_one_class(kind: str) -> None:
    """Cross-entropy of one class is zero, and so is its Hessian."""
    problem = replace(mlp(), model=lambda: nn.Linear(3, 1), y=classes(1)).build()
    assert all(value.abs().max() == 0 for value in run(problem, kind).values())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["DiagGGN", "GGNTrace", "KFLR"])
def test_perfect_fit(kind: str) -> None:
    """A batch without gradient has the GGN of any other targets; its empirical Fisher is zero."""
    problem = replace(mlp(), y=normal, loss=nn.MSELoss).build()
    fitted = replace(problem, y=problem.model(problem.x).detach())
    values = dense if kind == "KFLR" else run
    assert_equal(values(fitted, kind), values(problem, kind), kind)
    assert all(value.abs().max() == 0 for value in dense(fitted, "KFAC", fisher="EMPIRICAL").values())


class Bumps(nn.Module):
    """Curvature of both signs, elementwise."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return torch.cos(output - y).mean()


class Ratio(nn.Module):
    """And mixed between outputs."""

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        gap = (output - y).square().sum(1)
        return (gap / (1 + gap)).mean()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("loss", [Bumps, Ratio])
@pytest.mark.parametrize("kind", ["DiagGGN", "DiagGGNMC", "KFLR", "SqrtGGN"])
def test_indefinite_losses_are_refused_or_clipped(loss: Callable[[], nn.Module], kind: str) -> None:
    """Clipped: the GGN of the loss Hessian without its negative eigenvalues."""
    problem = replace(mlp(), y=normal, loss=loss).build()
    batch = (problem.x, problem.y)
    with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
        tn.compile(problem.model, problem.loss, batch, [make(kind)])(*batch)
    result = tn.compile(problem.model, problem.loss, batch, [make(kind)], indefinite=tn.Indefinite.CLIP)(*batch)
    if kind != "DiagGGN":
        return
    output = problem.model(problem.x).detach()
    H = torch.func.hessian(lambda f: problem.loss(f, problem.y))(output)
    blocks = torch.stack([H[n, :, n] for n in range(len(output))])
    values, vectors = torch.linalg.eigh(blocks)
    positive = vectors * values.clamp(min=0).unsqueeze(1) @ vectors.mT
    for name, J in oracle_second.jacobians(problem.model, problem.x).items():
        want = torch.einsum("nfp,nfg,ngp->p", J, positive, J)
        assert error(result["diag_ggn"][name].reshape(-1), want) <= 1e-9, name


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for the rounds, and the same numbers."""
    problem = replace(mlp(), batch=200).build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.DiagGGN()])
    assert "in progress(" in program.source
    rounds: list[int] = []

    def track(rows: list[Tensor], total: int, **options: object) -> list[Tensor]:
        rounds.append(total)
        return rows

    monkeypatch.setattr("tnbackprop.runtime.progress.track", track)
    plain, followed = program(problem.x, problem.y), program(problem.x, problem.y, progress=True)
    assert_equal(followed["diag_ggn"], dict(plain["diag_ggn"]), "with a bar", 0.0)
    assert rounds == [2]  # three classes
