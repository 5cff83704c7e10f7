"""Sums that may be read as standing inside of a function are refused in formulas by hand, saying what to write."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tnbackprop as tn

from .. import oracle
from ..models import Apply
from ..second_order import assert_equal

SHAPES = {"w": (2, 3), "b": (2,), "c": (5, 3), "s": (3,), "k": (3,)}
REFUSED = {
    "output[n, o] = tanh(w[o, i] * input[n, i])": "h[n, o] = w[o, i] * input[n, i]",
    "output[n, o] = tanh(w[o, i] * input[n, i] + b[o])": "h[n, o] = w[o, i] * input[n, i]",
    "output[n, o] = b[o] + 3 * sigmoid(-w[o, i] * input[n, i])": "h[n, o] = (-w[o, i]) * input[n, i]",
    "output[n, o] = (w[o, i] * input[n, i])**2": "h[n, o] = w[o, i] * input[n, i]",
    "output[n] = sqrt(input[n, i]**2)": "h[n] = input[n, i]**2",
    "output[n] = log(exp(input[n, i]))": "h[n] = exp(input[n, i])",
    "output[n, j] = exp(-(input[n, i] - c[j, i])**2)": "h[n, j] = (input[n, i] - c[j, i])**2",
    "output[n] = 1 / (s[i] * input[n, i])": "h[n] = s[i] * input[n, i]",
    "output[n] = exp(input[n, i] / s[i])": "h[n] = input[n, i] / s[i]",
    "output[n, o] = b[o] if w[o, i] * input[n, i] > 0 else 0": "h[n, o] = w[o, i] * input[n, i]",
    "output[n] = maximum(s[i] * input[n, i], 0)": "h[n] = s[i] * input[n, i]",
    "output[n] = abs(input[n, i] * input[n, i])": "h[n] = input[n, i] * input[n, i]",
    "h[n] = tanh(s[i] * input[n, i])\noutput[n] = h[n]": "inner[n] = s[i] * input[n, i]",
    "output[n, *t, o] = tanh(w[o, i] * input[n, *t, i])": "h[n, *t, o] = w[o, i] * input[n, *t, i]",
}  # fmt: skip
ACCEPTED = {
    "output[n, o] = w[o, i] * tanh(input[n, i])": lambda x, p: x.tanh() @ p["w"].T,
    "output[n, i] = tanh(s[i] * input[n, i]**2)": lambda x, p: (p["s"] * x**2).tanh(),
    "output[n] = exp(input[n, i])": lambda x, p: x.exp().sum(1),
    "output[n] = (input[n, i] - s[i])**2": lambda x, p: (x - p["s"]).square().sum(1),
    "m[n] = input[n, i] / I\noutput[n] = (input[n, i] - m[n])**2": lambda x, p: (x - x.mean(1, True)).square().sum(1),
    "output[n, o] = w[o, i] * input[n, i] if b[o] > 0 else 0": lambda x, p: (x @ p["w"].T) * (p["b"] > 0),
    "h[n, o] = w[o, i] * input[n, i]\noutput[n, o] = tanh(h[n, o])": lambda x, p: (x @ p["w"].T).tanh(),
    "h[n, o, i] = w[o, i] * input[n, i]\noutput[n, o] = tanh(h[n, o, i])": lambda x, p: (
        (x[:, None] * p["w"]).tanh().sum(2)
    ),
}  # fmt: skip


def layer(formula: str) -> tn.EinsumLayer:
    read = {name: shape for name, shape in SHAPES.items() if re.search(rf"\b{name}\[", formula)}
    return tn.einsum_layer(formula, **{name: (shape, nn.init.normal_) for name, shape in read.items()}).double()


@pytest.mark.parametrize("formula", REFUSED)
def test_two_readings(formula: str) -> None:
    """What to write is a formula: with it, the layer is the function of the sum."""
    x = torch.randn(4, 3).double()
    with pytest.raises(tn.RuleError, match="the sum over i may be read as standing inside") as caught:
        layer(formula)(x)
    assert f"write {REFUSED[formula]} on a line of its own" in str(caught.value)


@pytest.mark.parametrize("formula", ACCEPTED)
def test_one_reading(formula: str) -> None:
    made, x, y = layer(formula), torch.randn(4, 3).double(), None
    parameters = dict(made.named_parameters())
    torch.testing.assert_close(made(x), ACCEPTED[formula](x, parameters))
    if not parameters:
        return
    plain = Apply(lambda x: ACCEPTED[formula](x, dict(plain.named_parameters())))
    for name, value in parameters.items():
        plain.register_parameter(name, nn.Parameter(value.detach().clone()))
    y = torch.randn_like(made(x))
    got = tn.compute(made, nn.MSELoss(), (x, y), [tn.BatchGrad()])["batch_grad"]
    assert_equal(got, oracle.batch_grad(plain, nn.MSELoss(), x, y), "batch_grad")


def test_a_loss_by_hand() -> None:
    """A sum over the samples cannot stand inside: a function of a product, summed over all, is what it says."""

    class Margin(tn.Declared):
        rule = "output[] = softplus(-target[n, c] * input[n, c]) / (N * C)"

        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return nn.functional.softplus(-target * input).mean()

    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).sign().double()
    with tn.registered({Margin: lambda module: module.rule}):
        got = tn.compute(model, Margin(), (x, y), [tn.BatchGrad(), tn.DiagGGN()])
    assert_equal(got["batch_grad"], oracle.batch_grad(model, nn.SoftMarginLoss(), x, y), "batch_grad")
