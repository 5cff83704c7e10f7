"""Formulas in float32 and bfloat16, from -100 to 100: values and derivatives are as near to float64 as torch's."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler.emit.printing import number_code, torch_code
from tnbackprop.diagram.algebra import diagonal, on_diagonal
from tnbackprop.diagram.core import Diagram, Map, N, argument
from tnbackprop.diagram.derivatives import differentiate
from tnbackprop.notation.bind import BoundRule, bind
from tnbackprop.notation.parse import FUNCTIONS
from tnbackprop.notation.rule import Rule
from tnbackprop.rules import RULES
from tnbackprop.rules.writing.kinks import slope

from .. import oracle, oracle_second
from ..models import Apply
from ..second_order import assert_equal
from .test_rule_edges import SPECIAL, pointwise_calls, single

aten = torch.ops.aten
LOW = (torch.float32, torch.bfloat16)
GRID = torch.cat([torch.linspace(-100, 100, 401), torch.linspace(-5, 5, 201), torch.tensor([-1e-3, 1e-3, -1e-6, 1e-6])])
GRID = GRID.sort().values
ROUNDINGS, OWN, NEAR, TINY = 50, 10, 10, 1e-13
"""Errors may be so many roundings, so many times torch's own within so many points, and what float64 does not see."""
CONVENTION = {aten.elu.default: 0, aten.celu.default: 0, aten.selu.default: 0, aten.softplus.default: 20}
"""Where torch takes the other side for the second derivative."""

Function = Callable[[Tensor], Tensor]
WRITTEN: dict[str, Function] = {
    "log(softplus(x))": lambda x: F.softplus(x, threshold=40).log(),
    "log(sigmoid(x))": lambda x: x.sigmoid().log(),
    "x * sigmoid(x)": F.silu,
    "x * tanh(softplus(x))": F.mish,
    "sqrt(sigmoid(x))": lambda x: x.sigmoid().sqrt(),
    "sigmoid(x)**2": lambda x: x.sigmoid() ** 2,
    "softplus(x) * sigmoid(-x)": lambda x: F.softplus(x, threshold=40) * (-x).sigmoid(),
    "exp(logsigmoid(x))": lambda x: F.logsigmoid(x).exp(),
    "x * erfc(-x)": lambda x: x * torch.erfc(-x),
    "expm1(-x**2)": lambda x: torch.expm1(-(x**2)),
    "log1p(x**2)": lambda x: torch.log1p(x**2),
    "exp(x) / (1 + exp(x))": lambda x: x.exp() / (1 + x.exp()),
    "1 / (1 + exp(-x))": lambda x: 1 / (1 + (-x).exp()),
    "sinh(x) / cosh(x)": lambda x: x.sinh() / x.cosh(),
    "x / (1 + exp(-1.7 * x))": lambda x: x / (1 + (-1.7 * x).exp()),
    "1 / sqrt(1 + x**2)": lambda x: 1 / (1 + x**2).sqrt(),
    "x / (1 + abs(x))": F.softsign,
    "1 / softplus(x)": lambda x: 1 / F.softplus(x, threshold=40),
    "sqrt(softplus(x))": lambda x: F.softplus(x, threshold=40).sqrt(),
    "exp(-x) / (1 + exp(-x))**2": lambda x: (-x).exp() / (1 + (-x).exp()) ** 2,
}  # fmt: skip
NAMED = {
    name: getattr(torch, name, None) or getattr(F, name)
    for name, (count, _) in FUNCTIONS.items()
    if count == 1 and name != "softplus"
} | {"softplus": lambda x: F.softplus(x, threshold=40)}


def bound(rule: Rule) -> BoundRule:
    return bind(rule, {"input": ((N,),)}, {"input": "x"}, "out", ((N,),), "a test")


def emitted(diagram: Diagram, x: Tensor, y: Tensor) -> Tensor:
    """The value of an elementwise diagram, by the code that a program has for it."""
    values, total = {"x": x, "out": y}, torch.zeros_like(x)
    for product in diagram.products:
        term = torch.full_like(x, eval(number_code(product.scale)))
        for op in product.operands:
            if isinstance(op, Map):
                code = torch_code(op.expr, {argument(k): a.name for k, a in enumerate(op.args)})
                term = term * eval(code, {"torch": torch}, values)
            else:
                term = term * values[op.name]  # type: ignore[union-attr]
        total = total + term
    return total


def derivatives(rule: BoundRule, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second, of a formula or of a declared Jacobian that reads the output."""
    (equation,) = rule.equations
    jacobian = equation.jacobians.get("x") or (equation.diagram and differentiate(equation.diagram, "x"))
    slope = jacobian and diagonal(jacobian)
    if slope is None:
        return torch.zeros_like(x), torch.zeros_like(x)
    first, second = emitted(slope, x, y), torch.zeros_like(x)
    for name, factor in (("x", torch.ones_like(x)), ("out", first)):
        if (again := differentiate(slope, name)) is not None:
            second = second + emitted(on_diagonal(again), x, y) * factor
    return first, second


def autograd(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    if not first.requires_grad:
        return y.detach(), first, torch.zeros_like(x)
    (second,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
    return y.detach(), first.detach(), torch.zeros_like(x) if second is None else second


def check(got: tuple[Tensor, ...], function: Function, x: Tensor, skipped: float = inf) -> None:
    """As near to float64 as torch is, or nearly; and finite where torch is. The second derivative is a difference."""
    whole, plain = autograd(function, x.double()), autograd(function, x)
    for order, (mine, theirs, want) in enumerate(zip(got, plain, whole, strict=True)):
        known = want.isfinite() & theirs.isfinite() & whole[0].isfinite()
        known &= (x != skipped) | (order < 2)
        error = (theirs.double() - want).abs().nan_to_num(0, 0)[None]
        near = F.max_pool1d(error, 2 * NEAR + 1, 1, NEAR)[0]
        terms = want.abs() + (whole[1].abs().nan_to_num(0, 0) if order == 2 else 0)
        bound = ROUNDINGS * torch.finfo(x.dtype).eps * terms + OWN * near + TINY
        wrong = known & ~((mine.double() - want).abs() <= bound)
        listed = list(zip(x[wrong].tolist(), mine[wrong].tolist(), want[wrong].tolist(), strict=True))
        assert not listed, f"derivative {order} of float64 (x, got, wanted): {listed[:3]}"


TWICE: dict[Any, Function] = {aten.hardsigmoid.default: lambda x: F.relu6(x + 3) / 6}
"""The same function, where torch has no second derivative of the operator."""


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("target", pointwise_calls())
def test_activations(target: Any, dtype: torch.dtype) -> None:
    """The first and second derivative of every row, from what it declares."""
    call = single(target, **SPECIAL.get(target, {}))
    given = {name: value for name, value in call.arguments.items() if name != "input"}

    def function(x: Tensor) -> Tensor:
        found = TWICE[target](x) if target in TWICE else target(x, **given)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    x = GRID.to(dtype)
    if target == aten.hardswish.default and slope("hardswish") == 1.5:  # older torch has its ends inside, once only
        x = x[x.abs() != 3]
    rule = bound(RULES[target](call))  # type: ignore[arg-type]
    value = target(x, **given)
    value = value[0] if isinstance(value, tuple) else value
    check((value, *derivatives(rule, x, value)), function, x, CONVENTION.get(target, inf))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("text", [*NAMED, *WRITTEN])
def test_functions_of_a_formula(text: str, dtype: torch.dtype) -> None:
    """Every function by itself, and some of functions."""
    function = NAMED.get(text) or WRITTEN[text]
    shown = f"{text}(x)" if text in NAMED else text
    rule = bound(Rule("output[n] = " + re.sub(r"\bx\b", "input[n]", shown)))
    x = GRID.to(dtype)
    (equation,) = rule.equations
    assert equation.diagram is not None
    check((emitted(equation.diagram, x, x), *derivatives(rule, x, x)), function, x)


def mean(output: Tensor, y: Tensor) -> Tensor:
    return output.sum(1).mean()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("text", ["log(softplus(h))", "sigmoid(h)", "logsigmoid(h)", "h * sigmoid(h)", "softplus(h)"])
def test_a_layer_of_a_formula_in_float32(text: str) -> None:
    """Forward and derivatives of what is compiled, beside those in float64."""
    names = {"log": torch.log, "softplus": lambda h: F.softplus(h, threshold=40), "sigmoid": torch.sigmoid}
    plain = Apply(lambda h: eval(text, names | {"logsigmoid": F.logsigmoid, "h": h}))
    x = torch.tensor([[-50.0], [-18.0], [-3.0], [2.0], [20.0], [45.0]])
    scale = nn.Linear(1, 1)
    nn.init.ones_(scale.weight)
    nn.init.zeros_(scale.bias)
    layer = tn.einsum_layer("output[*s] = " + text.replace("h", "input[*s]"))
    low = nn.Sequential(scale, layer)
    result = tn.compute(low, mean, (x, x), [tn.BatchGrad(), tn.HessianDiag()])
    whole = nn.Sequential(scale, plain).double()
    x = x.double()
    torch.testing.assert_close(result.output, whole(x).float(), rtol=1e-6, atol=0)
    for name, wanted in (("batch_grad", oracle.batch_grad), ("hessian_diag", oracle_second.hessian_diag)):
        want = wanted(whole, mean, x, x)
        for key, value in result[name].items():
            torch.testing.assert_close(value, want[key].float(), rtol=2e-5, atol=1e-12)


# A power of tensors: the base may be negative or zero where the exponent is whole.


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [2.0, 3.0, -1.0, -2.0, 1.0, 0.0])
def test_powers_of_negative_numbers(exponent: float) -> None:
    model = nn.Sequential(nn.Linear(2, 3), Apply(lambda h: h ** torch.tensor([exponent, 2.0, 1.0]).to(h))).double()
    x, y = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    result = tn.compute(model, nn.MSELoss(), (x, y), [tn.BatchGrad(), tn.HessianDiag()])
    assert_equal(result["batch_grad"], oracle.batch_grad(model, nn.MSELoss(), x, y), "batch_grad")
    assert_equal(result["hessian_diag"], oracle_second.hessian_diag(model, nn.MSELoss(), x, y), "hessian_diag")


class Exponent(nn.Module):
    """Zero and numbers above it to powers that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor([0.0, 1.0, 2.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() ** self.exponent


def test_powers_of_zero() -> None:
    model, loss = Exponent().double(), nn.MSELoss()
    x, y = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 3.0], [0.5, 4.0, 0.0]]).double(), torch.rand(3, 3).double()
    result = tn.compute(model, loss, (x, y), [tn.BatchGrad()])
    assert_equal(result["batch_grad"], oracle.batch_grad(model, loss, x, y), "batch_grad")


# Numbers: infinite, large, small, NumPy's, truth values.

NUMBERS: dict[str, Function] = {
    "clamp_large": lambda h: h.clamp(-1e20, 1e20),
    "clamp_infinite": lambda h: h.clamp(-inf, inf).clamp(max=inf).clamp(min=-inf, max=0.5),
    "clamp_of_the_dtype": lambda h: h.clamp(torch.finfo(h.dtype).min, torch.finfo(h.dtype).max),
    "clamp_small": lambda h: h.clamp(min=1e-300),
    "hardtanh": lambda h: F.hardtanh(h, -inf, 1.0),
    "threshold": lambda h: F.threshold(h, -inf, 0.0),
    "softplus": lambda h: F.softplus(h, threshold=inf),
    "softplus_wide": lambda h: F.softplus(h, beta=1e-3, threshold=1e30),
    "hardshrink": lambda h: F.hardshrink(h, inf) + h,
    "numpy": lambda h: (h * np.float64(1.7) + np.float32(0.1)).clamp(np.float64(-1e20)) * np.int64(3),
    "truth": lambda h: h * True + h**True,
    "large": lambda h: h * 1e30 / 1e30 + h * 10**18 / 10**18,
    "small": lambda h: h * 1e-200 * 1e200 + 1e-320,
    "powers": lambda h: (h * 1e-100) ** 3 * 1e300 + h**0.0,
    "filled": lambda h: h.masked_fill(h > 0, -inf).exp() + h,
    "a_branch_not_taken": lambda h: torch.where(h > -100.0, h, nan) + h.masked_fill(h > 100.0, nan),
    "huber": lambda h: F.huber_loss(h, torch.zeros_like(h), reduction="none", delta=inf),
    "root_of_the_batch": lambda h: h * h.shape[0] ** 0.5 / (h.shape[0] * 1.5e-9) * 1e-9,
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    model, loss = nn.Sequential(nn.Linear(3, 2), Apply(NUMBERS[name])).double(), nn.MSELoss()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    result = tn.compute(model, loss, (x, y), [tn.Grad(), tn.HessianDiag()])
    assert_equal(result["grad"], oracle.grad(model, loss, x, y), "grad")
    assert_equal(result["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), "hessian_diag")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: h.clamp(min=inf), "a constant in it is infinite"),
        (lambda h: h * inf, "a constant in it is infinite|only be compared with"),
        (lambda h: h.clamp(min=nan), "the number nan"),
        (lambda h: h / 1e-310, "beyond those of float64"),
    ],
)
def test_numbers_that_make_no_formula(function: Function, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), Apply(function)).double()
    with pytest.raises(tn.TnError, match=message):
        tn.compile(model, nn.MSELoss(), (torch.randn(4, 3).double(), torch.randn(4, 2).double()), [tn.Grad()])


@pytest.mark.parametrize("k", [np.float32(0.5), np.float64(0.5), np.int64(2), 1e20, 3])
def test_constants_of_a_layer(k: Any) -> None:
    layer = tn.einsum_layer("output[n, i] = input[n, i] * k if input[n, i] < limit else input[n, i]", k=k, limit=inf)
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), x * float(k))


CAST_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "behind the sum": lambda f, y: (f - y).float().square().sum().double(),
    "two terms": lambda f, y: (f * y).mean() + (f.float() * y.float()).mean(),
    "several": lambda f, y: (((f - y) ** 2).sum().float() + 1).double() / 2,
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CAST_LOSSES)
def test_a_loss_that_casts_its_sum(name: str) -> None:
    """A scalar of the loss goes by its formula: native code of a cast sees no samples there."""
    torch.manual_seed(0)
    model, loss = nn.Linear(5, 4).double(), CAST_LOSSES[name]
    x, y = torch.randn(6, 5).double(), torch.randn(6, 4).double()
    result = tn.compute(model, loss, (x, y), [tn.Grad(), tn.BatchGrad()])
    wanted = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for key, want in zip(("weight", "bias"), wanted, strict=True):
        torch.testing.assert_close(result["grad"][key], want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result["batch_grad"][key].sum(0), want, rtol=1e-6, atol=1e-7)
