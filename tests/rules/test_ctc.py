"""CTC by its forward algorithm, against torch's kernel, which has a first derivative only."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ..tried import FIRST, Tried, gradients, randn

X = randn(4, 5, 3)
# the classes, and the lengths of input and label: one short, one with a class twice, one without any
LABELS = torch.tensor([[1, 2, 5, 2], [2, 3, 4, 1], [1, 1, 5, 2], [3, 1, 3, 0]])
PARTS = {"l": partial(nn.Linear, 3, 4)}


def log_probs(m: nn.Module, x: Tensor) -> Tensor:
    return m.l(x).log_softmax(-1)


def loss(f: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.ctc_loss(f.transpose(0, 1), y[:, :2], y[:, 2], y[:, 3], **options)


OPTIONS: list[dict[str, Any]] = [{}, {"reduction": "sum"}, {"zero_infinity": True}, {"blank": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options: dict[str, Any]) -> None:
    labels = LABELS.clamp(max=2) if "blank" in options else LABELS
    labels = torch.cat([labels[:, :2], LABELS[:, 2:]], 1)
    Tried("ctc", log_probs, X, PARTS, FIRST, partial(loss, **options), labels).check()


@pytest.mark.slow
def test_each() -> None:
    Tried("none", log_probs, X, PARTS, FIRST, lambda f, y: loss(f, y, reduction="none").mean(), LABELS).check()


@pytest.mark.slow
def test_labels_that_cannot_be() -> None:
    """One class twice needs three steps."""
    labels = LABELS.clone()
    labels[2, 2] = 2
    Tried("impossible", log_probs, X, PARTS, FIRST, partial(loss, zero_infinity=True), labels).check()


@pytest.mark.slow
def test_second_derivatives() -> None:
    """By differences of torch's gradient."""
    tried = Tried("hessian", log_probs, X, PARTS, ("hessian_diag",), loss, LABELS)
    program = tried.program()
    model = program.model
    weight, step = model.l.weight, 1e-5
    got = program(X, LABELS)["hessian_diag"]["l.weight"]
    for k in range(weight.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[k] += sign * step
            ends.append(gradients(loss(model(X), LABELS), dict(model.named_parameters()))["l.weight"].flatten()[k])
            with torch.no_grad():
                weight.view(-1)[k] -= sign * step
        torch.testing.assert_close(got.flatten()[k], (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_lengths_that_are_numbers() -> None:
    with pytest.raises(tn.UnsupportedError, match=r"lengths as numbers.*\n.*as tensors \[N\]"):
        fixed = lambda f, y: F.ctc_loss(f.transpose(0, 1), y[:, :2], (5,) * 4, (2,) * 4)  # noqa: E731
        Tried("numbers", log_probs, X, PARTS, FIRST, fixed, LABELS).program()
