"""Gauss-Newton quantities of all columns, of drawn ones, and of the gradients of the labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tnbackprop as tn
from tnbackprop.proof.proof import prove

from ..cases import CASES
from ..second_order import assert_equal
from .test_operands import LAYERS, run, unscaled

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_of_the_labels(name: str) -> None:
    """Columns ∇ℓ_n √scale: the empirical Fisher where the loss averages, their sum where it sums."""
    problem = BY_NAME[name].build()
    scale = 1 / len(problem.x) if problem.loss.reduction == "mean" else 1.0
    root = {"root": tn.Labels()}
    quantities = [
        tn.SqrtGGN(**root), tn.DiagGGN(**root), tn.DiagGGN("each", per_sample=True, **root), tn.GGNTrace(**root),
        tn.GGNGram(**root), tn.KFLR(**root), tn.KFAC(fisher=tn.Fisher.EMPIRICAL),
    ]  # fmt: skip
    result = run(problem, quantities)
    V = {n: G * scale**0.5 for n, G in unscaled(problem).items()}
    flat = {n: v.reshape(len(v), -1) for n, v in V.items()}
    assert_equal(result["sqrt_ggn"], V, "sqrt")
    assert_equal(result["diag_ggn"], {n: v.square().sum(0) for n, v in V.items()}, "diag")
    assert_equal(result["each"], {n: v.square() for n, v in V.items()}, "each")
    assert_equal(result["ggn_trace"], {n: v.square().sum(1) for n, v in flat.items()}, "trace")
    assert_equal(result["ggn_gram"], {n: v @ v.T for n, v in flat.items()}, "gram")
    for n, K in result["kfac"].items():
        torch.testing.assert_close(result["kflr"][n].to_dense(), K.to_dense())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", LAYERS)
def test_of_drawn_columns(name: str) -> None:
    problem = BY_NAME[name].build()
    root = {"root": tn.Draws(2)}
    quantities = [
        tn.SqrtGGN(**root), tn.DiagGGN(**root), tn.GGNTrace(**root), tn.GGNGram(**root), tn.KFLR(**root),
        tn.SqrtGGNMC(mc_samples=2), tn.KFAC(mc_samples=2),
    ]  # fmt: skip
    result = run(problem, quantities)
    V = result["sqrt_ggn_mc"]
    flat = {n: v.reshape(*v.shape[:2], -1) for n, v in V.items()}
    assert_equal(result["sqrt_ggn"], V, "sqrt")
    assert_equal(result["diag_ggn"], {n: v.square().sum((0, 1)) for n, v in V.items()}, "diag")
    assert_equal(result["ggn_trace"], {n: v.square().sum((0, 2)) for n, v in flat.items()}, "trace")
    assert_equal(result["ggn_gram"], {n: torch.einsum("vnp,wmp->vnwm", v, v) for n, v in flat.items()}, "gram")
    for n, K in result["kfac"].items():
        torch.testing.assert_close(result["kflr"][n].to_dense(), K.to_dense())


def test_no_other_root_is_taken_for_the_exact_one() -> None:
    """Neither by the check of a program nor by verify."""
    problem = BY_NAME["mlp_sum"].build()
    quantities = [tn.GGNTrace(root=tn.Draws(1)), tn.DiagGGN(root=tn.Labels()), tn.DiagGGN("drawn", root=tn.Draws(2))]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    checked = prove(program, (problem.x, problem.y), tn.RULES)
    assert "not compared: ggn_trace" in checked and "not compared: diag_ggn" in checked
    assert type(program.quantities["drawn"]) is tn.DiagGGNMC
    report = tn.verify(problem.model, problem.x, problem.y, loss=problem.loss, quantities=quantities)
    assert report.ok


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tn.DiagGGN(root=tn.Identity()), r"root=Identity\(.*: give tn.Exact\(\), tn.Draws\(k\) or tn.Labels"),
        (lambda: tn.GGNTrace(root=3), "root=3"),
        (lambda: tn.DiagGGNMC(root=tn.Labels()), "say mc_samples"),
        (lambda: tn.KFRA(root=tn.Draws(1)), "it averages one matrix"),
    ],
)
def test_what_is_no_root(make: Any, message: str) -> None:
    with pytest.raises(tn.InputError, match=message):
        make()
