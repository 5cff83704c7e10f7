"""memory_limit: the peak that is planned stays below it, by slices of the batch, with the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tnbackprop as tn

from . import oracle

QUANTITIES = (tn.Grad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(centred=True))


def problem() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(36, 30), nn.Linear(30, 5)
    ).double()
    return model, nn.CrossEntropyLoss(), torch.randn(16, 3, 8, 8).double(), torch.randint(5, (16,))


@pytest.mark.parametrize("share", [0.7, 0.5, 0.4])
def test_same_values_within_the_limit(share: float) -> None:
    model, loss, x, y = problem()
    free = tn.compile(model, loss, (x, y), QUANTITIES)
    limit = int(share * free.peak_bytes)
    program = tn.compile(model, loss, (x, y), QUANTITIES, memory_limit=limit)
    assert program.peak_bytes <= limit < free.peak_bytes
    assert "def slice_" in program.source
    for batch in (16, 5, 1):
        result = program(x[:batch], y[:batch])
        for quantity in QUANTITIES:
            want = getattr(oracle, quantity.name)(model, loss, x[:batch], y[:batch])
            for name, value in want.items():
                torch.testing.assert_close(result[quantity.name][name], value, rtol=1e-10, atol=1e-12)


def test_a_limit_that_cannot_be_met() -> None:
    model, loss, x, y = problem()
    with pytest.raises(tn.UnsupportedError, match=r"memory_limit=1000 bytes cannot be met.*one sample at a time"):
        tn.compile(model, loss, (x, y), QUANTITIES, memory_limit="1kB")


@pytest.mark.parametrize("text", ["2 apples", "GiB", "-1MB"])
def test_no_amount_of_memory(text: str) -> None:
    model, loss, x, y = problem()
    with pytest.raises(tn.InputError, match="is no amount of memory"):
        tn.compile(model, loss, (x, y), QUANTITIES, memory_limit=text)
