"""tn.generate: the same file every time, for the same rule and shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tnbackprop as tn

ROOT = Path(__file__).parents[2]
STABLE = """
import torch, tnbackprop as tn
torch.manual_seed({seed})
layer = torch.nn.Conv2d(2, 4, 3)
print(tn.generate(layer, "grad,variance,kflr,diag_ggn", {target!r}, example=torch.randn(4, 2, 5, 5)).source)
"""


@pytest.mark.slow
def test_the_same_every_time() -> None:
    """Byte for byte, whatever the values of the parameters and the order of hashes."""
    sources = set()
    for seed in ("0", "1"):
        command = [sys.executable, "-W", "ignore", "-c", STABLE.format(target="torch", seed=seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        sources.add(done.stdout)
    assert len(sources) == 1


def test_what_is_positive_by_chance() -> None:
    """The check draws a bias with either sign, whatever its values are; a variance stays positive."""
    sources = set()
    for sign in (-1.0, 1.0):
        norm = nn.BatchNorm1d(3).eval()
        norm.bias.data.fill_(sign)
        sources.add(tn.generate(norm, "grad", example=torch.randn(4, 3)).source)
    (source,) = sources
    assert '"bias": ((3,), -1.0, 1.0)' in source and '"running_var": ((3,), 0.5, 1.5)' in source
