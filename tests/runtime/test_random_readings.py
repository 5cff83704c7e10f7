"""Random programs that read parameters in several shapes, share, slice, scatter, cast: quantities against autograd."""

from __future__ import annotations

import os

import pytest

from ..random_models import problem
from ..random_oracle import faults, usable

PROGRAMS = int(os.environ.get("TNBACKPROP_PROGRAMS", "4"))
"""How many: raise it to look for faults."""


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_readings(seed: int) -> None:
    drawn = problem(seed)
    if usable(drawn):
        wrong = [fault for fault in faults(drawn) if not fault.startswith("refused")]
        assert not wrong, f"{wrong}\n{drawn.model}\n{drawn.loss}"
