"""All second-order quantities in one program: their answers to a change of batch, loss or layout, and edges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from .. import oracle_second
from ..cases import Case, classes, normal, seq, unit
from ..models import Apply, Written
from ..second_order import (
    ALL,
    DIFFERENT,
    TOLERANCE,
    Values,
    assert_equal,
    compiled,
    dense,
    error,
    everything,
    everything_of,
    make,
    mlp,
    products,
    run,
    tensors,
)

SAMPLED = ("SqrtGGNMC", "DiagGGNMC", "KFAC")


# Every quantity's answer to a change of the problem.

CHANGES: Mapping[str, tuple[str, str]] = {
    # key: axes of samples, power of the loss's factor
    "diag": ("", "1"),
    "trace": ("0", "1"),
    "sqrt": ("0", "1"),
    "gram": ("1 3", "1"),
    "hessian": ("", "1"),
    "hesscale": ("", "1"),
    "bl89": ("", "1"),
    "kflr": ("", "1"),
    "kfra": ("", "1"),
    "empirical": ("", "2"),
    "jacobians": ("0", "0"),
    "ntk": ("0 2", "0"),
}


def reordered(values: Values, key: str, order: Tensor) -> dict[str, Tensor]:
    """The samples in another order, or some of them twice."""
    for axis in map(int, CHANGES[key][0].split()):
        values = {name: value.index_select(axis, order) for name, value in values.items()}
    return dict(values)


def times(values: Values, factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in values.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_samples_permuted_and_doubled(reduction: str) -> None:
    """Of a mean, what belongs to a sample halves and what belongs to the batch stays; of a sum it stays and doubles."""
    problem = mlp(lambda: nn.CrossEntropyLoss(reduction=reduction)).build()
    program = compiled(problem)
    before = everything_of(program, problem)
    for indices in ([2, 0, 1], [0, 1, 2, 0, 1, 2]):
        order, copies = torch.tensor(indices), len(indices) // 3
        after = everything_of(program, replace(problem, x=problem.x[order], y=problem.y[order]))
        for key, values in before.items():
            axes, power = CHANGES[key]
            factor = 1.0 if power == "0" else (1 / copies if reduction == "mean" else 1.0) * (1 if axes else copies)
            assert_equal(after[key], times(reordered(values, key, order), factor), key)
            if axes and copies == 1:
                assert error(after[key]["0.weight"], values["0.weight"]) > DIFFERENT, key


def test_loss_times_a_constant() -> None:
    """c for what is linear in the loss, c² for the empirical Fisher, nothing for what needs no loss."""
    before, after = (
        everything(mlp(lambda c=c: Written(lambda f, y: c * F.cross_entropy(f, y))).build()) for c in (1.0, 2.5)
    )
    for key, values in before.items():
        assert_equal(after[key], times(values, 2.5 ** int(CHANGES[key][1])), key)


@pytest.mark.slow
def test_linear_is_a_1x1_convolution() -> None:
    """On [N, S, D] and [N, D, H, W], with the same weights: all quantities."""
    model = lambda: seq(nn.Linear(2, 2), nn.Sigmoid(), Apply(lambda t: t.sum(1) / 2), nn.Linear(2, 2))  # noqa: E731
    linear = Case("linear", model, (4, 2), normal, nn.MSELoss, 2).build()
    pooled = Apply(lambda t: t.flatten(2).sum(2) / 2)
    convolution = seq(nn.Conv2d(2, 2, 1), nn.Sigmoid(), pooled, nn.Linear(2, 2)).double()
    with torch.no_grad():
        for mine, other in zip(convolution.parameters(), linear.model.parameters(), strict=True):
            mine.copy_(other.reshape(mine.shape))
    image = linear.x.transpose(1, 2).reshape(2, 2, 2, 2)
    left, right = everything(linear), everything(replace(linear, model=convolution, x=image))
    for key, values in left.items():
        found = {name: value.reshape(values[name].shape) for name, value in right[key].items()}
        assert_equal(found, values, key)


# Edges: finite and right, whatever is asked for.


SATURATED = (
    (nn.CrossEntropyLoss, ((200, 199, -200), (-200, 200, 199), (200, -200, 199), (300, 0, 1), (0, 1, 300))),
    (nn.BCEWithLogitsLoss, ((-200, 0, 1), (200, 0, -1))),
)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("loss, biases", SATURATED)
def test_saturated_logits(loss: Callable[[], nn.Module], biases: tuple[tuple[float, ...], ...]) -> None:
    """p = 0 or 1 in float32, at each place: the numbers of float64, and of the oracle."""
    problem = (mlp() if loss is nn.CrossEntropyLoss else replace(mlp(loss), y=unit)).build()
    sampled = {kind: (kind, {}) for kind in SAMPLED}
    y = problem.y.float() if problem.y.is_floating_point() else problem.y
    single = replace(problem, model=copy.deepcopy(problem.model).float(), x=problem.x.float(), y=y)
    programs = [compiled(each, ALL | sampled) for each in (problem, single)]
    for bias in biases:
        with torch.no_grad():
            for each in (problem, single):
                each.model[-1].bias.copy_(torch.tensor(bias))
        want, found = (everything_of(*pair) for pair in zip(programs, (problem, single), strict=True))
        for key, oracle in (("diag", oracle_second.diag_ggn), ("hessian", oracle_second.hessian_diag)):
            assert_equal(want[key], oracle(problem.model, problem.loss, problem.x, problem.y), key)
        for key in ALL:
            assert_equal({name: v.double() for name, v in found[key].items()}, want[key], key, bound=1e-4)
        assert all(torch.isfinite(v).all() for kind in SAMPLED for v in found[kind].values())


LOSSLESS = {"jacobians", "ntk"}


def test_one_class() -> None:
    """Cross-entropy of one class is zero: so is everything but what needs no loss."""
    found = everything(mlp(outputs=1).build())
    found |= {kind: tensors(run(mlp(outputs=1).build(), kind, seed=0)) for kind in ("SqrtGGNMC", "DiagGGNMC", "KFAC")}
    for key, values in found.items():
        assert all((not value.any()) != (key in LOSSLESS) for value in values.values()), key


def sum_of_outputs(f: Tensor, y: Tensor) -> Tensor:
    """One direction of the output has curvature: a Hessian of rank one."""
    return ((f.sum(1) - y.sum(1)) ** 2).mean()


def linear(f: Tensor, y: Tensor) -> Tensor:
    """None has."""
    return (f * y).sum() / f.shape[0]


@pytest.mark.slow
@pytest.mark.parametrize("loss, rank", [(sum_of_outputs, 1), (linear, 0)])
def test_rank_deficient_hessians(loss: Callable[[Tensor, Tensor], Tensor], rank: int) -> None:
    problem = replace(mlp(lambda: Written(loss)), y=normal).build()
    arguments = (problem.model, problem.loss, problem.x, problem.y)
    found = everything(problem, {key: ALL[key] for key in ("sqrt", "diag", "hessian")})
    for key, want in (
        ("sqrt", oracle_second.ggn_blocks(*arguments)),
        ("diag", oracle_second.diag_ggn(*arguments)),
        ("hessian", oracle_second.hessian_diag(*arguments)),
    ):
        assert_equal(found[key], want, key)
    one = replace(problem, x=problem.x[:1], y=problem.y[:1])
    block = oracle_second.ggn(one.model, one.loss, one.x, one.y)
    for kind in ("KFLR", "KFRA"):
        assert_equal(dense(one, kind), block, kind)
        ranks = [int((torch.linalg.eigvalsh(matrix) > 1e-9).sum()) for matrix in dense(one, kind).values()]
        assert ranks == [rank] * 4


def test_perfect_fit() -> None:
    """Without a gradient: the empirical Fisher is zero and can be inverted with damping, the Hessian is the GGN."""
    problem = replace(mlp(nn.MSELoss), y=normal).build()
    fitted = replace(problem, y=problem.model(problem.x).detach())
    before, after = everything(problem), everything(fitted)
    for key, values in after.items():
        if key == "empirical":
            assert not any(value.any() for value in values.values())
        elif key in ("hessian", "hesscale", "bl89"):
            assert error(values["0.weight"], before[key]["0.weight"]) > DIFFERENT, key
        else:
            assert_equal(values, before[key], key)
    assert_equal(after["hessian"], after["diag"], "zero residual")
    inverse = run(fitted, "KFAC", fisher="EMPIRICAL")["0.weight"].inverse(0.5).to_dense()
    assert error(inverse, 2 * torch.eye(12, dtype=torch.float64)) <= TOLERANCE


class Ratio(nn.Module):
    """Curvature of both signs, mixed between the outputs."""

    reduction = "mean"

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        gap = (output - y).square().sum(1)
        return (gap / (1 + gap)).mean()


def signed() -> nn.Module:
    """And elementwise, from a rule."""
    return nn.BCEWithLogitsLoss(torch.tensor([1.0, -0.8, 2.0]))


ROOTS = ("SqrtGGNMC", "GGNTrace", "GGNGram", "KFAC", "KFRA")


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Ratio, signed])
def test_indefinite_losses(loss: Callable[[], nn.Module]) -> None:
    """Everything with a root refuses, or takes the positive part; what has none is right."""
    problem = replace(mlp(loss, batch=2), y=normal, seed=1).build()
    batch = (problem.x, problem.y)
    output = problem.model(problem.x).detach()
    H = torch.func.hessian(lambda f: problem.loss(f, problem.y))(output)
    values, vectors = torch.linalg.eigh(torch.stack([H[n, :, n] for n in range(len(output))]))
    assert values.min() < -10 * DIFFERENT < 10 * DIFFERENT < values.max()
    positive = vectors * values.clamp(min=0).unsqueeze(1) @ vectors.mT
    J = oracle_second.jacobians(problem.model, problem.x)
    blocks = {name: j.mT @ positive @ j for name, j in J.items()}
    for kind in ROOTS:
        with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
            run(problem, kind)
    quantities = [make("SqrtGGN"), make("GGNTrace"), make("SqrtGGNMC", mc_samples=20_000)]
    clipped = tn.compile(problem.model, problem.loss, batch, quantities, indefinite=tn.Indefinite.CLIP)(*batch, seed=0)
    assert_equal(products(clipped["sqrt_ggn"]), blocks, "root")
    assert_equal(clipped["ggn_trace"], {k: b.diagonal(dim1=1, dim2=2).sum(1) for k, b in blocks.items()}, "trace")
    assert_equal(products(clipped["sqrt_ggn_mc"]), blocks, "sampled", bound=0.08)
    one = (problem.x[:1], problem.y[:1])
    factors = [make("KFLR"), make("KFRA")]
    result = tn.compile(problem.model, problem.loss, one, factors, indefinite=tn.Indefinite.CLIP)(*one)
    for kind in ("kflr", "kfra"):
        alone = {name: 2 * block[0] for name, block in blocks.items()}  # the mean over one of the two samples
        assert_equal(tensors(result[kind]), alone, kind)
    exact = oracle_second.hessian_diag(problem.model, problem.loss, problem.x, problem.y)
    scaled = run(problem, "HesScale")
    assert error(scaled["2.weight"], exact["2.weight"]) <= TOLERANCE
    # A loss that does not mix outputs is diagonal one layer further back.
    gap = error(scaled["0.weight"], exact["0.weight"])
    assert gap > DIFFERENT if loss is Ratio else gap <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("mixed", [True, False])
def test_signs_do_not_depend_on_the_scale(mixed: bool, scale: float) -> None:
    """Small negative curvature is refused, the rounding of large positive curvature is not."""

    def loss(convex: bool) -> nn.Module:
        if mixed:
            return Written(lambda f, y: scale * (sum_of_outputs(f, y) if convex else Ratio()(f, y)))
        return nn.BCEWithLogitsLoss(scale * torch.tensor([1.0, 0.8 if convex else -0.8, 2.0]))

    convex, concave = (replace(mlp(partial(loss, c)), y=unit).build() for c in (True, False))
    want = oracle_second.diag_ggn(convex.model, convex.loss, convex.x, convex.y)
    assert_equal(times(run(convex, "DiagGGN"), 1 / scale), times(want, 1 / scale), "convex")
    with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
        run(concave, "DiagGGN")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["diag", "hesscale", "kflr", "empirical"])
def test_within_a_memory_limit(key: str) -> None:
    """Columns in rounds or slices of the batch: the peak is met with the same values, at any batch size."""
    layers = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 5),
    )
    problem = Case("limited", lambda: seq(*layers), (2, 4, 4), classes(5), nn.CrossEntropyLoss, 12).build()
    kind, options = ALL[key]
    free = compiled(problem, {key: ALL[key]})
    limit = int(0.7 * free.peak_bytes)
    batch = (problem.x, problem.y)
    program = tn.compile(problem.model, problem.loss, batch, [make(kind, name=key, **options)], memory_limit=limit)
    assert program.peak_bytes <= limit
    for size in (12, 5, 1):
        part = replace(problem, x=problem.x[:size], y=problem.y[:size])
        assert_equal(everything_of(program, part)[key], everything_of(free, part)[key], f"{key} of {size}")
