"""The model's tensors are looked at in every call, also after one that was right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tnbackprop as tn


def test_a_model_that_changes_between_calls() -> None:
    """Ties that come and go with the same names; other values in the same place are read."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad()])
    program(x, y)
    model[0].weight.data = torch.zeros(3, 3).double()
    again = nn.Parameter(torch.ones(3, 3).double())
    model[2].weight = again
    want = torch.autograd.grad(nn.MSELoss()(model(x), y), list(model.parameters()))
    for value, right in zip(program(x, y)["grad"].values(), want, strict=True):
        torch.testing.assert_close(value, right)
    model[0].weight = again
    with pytest.raises(tn.InputError, match=r"'0\.weight' is the same as '2\.weight' now \(tied\)"):
        program(x, y)
