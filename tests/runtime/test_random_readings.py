"""Random programs that read parameters in several shapes, share, slice, scatter, cast: quantities against autograd."""

from __future__ import annotations

import os

import pytest

from ..random_models import problem
from ..random_oracle import faults, usable

PROGRAMS = int(os.environ.get("TNBACKPROP_PROGRAMS", "6"))
"""How many: raise it to look for faults."""


@pytest.mark.thinned(3)
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), *range(1, PROGRAMS)])  # it takes 9 s
def test_random_readings(seed: int) -> None:
    drawn = problem(seed)
    if usable(drawn):
        wrong = [fault for fault in faults(drawn) if not fault.startswith("refused")]
        assert not wrong, f"{wrong}\n{drawn.model}\n{drawn.loss}"
