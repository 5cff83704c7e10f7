"""Gradients of parameters from the kernel that pulls back to the input: where only their sum over samples is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn

ALL, INPUT = "[True, True, True])", "[True, False, False])"
X, Y = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)).double(), torch.randint(3, (5,))


def running(size: int) -> nn.Module:
    """With statistics that are no zeros and ones."""
    norm = nn.BatchNorm1d(size)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 1, 2)
    return norm


class Twice(nn.Module):
    """One norm that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.norm(x).tanh())


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "batch norm": lambda: running(4),
}


def model_of(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            nn.init.normal_(p, 0.5, 0.5)
    return model


def assert_gradients(model: nn.Module, quantities: list[tn.Quantity]) -> tn.Program:
    program = tn.compile(model, F.cross_entropy, (X, Y), quantities, check=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    want = torch.autograd.grad(F.cross_entropy(model(X), Y), list(trained.values()))
    got = program(X, Y)["grad"]
    for name, value in zip(trained, want, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)
    return program


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_alone_is_one_kernel(norm: str) -> None:
    program = assert_gradients(model_of(NORMS[norm]()), [tn.Grad()])
    assert program.source.count(ALL) == 1 and INPUT not in program.source
    assert "1.weight   grad: from the kernel that pulls back to the input" in program.explain("plan")
    assert "gradient = aten.native_" in program.explain("derive")


@pytest.mark.parametrize("norm", NORMS)
def test_not_where_more_is_asked(norm: str) -> None:
    program = assert_gradients(model_of(NORMS[norm]()), [tn.Grad(), tn.BatchGrad()])
    assert ALL not in program.source


@pytest.mark.thinned(4)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frozen", [["1.weight"], ["1.bias"], ["1.weight", "1.bias"], ["0.weight", "0.bias"]])
def test_frozen_parameters(norm: str, frozen: list[str]) -> None:
    """Also a norm in front of which nothing is trained: nothing is pulled back to its input then."""
    model = model_of(NORMS[norm]())
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    assert_gradients(model, [tn.Grad()])


@pytest.mark.parametrize(
    "norm",
    [Twice, lambda: nn.LayerNorm(6, bias=False), lambda: nn.LayerNorm(6, elementwise_affine=False),
     lambda: nn.GroupNorm(2, 4, affine=False), lambda: nn.BatchNorm1d(4, affine=False)],
    ids=["read twice", "no bias", "plain layer norm", "plain group norm", "plain batch norm"],
)  # fmt: skip
def test_other_operands(norm: Callable[[], nn.Module]) -> None:
    assert_gradients(model_of(norm()), [tn.Grad()])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", [tn.DiagGGN(), tn.HessianDiag(), tn.ClippedGrad(), tn.WeightedGrad()], ids=str)
def test_next_to_other_sweeps(quantity: tn.Quantity) -> None:
    """Columns, second derivatives, phases and weights have formulas of their own."""
    model = model_of(nn.LayerNorm(6))
    report = tn.verify(model, X, Y, loss=F.cross_entropy, quantities=[tn.Grad(), quantity])
    assert report.ok and {quantity.name, "grad"} <= {row.what for row in report.rows}


def test_halves() -> None:
    model = model_of(nn.LayerNorm(6))
    program = tn.compile(model, F.cross_entropy, (X, Y), [tn.Grad()])
    _, saved = program.forward(X)
    want = program(X, Y)["grad"]
    for name, value in program.backward(saved, Y)["grad"].items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


class Scaled(nn.Module):
    """input * gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.gain


FORMULA = "output[n, a, i] = input[n, a, i] * gain[i]"
KERNEL = "(2 * {cotangent} * {gain} / 2, ({cotangent} * {input}).sum((0, 1)))"


@pytest.mark.slow
def test_a_kernel_of_ones_own() -> None:
    """It is taken for the gradient alone, and compared with the formula."""
    rule = tn.Rule(FORMULA, backward={"input, gain": KERNEL})
    program = tn.compile(
        model_of(Scaled()), F.cross_entropy, (X, Y), [tn.Grad()], rules=tn.RULES | {Scaled: lambda module: rule}
    )
    assert "/ 2, (" in program.source
    assert tn.verify(rule, module=Scaled(), x=(2, 3, 6)).ok
    wrong = tn.Rule(FORMULA, backward={"input, gain": KERNEL.replace("sum", "mean")})
    with pytest.raises(tn.VerificationError, match=r"(?s)native backward of 'gain'.*every entry is"):
        tn.verify(wrong, module=Scaled(), x=(2, 3, 6))


def test_a_kernel_without_a_formula() -> None:
    """It has the gradient, and what is finer is refused."""
    code = {"forward": "{input} * {gain}", "vjp": {"input": "{cotangent} * {gain}"}, "legs": {"output": "n, a, i"}}
    rules = tn.RULES | {Scaled: lambda module: tn.Rule(**code, backward={"input, gain": KERNEL})}
    model = model_of(Scaled())
    program = tn.compile(model, F.cross_entropy, (X, Y), [tn.Grad()], rules=rules)
    want = torch.autograd.grad(F.cross_entropy(model(X), Y), list(model.parameters()))
    for found, value in zip(program(X, Y)["grad"].values(), want, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-13)
    for quantity in (tn.BatchL2(), tn.DiagGGN(), tn.KFAC()):
        with pytest.raises(tn.TnError, match=r"(?s)only .*gradient|only its VJP is known"):
            tn.compile(model, F.cross_entropy, (X, Y), [tn.Grad(), quantity], rules=rules)


@pytest.mark.parametrize(
    ("options", "native"),
    [
        ({"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2}, True),
        ({"kernel_size": 2, "stride": 2, "bias": False}, True),
        ({"kernel_size": (3, 2), "padding": 1, "dilation": 2}, True),
        ({"kernel_size": 1}, False),  # a matmul
    ],
    ids=str,
)
def test_transposed_convolutions(options: dict[str, Any], native: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 6, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    ).double()
    x, y = torch.randn(4, 1, 7, 7).double(), torch.randint(3, (4,))
    model(x)
    program = tn.compile(model, F.cross_entropy, (x, y), [tn.Grad()], check=False)
    assert ("= torch.ops.aten.convolution_backward(" in program.source and "True, [" in program.source) == native
    want = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    got = program(x, y)["grad"]
    for (name, _), value in zip(model.named_parameters(), want, strict=True):
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)
