"""Heads over many classes: what has as many elements as the logits is stored seldom, and never one-hot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.rules.loss import softmax_draw

SAMPLES, POSITIONS, FEATURES = 4, 32, 4


class Language(nn.Module):
    """A table, a layer and a head, which may be the table again."""

    def __init__(self, classes: int, features: int = FEATURES, tied: bool = False) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(classes, features), nn.Linear(features, features)
        self.head = nn.Linear(features, classes, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.table(x))))


def by_position(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def compiled(
    quantity: tn.Quantity, classes: int, tied: bool = False, **options: Any
) -> tuple[tn.Program, Tensor, Tensor, Language]:
    torch.manual_seed(0)
    model = Language(classes, tied=tied)
    x, y = (torch.randint(classes, (SAMPLES, POSITIONS)) for _ in range(2))
    return tn.compile(model, by_position, (x, y), [quantity], **options), x, y, model


@pytest.mark.thinned(3)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantity", [tn.Grad(), tn.BatchL2()], ids=lambda q: q.name)
def test_there_are_two_values_as_large_as_the_logits(quantity: tn.Quantity, tied: bool) -> None:
    """The logits, which are given back, and what the loss sends back to them; individual gradients are an eighth."""
    classes = 2000
    program = compiled(quantity, classes, tied)[0]
    logits = SAMPLES * POSITIONS * classes * 4
    assert program.peak_bytes <= 2.3 * logits, program.source


def weighted(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy with these options; an output [n, t, c] is taken position by position."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        if f.ndim == y.ndim + 1 == 3:
            f, y = f.flatten(0, 1), y.flatten()
        found = F.cross_entropy(f, y, **{**options, "weight": weight if options["weight"] else None})
        return found if found.ndim == 0 else found.sum()

    weight = torch.tensor([0.3, 1.7, 0.4, 1.1, 0.8]).double()
    return loss


OPTIONS = product(("mean", "sum", "none"), (-100, 1), (0.0, 0.1), (False, True))
NAMES = ("reduction", "ignore_index", "label_smoothing", "weight")


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(zip(NAMES, each, strict=True)) for each in OPTIONS], ids=str)
def test_individual_gradients_with_all_options(options: dict[str, Any]) -> None:
    """Σ_n of the individual gradients is the loss's own gradient, for class indices and for probabilities."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5).double()
    x, y = torch.randn(6, 4, 3).double(), torch.randint(5, (6, 4))
    y[0] = 1
    batches = [(x, y)] + ([(x[:, 0], torch.rand(6, 5).double())] if options["ignore_index"] < 0 else [])
    for batch in batches:
        loss = weighted(**options)
        found = tn.compile(model, loss, batch, [tn.Grad(), tn.BatchGrad()])(*batch)
        want = torch.autograd.grad(loss(model(batch[0]), batch[1]), list(model.parameters()))
        for (name, parameter), right in zip(model.named_parameters(), want, strict=True):
            for own in (found["grad"][name], found["batch_grad"][name].sum(0)):
                assert (own - right).abs().max() <= 1e-10 * right.abs().max(), (name, parameter.shape)


def test_norms_of_long_rows_have_the_digits_of_float32() -> None:
    """640 000 squares for each sample: torch's norm adds them one after the other, with an error of 3e-4."""
    torch.manual_seed(0)
    classes, features = 10000, 64
    model = Language(classes, features)
    x, y = (torch.randint(classes, (2, 128)) for _ in range(2))
    norms = [
        tn.compile(model.to(dtype), by_position, (x, y), [tn.BatchL2()], check=False)(x, y)["batch_l2"]["head.weight"]
        for dtype in (torch.float32, torch.float64)
    ]
    assert ((norms[0] - norms[1]) / norms[1]).abs().max() <= 5e-6


@pytest.mark.parametrize("samples", [1, 3])
def test_labels_are_drawn_from_one_number_for_each_position(samples: int) -> None:
    """A draw has no noise and no one-hot matrix as large as the logits: they and the columns are all there is."""
    classes = 2000
    program = compiled(tn.KFAC(mc_samples=samples, largest=64), classes)[0]
    logits = SAMPLES * POSITIONS * classes * 4
    assert program.peak_bytes <= (1.2 + samples) * logits, program.source
    (noise,) = program.compiled.plan.noises.values()
    assert len(noise.shape) == 2 and classes not in noise.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)], ids=str)
def test_drawn_columns_are_a_softmax_less_a_label(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """In every dtype, at every position, in batches of any size; classes without a chance are never drawn."""
    for size in (0, 1, 4):
        logits = torch.randn(size, *shape)
        logits[:, 0] = -2000
        noise = torch.rand(size, *shape[1:], dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
        noise[:1] = 0
        columns = softmax_draw(logits.to(dtype), noise, torch.full_like(noise, 2).unsqueeze(1))
        labels = torch.softmax(logits.to(dtype).to(noise.dtype), 1) - columns.to(noise.dtype) / 2
        assert columns.dtype == dtype and columns.is_contiguous()
        one = F.one_hot(labels.argmax(1), shape[0]).movedim(-1, 1) if size else labels
        assert (labels - one).abs().le(0.01 if dtype == torch.bfloat16 else 1e-6).all()
        assert not size or labels.argmax(1).min() > 0


def test_no_factor_is_classes_by_classes() -> None:
    """B of a head over more classes than `largest` is a diagonal, said in `explain`; an embedding's A is one anyway."""
    classes = 5000
    program, x, y, _ = compiled(tn.KFAC(), classes)
    factors = program(x, y, seed=0)["kfac"]
    assert [tuple(F.shape) for F in factors["head.weight"].factors] == [(classes,), (FEATURES, FEATURES)]
    assert [tuple(F.shape) for F in factors["table.weight"].factors] == [(classes,), (FEATURES, FEATURES)]
    assert "5000 rows are more than largest=4096" in program.explain("derive")
    values = [step for step, _ in program.compiled.plan.timed]
    assert all(tuple(value.shape).count(classes) < 2 for value in values)


def in_parts(f: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(f, 1), y, ignore_index=1)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("quantity", [tn.DiagGGN(), tn.KFLR(), tn.BatchGrad(), tn.HessianDiag()], ids=lambda q: q.name)
@pytest.mark.parametrize("spatial", [False, True])
def test_cross_entropy_in_its_parts(quantity: tn.Quantity, spatial: bool) -> None:
    """nll_loss(log_softmax(f)) is one call, with the columns of a softmax: the same numbers as of `F.cross_entropy`."""
    torch.manual_seed(0)
    model = (nn.Conv1d(3, 5, 2) if spatial else nn.Linear(3, 5)).double()
    x = (torch.randn(6, 3, 3) if spatial else torch.randn(6, 3)).double()
    y = torch.randint(5, (6, 2) if spatial else (6,))
    whole = lambda f, y: F.cross_entropy(f, y, ignore_index=1)  # noqa: E731
    one, two = (tn.compile(model, loss, (x, y), [quantity]) for loss in (in_parts, whole))
    assert "log_softmax" not in one.source and "cross_entropy_loss" in one.source
    for name, _ in model.named_parameters():
        got, want = (program(x, y)[quantity.name][name] for program in (one, two))
        if isinstance(got, tn.KroneckerFactors):
            got, want = got.to_dense(), want.to_dense()
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


class Logarithms(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x), 1)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "model, loss",
    [
        (Logarithms(3, 5), F.nll_loss),
        (nn.Linear(3, 5), lambda f, y: F.nll_loss(log := F.log_softmax(f, 1), y) + log.square().mean()),
        (nn.Linear(3, 5), lambda f, y: F.nll_loss(F.log_softmax(f[:, None], 1)[:, 0], y)),
    ],
    ids=["of the model", "read twice", "of a part"],
)
def test_what_stays_in_parts(model: nn.Module, loss: Any) -> None:
    """What somebody else reads, or is moved in between; it is right as well."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randint(5, (6,))
    program = tn.compile(model, loss, (x, y), [tn.Grad()])
    assert "cross_entropy" not in program.source
    want = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for (name, _), right in zip(model.named_parameters(), want, strict=True):
        torch.testing.assert_close(program(x, y)["grad"][name], right)
