"""The product: every case of `cases.py` times every first-order quantity, against `oracle.py`, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import tnbackprop as tn

from .. import oracle
from ..cases import EVERY, Case

QUANTITIES = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
TOLERANCE = 1e-10


def assert_equal(got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], what: str) -> None:
    """Same parameters, shapes and values, relative to the largest entry (or to 1 where all are smaller)."""
    assert list(got) == list(want), what
    for name, expected in want.items():
        assert got[name].shape == expected.shape, f"{what} of {name}"
        error = (got[name] - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert error <= TOLERANCE, f"{what} of {name}: relative error {error:.3g}"


@pytest.mark.thinned(15)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_all_together(case: Case) -> None:
    """One program with all quantities, which share what they can."""
    problem = case.build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), QUANTITIES)
    result = program(problem.x, problem.y)
    for quantity in QUANTITIES:
        want = getattr(oracle, quantity.name)(problem.model, problem.loss, problem.x, problem.y)
        assert_equal(result[quantity.name], want, quantity.name)
