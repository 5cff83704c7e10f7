"""A rule of Jacobians alone: the module, or the primitive, runs itself, written out next to the program."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..capturing import Function
from ..declaring import Power, X, Y, check, network

LEGS = {"input": "n, k", "gain": "k", "output": "n, i"}
ROWS = {"input": "3 * gain[i] * input[n, i]**2 * delta[i, k]", "gain": "input[n, i]**3 * delta[i, k]"}
ALONE = tn.Rule(jacobian=ROWS, legs=LEGS)


def test_a_module() -> None:
    """Also a second one, and for other batch sizes; the source runs without the module."""
    model = nn.Sequential(*network(Power()), Power()).double()
    program = check(model, rules=tn.RULES | {Power: ALONE})
    assert program.source.count("def forward_") == 1 and "torch.ops.aten.pow.Tensor_Scalar" in program.source
    for size in (1, 2, 7):
        x, y = X[:1].repeat(size, 1) + torch.arange(size).double()[:, None], Y[:1].repeat(size, 1)
        want = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
        for got, value in zip(program(x, y)["grad"].values(), want, strict=True):
            torch.testing.assert_close(got, value)


def test_in_another_dtype() -> None:
    model = network(Power()).float()
    program = tn.compile(model, nn.MSELoss(), (X.float(), Y.float()), [tn.Grad()], rules=tn.RULES | {Power: ALONE})
    assert program(X.float(), Y.float())["grad"]["2.gain"].dtype == torch.float32
    tn.verify(program, X, Y)


@tn.primitive
def cubed(input: Tensor, gain: Tensor) -> Tensor:
    sizes = input.new_zeros(len(input), 2 * input.shape[0] - input.shape[0]).sum() + float("inf")
    return torch.where(sizes > 0, gain * input**3, input)


def test_a_primitive() -> None:
    """With sizes and infinities in what it runs."""
    model = Function(lambda m, x: m.b(cubed(m.a(x), m.gain)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.gain = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    check(model.double(), rules=tn.RULES | {cubed: ALONE})


def branches(input: Tensor, gain: Tensor) -> Tensor:
    return gain * input**3 if input.shape[0] > 2 else input


def constant(input: Tensor, gain: Tensor) -> Tensor:
    return gain * input**3 * CONSTANT


def draws(input: Tensor, gain: Tensor) -> Tensor:
    return gain * input**3 + 0 * torch.rand_like(input)


CONSTANT = torch.ones(3, dtype=torch.float64)
REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "branches": (branches, "it does something else for other batch sizes"),
    "constant": (constant, "it reads a tensor that is neither a parameter nor a buffer"),
    "draws": (draws, "it draws random numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What cannot be written out is told, with what to add; with that it is right."""
    function, why = REFUSED[name]
    primitive = tn.primitive(function)
    model = Function(lambda m, x: m.b(primitive(m.a(x), m.gain)), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    model.gain = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    message = rf"(?s)Jacobians alone, and what its own .*: {why}.*code of {{input}}, {{gain}}: tn.Rule\(…, forward="
    with pytest.raises(tn.UnsupportedError, match=message):
        tn.compile(model.double(), nn.MSELoss(), (X, Y), [tn.Grad()], rules=tn.RULES | {primitive: ALONE})
