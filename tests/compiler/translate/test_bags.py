"""Embedding bags in both forms; torch's kernel has no second derivative, so rows of the table stand for it."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ...tried import FIRST, MSE, TWICE, Tried, expected, randn

BAGS = torch.tensor([[0, 3, 4], [1, 1, 5], [2, 0, 0], [5, 4, 3]])
KINDS: list[dict[str, Any]] = [
    {"mode": "sum"}, {"mode": "mean"}, {"mode": "max"}, {"mode": "sum", "padding_idx": 0},
    {"mode": "mean", "padding_idx": 0}, {"mode": "max", "padding_idx": 0},
]  # fmt: skip


def by_rows(m: nn.Module, i: Tensor) -> Tensor:
    """What a bag is, for the oracle."""
    rows = F.embedding(i, m.e.weight)
    left = (i != (-1 if m.e.padding_idx is None else m.e.padding_idx)).unsqueeze(-1)
    if m.e.mode == "max":
        return rows.masked_fill(~left, -torch.inf).max(1)[0] ** 2
    total = (rows * left).sum(1)
    return (total / left.sum(1).clamp(min=1) if m.e.mode == "mean" else total) ** 2


def offsets(i: Tensor) -> Tensor:
    return torch.arange(0, 3 * i.shape[0], 3)


FORMS = {"matrix": lambda m, i: m.e(i) ** 2, "flat": lambda m, i: m.e(i.flatten(), offsets(i)) ** 2}


@pytest.mark.thinned(9)
@pytest.mark.parametrize(
    "kind, form",
    list(product(KINDS, FORMS)),
    ids=lambda value: value if isinstance(value, str) else "_".join(map(str, value.values())),
)
def test_bags(form: str, kind: dict[str, Any]) -> None:
    parts = {"e": partial(nn.EmbeddingBag, 6, 3, **kind)}
    program = Tried("bags", FORMS[form], BAGS, parts, TWICE).program()
    rows, y = Tried("rows", by_rows, BAGS, parts).build()
    rows.load_state_dict(program.model.state_dict())
    torch.testing.assert_close(rows(BAGS), program.model(BAGS))
    result = program(BAGS, y)
    for key in TWICE:
        want = expected(key, rows, MSE, BAGS, y)["e.weight"]
        torch.testing.assert_close(result[key]["e.weight"], want, rtol=1e-9, atol=1e-9)


def test_weights_of_samples() -> None:
    parts = {"e": partial(nn.EmbeddingBag, 6, 3, mode="sum"), "w": randn(3)}
    Tried("weights", lambda m, i: m.e(i, per_sample_weights=m.w.expand(i.shape[0], 3)), BAGS, parts, FIRST).check()


def test_bags_that_may_differ() -> None:
    parts = {"e": partial(nn.EmbeddingBag, 6, 3)}
    ragged = Tried("ragged", lambda m, i: m.e(i.flatten(), offsets(i) + (offsets(i) > 0).long()), BAGS, parts, FIRST)
    with pytest.raises(tn.UnsupportedError, match=r"bags may differ in size.*\n.*as a matrix"):
        ragged.program()
