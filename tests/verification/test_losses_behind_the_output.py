"""Losses whose curvature is taken behind the model's output, or that are written out: verify knows where that is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda f, y: F.cross_entropy(f / 2, y),
    "distilled": lambda f, y: 4 * F.kl_div(F.log_softmax(f / 2, 1), F.one_hot(y, 4).double(), reduction="batchmean"),
    "labels": lambda f, y: -F.log_softmax(f, 1).gather(1, y[:, None]).mean(),
    "written out": lambda f, y: ((f - y[:, None]) ** 2 * (y[:, None] > 0)).sum() / len(f),
}


@pytest.mark.parametrize("name", LOSSES)
def test_agrees(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(6, 3).double(), torch.randint(4, (6,))
    quantities = [tn.DiagGGN(), tn.DiagGGNMC(mc_samples=2), tn.KFAC(), tn.HessianDiag()]
    report = tn.verify(model, x, y, loss=LOSSES[name], quantities=quantities)
    assert report.ok
    compared = {row.what for row in report.rows}
    assert {"diag_ggn", "diag_ggn_mc", "kfac", "hessian_diag"} <= compared
    assert ("drawn columns" in compared) == (name in ("labels", "written out"))
