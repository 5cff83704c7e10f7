"""Results of batches that are merged, against that of the data in one batch: every quantity, splits, losses."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ..models import TiedAutoencoder

N = 7
SPLITS = {"equal": (3, 3, 1), "unequal": (2, 5), "one by one": (1,) * N, "one": (N,)}
S = tn.Scale
SUMS: dict[str, tn.Quantity] = {
    q.name: q
    for q in (
        tn.Grad(), tn.BatchGrad(), tn.BatchGrad("batch_grad_u", S.UNSCALED), tn.BatchL2(), tn.BatchL2("u", S.UNSCALED),
        tn.SecondMoment(), tn.SecondMoment("moment_b", S.BACKPACK), tn.Variance(), tn.Variance("var_b", S.BACKPACK),
        tn.Variance("variance_c", centred=True), tn.Total(tn.BatchL2()), tn.Total(tn.BatchL2("l2"), str, "each"),
        tn.AxisMoments(individual=True), tn.KFAC("empirical", fisher=tn.Fisher.EMPIRICAL), tn.ClippedGrad(max_norm=0.5),
        tn.ClippedGrad("clipped_each", 0.5, tn.Clipping.PER_PARAMETER), tn.Sketch(size=3), tn.DirectionalGrad(),
        tn.DirectionalCurvature(), tn.DirectionalRoot(), tn.SqrtGGN(), tn.DiagGGN(), tn.DiagGGN("each_diag", True),
        tn.GGNTrace(), tn.Total(tn.GGNTrace()), tn.KFLR(), tn.KFLR("joined", bias=tn.Bias.JOINED),
        tn.KFLR("reduced", tn.Sharing.REDUCE), tn.HessianDiag(), tn.HessianDiag("each_hessian", True), tn.HesScale(),
        tn.BL89(), tn.Jacobians(), tn.InputGrad(), tn.DiagGGN("labels", root=tn.Labels()),
        tn.SqrtGGN("one", root=tn.Labels()),
    )
}  # fmt: skip


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x)).mean(1))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    without: tuple[str, ...] = ()  # what it does not have


NETS = {
    "linear": Net(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), lambda: torch.randn(N, 3)),
    "conv": Net(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)),
        lambda: torch.randn(N, 1, 3, 3),
    ),
    "tied": Net(
        lambda: nn.Sequential(TiedAutoencoder(), nn.Linear(4, 3)), lambda: torch.randn(N, 4), ("reduced", "sketch")
    ),
    "embedding": Net(Embedded, lambda: torch.randint(5, (N, 4)), ("joined", "sketch", "input_grad")),
}
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "squares": nn.MSELoss(),
}


def targets(loss: nn.Module) -> Tensor:
    return torch.randn(N, 3).double() if isinstance(loss, nn.MSELoss) else torch.randint(3, (N,))


def compiled(model: nn.Module, loss: Any, x: Tensor, y: Tensor, quantities: list[tn.Quantity]) -> tn.Program:
    return tn.compile(model, loss, (x, y), quantities, check=False)


def leaves(result: tn.Result) -> dict[str, Tensor]:
    found = {"loss": result.loss, "output": result.output}
    for quantity, by in result.items():
        for name, value in by.items():
            for k, each in enumerate(value.factors if isinstance(value, tn.KroneckerFactors) else (value,)):
                found[f"{quantity} of {name} {k}"] = each
    return found


def close(got: tn.Result, want: tn.Result) -> None:
    one, two = leaves(got), leaves(want)
    assert list(one) == list(two) and got.count == want.count
    for what, value in two.items():
        assert one[what].shape == value.shape, what
        error = (one[what] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error < 1e-10, f"{what}: {error:.3g}"


def halves(tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(each.split(sizes) for each in tensors), strict=True))


def case_of(net: str, loss: str) -> tuple[tn.Program, Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    case, function = NETS[net], LOSSES[loss]
    model, x = case.make().double(), case.x()
    x = x.double() if x.is_floating_point() else x
    y = targets(function)
    names = [name for name in SUMS if name not in case.without]
    program = compiled(model, function, x, y, [SUMS[name] for name in names])
    return program, x, y, program.some_operands(x, y)


QUICK = [("linear", "mean"), ("linear", "sum"), ("conv", "squares"), ("tied", "sum"), ("embedding", "mean")]
EVERY = [
    pytest.param(net, loss, marks=[] if (net, loss) in QUICK else [pytest.mark.slow]) for net in NETS for loss in LOSSES
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("net", "loss"), EVERY)
def test_every_quantity(net: str, loss: str) -> None:
    program, x, y, operands = case_of(net, loss)
    whole = program(x, y, operands=operands)
    for sizes in SPLITS.values():
        close(tn.over(program, halves((x, y), sizes), operands=operands), whole)
    results = [program(*each, operands=operands) for each in halves((x, y), SPLITS["unequal"])]
    before = {name: value.clone() for name, value in leaves(results[0]).items()}
    close(reduce(tn.Result.merge, results), whole)
    assert all(torch.equal(value, before[name]) for name, value in leaves(results[0]).items())


# Means over what is kept.

X, LABELS = torch.randn(N, 3, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 1, 2, 0, 1, 2, 1])
KEPT = torch.tensor([0, -100, 2, -100, -100, 2, 1])
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()
DIVIDED = {
    "ignored": (nn.CrossEntropyLoss(), KEPT),
    "weights": (nn.CrossEntropyLoss(WEIGHTS), LABELS),
    "both, smoothed": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), KEPT),
    "nll": (lambda f, y: F.nll_loss(F.log_softmax(f, 1) * 1.0, y, WEIGHTS), KEPT),
    "log": (lambda f, y: F.nll_loss(f.sigmoid().log(), y), LABELS),
    "flattened": (lambda f, y: 2 * F.cross_entropy(f.reshape(-1, 3), y.reshape(-1)), KEPT),
    "probabilities": (nn.CrossEntropyLoss(WEIGHTS), torch.softmax(X, 1)),
}


QUANTITIES = [
    tn.Grad(), tn.BatchGrad("u", S.UNSCALED), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.DiagGGN(),
    tn.SqrtGGN(), tn.KFAC(fisher=tn.Fisher.EMPIRICAL), tn.KFLR(), tn.HesScale(),
]  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", DIVIDED)
def test_means_over_what_is_kept(kind: str) -> None:
    """Also of batches without a label: their loss is 0/0, and they add nothing."""
    loss, y = DIVIDED[kind]
    by_eigh = kind in ("nll", "log", "flattened")  # off by a root of rounding
    program = compiled(MODEL, loss, X, y, [q for q in QUANTITIES if q.name != "sqrt_ggn" or not by_eigh])
    for sizes in SPLITS.values():
        close(tn.over(program, halves((X, y), sizes)), program(X, y))


def test_a_mean_over_what_is_kept_with_other_terms() -> None:
    """They have one scale only where every batch keeps the same part."""
    loss = lambda f, y: F.cross_entropy(f, y) + 0.5 * f.square().mean()  # noqa: E731
    program = compiled(MODEL, loss, X, LABELS, [tn.Grad()])
    close(tn.over(program, halves((X, LABELS), (3, 4))), program(X, LABELS))
    with pytest.raises(tn.InputError, match="the loss cannot be merged: the loss has a mean over the kept labels, and"):
        tn.over(program, halves((X, KEPT), (3, 4)))
    clipped = compiled(MODEL, nn.CrossEntropyLoss(), X, LABELS, [tn.ClippedGrad()])
    with pytest.raises(tn.InputError, match=r"'clipped_grad' of '2.weight' cannot be merged: the loss has a mean over"):
        tn.over(clipped, halves((X, KEPT), (3, 4)))


# What is derived for quantities of one's own, and what is refused.


@dataclass(frozen=True)
class Own(tn.Quantity):
    """A quantity of one's own, by the algebra."""

    name: str = "own"
    by: Callable[[Any], tn.Diagram] = lambda G: G

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return self.by(J.T @ g)


def centred(G: Any) -> Any:
    return (G * 3 - (G * 3).sum("n") / tn.N).part()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("by", [
    lambda G: (G * G * G).sum("n") * tn.N**2,
    lambda G: (G * G * G.sum_parameter()).sum("n") / tn.N,
    lambda G: (centred(G) * centred(G)).sum("n") * 5 * tn.N,
])  # fmt: skip
def test_own_quantities(by: Callable[[Any], tn.Diagram], reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    for y in (LABELS, KEPT):
        program = compiled(MODEL, loss, X, y, [tn.Grad(), Own(by=by)])
        close(tn.over(program, halves((X, y), (2, 4, 1))), program(X, y))


PAIRS = "it has every pair of samples, and none of two samples of different batches"
SUMS_OF = "it multiplies sums over the batch, and those of two batches do not tell it"
MADE = "what is made of its totals depends on the whole batch"
REFUSED = {
    "dots": (tn.BatchDot(), PAIRS),
    "gram": (tn.GGNGram(), PAIRS),
    "kernel": (tn.NTK(), PAIRS),
    "averaged": (tn.KFRA(), SUMS_OF),
    "of the gradient": (tn.AxisMoments(), SUMS_OF),
    "solved": (tn.NaturalGradientSMW(), MADE),
    "of the mean norm": (tn.ClippedGrad(mode=lambda norms: norms / norms.mean()), MADE),
    "alone": (tn.Variance(), r"deviations are from the mean of a batch.*\n.*tn.Grad\(\)"),
    "square": (Own(by=lambda G: G.sum("n") * G.sum("n")), SUMS_OF),
    "rows": (Own(by=lambda G: centred(G)), "it adds terms with different powers of the number of samples"),
    "unbiased": (Own(by=lambda G: (G * G).sum("n") / (tn.N - 1)), r"its scale 1/\(N - 1\) is no power of the number"),
    "two": (Own(by=lambda G: (G * G).sum("n") + G.sum("n")), "it adds terms with different powers of the number"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_two_batches_do_not_tell(kind: str) -> None:
    quantity, why = REFUSED[kind]
    program = compiled(MODEL, nn.CrossEntropyLoss(), X, LABELS, [quantity])
    with pytest.raises(tn.InputError, match=f"'{quantity.name}' of '[02].weight' cannot be merged: {why}"):
        tn.over(program, halves((X, LABELS), (3, 4)))


def test_it_is_told() -> None:
    quantities = [tn.Grad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.BatchDot(), tn.KFLR()]
    text = compiled(MODEL, nn.CrossEntropyLoss(), X, LABELS, quantities).explain()
    for line in (
        "grad: added, each with its s",
        "batch_l2: one after the other, each with its s^2",
        "second_moment: added, each with its N s^2",
        "variance: by moments, with the mean that grad has",
        f"batch_dot: not merged: {PAIRS}",
        "kflr: added, each with its s, added, each with its N^-1; or added, each with its s",
    ):
        assert f"\n{line}\n" in text


def test_factors_of_axes_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(N, 2, 3, 3).double()
    program = compiled(model, nn.CrossEntropyLoss(), x, LABELS, [tn.KFLR(largest=6)])
    with pytest.raises(tn.InputError, match=r"'kflr' of '0.weight' .*an axis that was cut out of another factor"):
        tn.over(program, halves((x, LABELS), (3, 4)))


class Averaging(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[0]


class Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.detach().amax()


OTHER = {
    "divided": (MODEL, lambda f, y: ((f - 1) ** 2).sum() / y.double().sum(), "divided by what depends on the whole"),
    "two divisors": (MODEL, lambda f, y: F.cross_entropy(f, y) + F.cross_entropy(-f, y), "divided by what depends on"),
    "constant": (MODEL, lambda f, y: f.square().sum() + 1, "the loss has terms that belong to no sample"),
    "sizes": (nn.Sequential(*MODEL, Averaging()), nn.CrossEntropyLoss(), "computes with the number of samples"),
    "largest": (nn.Sequential(*MODEL, Centring()), nn.CrossEntropyLoss(), "amax, which is computed of the whole batch"),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", OTHER)
def test_what_depends_on_the_batch(kind: str) -> None:
    model, loss, why = OTHER[kind]
    program = compiled(model, loss, X, LABELS, [tn.Grad()])
    with pytest.raises(tn.InputError, match=f"cannot be merged: .*{why}"):
        tn.over(program, halves((X, LABELS), (3, 4)))


def test_other_programs() -> None:
    """Nothing is merged where something differs."""
    mean, sums = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    first = tn.compute(MODEL, mean, (X, LABELS), [tn.Grad(), tn.BatchL2()])
    assert first.count == N
    for quantities, loss, why in (
        ([tn.Grad()], mean, "'batch_l2' is BatchL2.* in one result and not there in the other"),
        ([tn.Grad(), tn.BatchL2(scale=S.UNSCALED)], mean, "'batch_l2' is BatchL2.*PAPER.* and BatchL2.*UNSCALED.* in"),
        ([tn.Grad(), tn.BatchL2()], sums, "programs with other losses or models"),
    ):
        with pytest.raises(tn.InputError, match=why):
            first.merge(tn.compute(MODEL, loss, (X, LABELS), quantities))
    with pytest.raises(tn.InputError, match=r"'0.weight' is torch.float64 on cpu in one result and torch.float32"):
        first.merge(first.to(dtype=torch.float32))
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(tn.InputError, match=r"'0.weight' is \[4, 3\] in one result and \[5, 3\] in the other"):
        first.merge(tn.compute(other, mean, (X, LABELS), [tn.Grad(), tn.BatchL2()]))
    with pytest.raises(tn.InputError, match=r"merge: int is no tn.Result"):
        first.merge(3)  # type: ignore[arg-type]
    with pytest.raises(tn.InputError, match="does not know what it was computed of"):
        first.merge(tn.Result(None, None, {}))
    assert first.count == N


def test_halves_merge() -> None:
    """Of backward passes: without an output, and with what the loss was divided by; and of handed cotangents."""
    program = compiled(MODEL, nn.CrossEntropyLoss(), X, KEPT, QUANTITIES)
    whole = program.backward(program.forward(X)[1], KEPT)
    parts = [program.backward(program.forward(x)[1], y) for x, y in halves((X, KEPT), (2, 5))]
    one, two = (leaves(each) for each in (reduce(tn.Result.merge, parts), whole))
    assert all(torch.allclose(one[what], two[what], rtol=1e-10, atol=1e-12) for what in two if what != "output")
    with pytest.raises(tn.InputError, match="the outputs of the results have different structures"):
        whole.merge(program(X, KEPT))
    handed = tn.compile(MODEL, tn.HANDED, X, [tn.Grad(), tn.BatchL2()], check=False)
    found = tn.over(handed, halves((X, X + 1), (3, 4)))
    assert torch.allclose(found["grad"]["0.weight"], handed(X, X + 1)["grad"]["0.weight"], atol=1e-12)


def test_states_merge() -> None:
    """Of another process, say; with what the loss was divided by."""
    program = compiled(MODEL, nn.CrossEntropyLoss(), X, KEPT, [*QUANTITIES, tn.KFLR("joined", bias=tn.Bias.JOINED)])
    one, two = (program(*each) for each in halves((X, KEPT), (3, 4)))
    file = io.BytesIO()
    torch.save((one.state_dict(), two), file)
    file.seek(0)
    state, loaded = torch.load(file, weights_only=True)
    close(tn.Result.from_state_dict(state).merge(loaded), program(X, KEPT))


# A loader.


def test_batches_of_a_loader() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).double()
    program = compiled(model, nn.MSELoss(), X, X, [tn.Grad(), tn.DiagGGNMC(), tn.WeightedGrad()])
    weights = torch.arange(N).double()
    whole = program(X, X, seed=0, operands={"weights": weights})
    rows = halves((X, X, weights), (3, 4))
    parts = iter(rows)
    found = tn.over(program, (each[:2] for each in rows), seed=0, operands=lambda _: {"weights": next(parts)[2]})
    for name in ("grad", "weighted_grad"):
        assert torch.allclose(found[name]["0.weight"], whole[name]["0.weight"], atol=1e-12)
    fixed = [tn.over(program, halves((X, X), (7,)), seed=0, operands={"weights": weights}) for _ in range(2)]
    drawn = [each["diag_ggn_mc"]["0.weight"] for each in (whole, *fixed)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
    same = [(X[:1], X[:1])] * 400  # its draws are new ones for every batch: their mean is exact
    few = compiled(model, nn.MSELoss(), X, X, [tn.DiagGGN(), tn.DiagGGNMC()])
    many = tn.over(few, same, seed=0)
    exact, mean = (many[name]["0.weight"] for name in ("diag_ggn", "diag_ggn_mc"))
    assert 1e-6 < (mean - exact).abs().max() / exact.abs().max() < 0.3


def test_a_bar() -> None:
    pytest.importorskip("rich")
    program = compiled(MODEL, nn.CrossEntropyLoss(), X, LABELS, [tn.Grad()])
    close(tn.over(program, halves((X, LABELS), (3, 4)), progress=True), program(X, LABELS))


def test_dict_batches() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            f = self.net(x)
            return {"logits": f, "each": F.cross_entropy(f, labels, reduction="none")}

    model = Named().double()
    loss = lambda output, _: output["each"].mean()  # noqa: E731
    batch = {"x": X, "labels": LABELS}
    program = tn.compile(model, loss, (batch, None), [tn.Grad(), tn.BatchL2()], check=False)
    parts = [{key: value[k] for key, value in batch.items()} for k in (slice(3), slice(3, 7))]
    whole, found = program(batch), tn.over(program, parts)
    assert torch.allclose(found["batch_l2"]["net.weight"], whole["batch_l2"]["net.weight"], rtol=1e-12)
    assert {key: value.shape for key, value in found.output.items()} == {"logits": (N, 3), "each": (N,)}
