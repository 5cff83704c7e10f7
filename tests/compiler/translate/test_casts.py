"""Several dtypes in one model: casts have a rule, and their derivatives are cast back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ...tried import GGN, MSE, TWICE, Function, Tried, gradients, randn

X = randn(4, 3)
LAYERS = {"l": partial(nn.Linear, 3, 4), "k": partial(nn.Linear, 4, 2)}
PARAMETERS = {"w": randn(4, 3), "b": randn(4)}
HALF, SINGLE = torch.bfloat16, torch.float32


def tried(name: str, function: Callable[[Any, Tensor], Tensor], *, bound: float = 1e-4, **options: Any) -> Tried:
    return Tried(name, function, X, **{"parts": LAYERS, "quantities": TWICE, "bound": bound} | options)


def other(m: nn.Module, x: Tensor) -> Tensor:
    return m.k(m.l(x).to(torch.zeros(1, dtype=SINGLE)).tanh().type_as(x))


def written(m: nn.Module, x: Tensor) -> Tensor:
    """Into a tensor of another dtype, and one column into two."""
    h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    h[:, 0] = m.l(x).float()[:, 1].tanh()
    h[:, 1:3] = m.l(x)[:, :1]
    return m.k(h)


CASES = [
    tried("float", lambda m, x: m.k(m.l(x).float().tanh().double())),
    tried("to a tensor", other),
    tried("written", written),
    tried("picked", lambda m, x: m.k(m.l(x).softmax(-1, dtype=SINGLE).sort(-1)[0].topk(4, -1)[0].double())),
    tried("softmax", lambda m, x: m.k(F.softmax(m.l(x), -1, dtype=SINGLE).to(x.dtype))),
    tried("log_softmax", lambda m, x: m.k(F.log_softmax(m.l(x), -1, dtype=SINGLE).to(x.dtype))),
    tried("sum", lambda m, x: m.l(x) * m.l(x).sum(1, keepdim=True, dtype=SINGLE), bound=1e-4),
    tried("mean", lambda m, x: m.l(x) * m.l(x).mean(1, keepdim=True, dtype=SINGLE).double()),
    tried("promoted", lambda m, x: m.l(x) * m.l(x).float()),
    tried("a constant", lambda m, x: m.l(x) * torch.full((4,), 2.0, dtype=SINGLE), bound=1e-8),
    tried("joined", lambda m, x: torch.cat([m.l(x), m.l(x).float()], 1)),
    tried("parameters", lambda m, x: F.linear(x.float(), m.w.float(), m.b.float()).tanh().double(), parts=PARAMETERS),
    tried("a parameter in two dtypes", lambda m, x: x @ m.w.T + (x.float() @ m.w.float().T).tanh(), parts=PARAMETERS,
          quantities=GGN),
    tried("a product of parameters", lambda m, x: x @ (m.w @ m.w.T).float().double()[:3], parts=PARAMETERS,
          quantities=GGN),
    tried("a loss", lambda m, x: m.l(x).tanh(), loss=lambda f, y: F.cross_entropy(f.float(), y), y=torch.arange(4)),
]  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Tried) -> None:
    """Of parameters in float64, to the precision that there is on the way; nothing falls back on torch.func."""
    assert "by torch.func" not in case.check().explain("bind")


# low precision: as near to float64 as autograd is


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    largest = max(value.norm() for value in want.values())
    return {name: float((got[name].double() - value).norm() / largest) for name, value in want.items()}


def as_near_as_autograd(function: Callable[[Any, Tensor], Tensor], x: Tensor, parts: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = Function(function, parts).double().eval()
    low = copy.deepcopy(exact).to(dtype)
    y = randn(*exact(x).shape, seed=9)
    want = gradients(MSE(exact(x), y), dict(exact.named_parameters()))
    theirs = error(gradients(MSE(low(x.to(dtype)).to(dtype), y.to(dtype)), dict(low.named_parameters())), want)
    asked = [tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.DiagGGN(), tn.KFAC(), tn.HessianDiag()]
    result = tn.compile(low, MSE, (x.to(dtype), y.to(dtype)), asked)(x.to(dtype), y.to(dtype), seed=0)
    summed = {name: each.sum(0) for name, each in result["batch_grad"].items()}
    for found in (result["grad"], summed):
        assert all(value.dtype == dtype for value in found.values())
        for name, mine in error(found, want).items():
            assert mine <= 3 * theirs[name] + 0.02, f"{name}: {mine:.1e}, autograd's {theirs[name]:.1e}"
    for name in want:
        assert result["diag_ggn"][name].dtype == dtype and torch.isfinite(result["hessian_diag"][name]).all()


def attention(m: nn.Module, x: Tensor) -> Tensor:
    """As language models have it: the norm and the softmax in float32."""
    h = x.to(SINGLE)
    h = m.gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return F.softmax(m.q(h) @ m.k(h).mT, -1, dtype=SINGLE).to(x.dtype) @ m.v(h)


def regions(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=HALF):
        h = F.max_pool2d(m.c(x).relu(), 2).flatten(1)
        with torch.autocast("cpu", enabled=False):
            h = m.k(h.to(x.dtype)).tanh()
        h = m.o(m.n(h))
    return h.to(x.dtype)


def test_low_precision() -> None:
    parts = {name: partial(nn.Linear, 4, 4) for name in "qkv"} | {"gain": randn(4)}
    as_near_as_autograd(attention, randn(3, 5, 4), parts, HALF)


@pytest.mark.slow
def test_autocast_in_forward() -> None:
    """Parameters stay in float32, and so are their results."""
    parts = {"c": partial(nn.Conv2d, 2, 3, 3, padding=1), "k": partial(nn.Linear, 12, 8),
             "n": partial(nn.LayerNorm, 8), "o": partial(nn.Linear, 8, 2)}  # fmt: skip
    as_near_as_autograd(regions, randn(3, 2, 4, 4), parts, SINGLE)


def test_one_dtype_has_no_casts() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    program = tn.compile(model, MSE, (X.float(), randn(4, 2).float()), [tn.BatchL2(), tn.DiagGGN(), tn.HessianDiag()])
    assert ".to(" not in program.source


class AroundNorm(nn.Module):
    """Layers in bfloat16, the norm between them in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(4, 6).to(HALF), nn.LayerNorm(6), nn.Linear(6, 3).to(HALF)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.a(x.to(self.a.weight)).to(self.n.weight))
        return self.b(h.to(self.b.weight)).to(self.n.weight)


OF_BOTH = [
    tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.DiagGGN(), tn.SqrtGGN(),
    tn.GGNTrace(), tn.HessianDiag(), tn.HesScale(), tn.KFLR(), tn.KFLR(sharing=tn.Sharing.REDUCE),
    tn.KFAC(fisher=tn.Fisher.EMPIRICAL),
]  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("quantity", OF_BOTH, ids=repr)
def test_results_are_in_the_dtype_of_their_parameter(quantity: tn.Quantity) -> None:
    """Also where a loop adds them up, and as near as bfloat16 is."""
    torch.manual_seed(0)
    model = AroundNorm()
    exact = copy.deepcopy(model).double()
    x, y = torch.randn(4, 5, 4), torch.randn(4, 5, 3)
    got = tn.compute(model, MSE, (x, y), [quantity], seed=0)[quantity.name]
    want = tn.compute(exact, MSE, (x.double(), y.double()), [quantity], seed=0)[quantity.name]
    for name, parameter in model.named_parameters():
        found, right = (each[name] for each in (got, want))
        if isinstance(found, tn.KroneckerFactors):
            assert {factor.dtype for factor in found.tensors()} == {parameter.dtype}, name
            found, right = found.to_dense(), right.to_dense()
        assert found.dtype == parameter.dtype, name
        assert (found - right).norm() <= 0.05 * right.norm(), name


@pytest.mark.slow
def test_scales_are_in_the_widest_dtype() -> None:
    """Behind a first layer in bfloat16 that is frozen, a head in float32 is as exact as by itself."""
    torch.manual_seed(0)
    first, head = nn.Linear(4, 6).to(HALF).requires_grad_(False), nn.Linear(6, 3)
    x, y = torch.randn(5, 7, 4), torch.randn(5, 7, 3)
    model = Function(lambda m, x: m.head(m.first(x.to(HALF)).float()), {"first": lambda: first, "head": lambda: head})
    with torch.no_grad():
        h = first(x.to(HALF)).float()
    for quantity in (tn.DiagGGN(), tn.HessianDiag(), tn.GGNTrace()):
        got = tn.compute(model, MSE, (x, y), [quantity])[quantity.name]
        exact = copy.deepcopy(head).double()
        want = tn.compute(exact, MSE, (h.double(), y.double()), [quantity])[quantity.name]
        for name, value in want.items():
            torch.testing.assert_close(got[f"head.{name}"].double(), value, rtol=1e-5, atol=1e-7)
