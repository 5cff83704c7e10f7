"""Roots of loss Hessians: convex losses that fit well, negative curvature of one sample, low precision, any dtype."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ..second_order import error

Loss = Callable[[Tensor, Tensor], Tensor]
HALVES = [torch.float16, torch.bfloat16]
SATURABLE: dict[str, Loss] = {
    "unreduced": lambda f, y: F.cross_entropy(f, y, reduction="none").mean(),
    "nll": lambda f, y: F.nll_loss(f.log_softmax(1), y),
    "kl": lambda f, y: F.kl_div(f.log_softmax(1), F.one_hot(y, 4).to(f.dtype), reduction="batchmean"),
    "logsumexp": lambda f, y: (f.logsumexp(1) - f.gather(1, y[:, None])[:, 0]).mean(),
}


def weight_of(model: nn.Linear, loss: Loss, batch: tuple[Tensor, Tensor], quantity: tn.Quantity) -> Tensor:
    value: Tensor = tn.compute(model, loss, batch, [quantity])[quantity.name]["weight"]
    return value


def linear(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight = nn.Parameter(weight)
    return model


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", [tn.DiagGGN(), tn.HessianDiag()], ids=lambda q: q.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", SATURABLE)
def test_saturated(loss: str, dtype: torch.dtype, quantity: tn.Quantity) -> None:
    """As the root in the rule of cross-entropy: to the dtype's precision, and to float64's of 1 where it underflows."""
    torch.manual_seed(0)
    y = torch.randint(4, (8,))
    x = (F.one_hot(y, 4) + 0.05 * torch.randn(8, 4)).to(dtype)
    model, exact = linear(torch.eye(4).to(dtype)), linear(torch.eye(4).double())
    program = tn.compile(model, SATURABLE[loss], (x, y), [quantity])
    table = tn.compile(exact, nn.CrossEntropyLoss(), (x.double(), y), [quantity])
    for margin in (1, 10, 15, 20, 30, 40, 60, 100, 1000):
        model.weight.data.copy_(margin * torch.eye(4))
        exact.weight.data.copy_(margin * torch.eye(4))
        got = program(x, y)[quantity.name]["weight"].double()
        want = table(x.double(), y)[quantity.name]["weight"]
        assert torch.isfinite(got).all()
        assert (got - want).abs().max() <= 2e-15 + 2e-6 * want.max() * (dtype == torch.float32), margin


class Weighted(nn.Module):
    """(1/N) Σ y f², diagonal: y is the sign of the curvature."""

    reduction = "mean"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (y * f**2).sum() / f.shape[0]


CURVATURES = [(1e6, -1.0), (1e6, -1e-3), (1e-6, -1e-8), (0.0, -1.0), (-1.0, -1e6)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("curvatures, rule", list(product(CURVATURES, (True, False))))
def test_one_sample_with_negative_curvature(curvatures: tuple[float, float], rule: bool, dtype: torch.dtype) -> None:
    """It is refused, however large that of another sample is; without a root it is right."""
    torch.manual_seed(0)
    model, x = linear(torch.ones(1, 1, dtype=dtype)), torch.ones(2, 1, dtype=dtype)
    y = torch.tensor(curvatures, dtype=dtype).reshape(2, 1)
    loss = Weighted()
    with tn.registered({Weighted: "output[] = y[n, c] * f[n, c]**2 / N"} if rule else {}):
        for quantity in (tn.GGNTrace(), tn.DiagGGN(per_sample=True), tn.SqrtGGNMC(), tn.KFLR()):
            with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
                tn.compute(model, loss, (x, y), [quantity])
        hessian = tn.compute(model, loss, (x, y), [tn.HessianDiag(per_sample=True)])["hessian_diag"]["weight"]
        torch.testing.assert_close(hessian.flatten(), y.flatten())  # (1/N) 2 y with N = 2
        clipped = tn.compile(model, loss, (x, y), [tn.GGNTrace()], indefinite=tn.Indefinite.CLIP)(x, y)["ggn_trace"]
        torch.testing.assert_close(clipped["weight"], y.flatten().clamp(min=0))


def test_constant_negative_curvature() -> None:
    """A number in the formula has a sign, too."""
    with tn.registered({Weighted: "output[] = (y[n, c] * f[n, c] - f[n, c]**2) / N"}):
        model, batch = linear(torch.ones(1, 1)), (torch.ones(2, 1), torch.ones(2, 1))
        with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
            tn.compute(model, Weighted(), batch, [tn.DiagGGN()])


def test_probabilities_near_one() -> None:
    """Terms of 1 / (1 - p) cancel in the curvature of the binary cross-entropy of p: it is right in float32."""
    x = 1 + torch.linspace(0, 0.1, 16).reshape(16, 1)
    for weight in (4.0, 8.0, 12.0):
        values = []
        for dtype in (torch.float32, torch.float64):
            model = nn.Sequential(linear(torch.full((1, 1), weight, dtype=dtype)), nn.Sigmoid())
            p = model(x.to(dtype)).detach()
            model = linear(p[:1].clone())
            values.append(weight_of(model, nn.BCELoss(), (torch.ones_like(p), torch.ones_like(p)), tn.DiagGGN()))
        assert error(values[0].double(), values[1]) <= 1e-5, weight


LOW: dict[str, Loss] = {"softplus": lambda f, y: F.softplus(f).mean(), "log_softmax": SATURABLE["kl"]}


@pytest.mark.thinned(12)
@pytest.mark.parametrize("kind", ["DiagGGN", "HesScale", "HessianDiag", "BL89", "KFLR"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", LOW)
def test_low_precision(loss: str, dtype: torch.dtype, kind: str) -> None:
    """The numbers of float64 at the same values, to what the dtype has."""
    torch.manual_seed(0)
    quantity = getattr(tn, kind)()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    x, y = torch.randn(6, 3).to(dtype), torch.arange(6) % 4
    low = tn.compute(model, LOW[loss], (x, y), [quantity])[quantity.name]
    high = tn.compute(model.double(), LOW[loss], (x.double(), y), [quantity])[quantity.name]
    for name, want in high.items():
        got = low[name]
        if isinstance(want, tn.KroneckerFactors):
            got, want = got.to_dense(), want.to_dense()
        assert got.dtype == dtype
        assert error(got.double(), want) <= 30 * torch.finfo(dtype).eps, name


A = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.3, -1.0]])
WRITTEN: dict[str, Loss] = {
    "a constant's dtype": lambda f, y: torch.logaddexp(f, torch.zeros(f.shape, dtype=torch.float32)).sum(1).mean(),
    "with a device": lambda f, y: torch.logaddexp(f, torch.ones_like(f, dtype=torch.float32, device=f.device)).mean(),
    "a cast": lambda f, y: F.cross_entropy(f.to(torch.float32), y, reduction="none").mean(),
    "a dtype argument": lambda f, y: F.nll_loss(F.log_softmax(f, 1, dtype=torch.float32), y),
    "a matrix": lambda f, y: ((f @ A) ** 2).sum(1).mean(),
    "made of integers": lambda f, y: (((f > 0).long() / 2) @ A).square().mean() + (f**4).mean(),
    "joined": lambda f, y: torch.cat([f, torch.ones(f.shape[0], 1)], 1).logsumexp(1).mean(),
    "several axes": lambda f, y: F.nll_loss(f.reshape(-1, 3, 1).log_softmax(1), y[:, None]),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", WRITTEN)
def test_dtypes_in_the_loss(name: str) -> None:
    """What a loss makes in float32 goes with the float64 in which its Hessian is taken."""
    torch.manual_seed(0)
    loss, model, x, y = WRITTEN[name], nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    H = torch.func.hessian(lambda f: loss(f, y))(model(x).detach())
    want = torch.einsum("nini,nj->ij", H, x.square())
    for kind in (tn.HessianDiag(), tn.DiagGGN()):
        assert error(tn.compute(model, loss, (x, y), [kind])[kind.name]["weight"], want) <= 1e-6


def test_an_operator_that_knows_one_dtype() -> None:
    """It is called with what it was captured with."""
    library = torch.library.Library("tnbackprop_tests_single", "FRAGMENT")
    library.define("total(Tensor x) -> Tensor")

    def total(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32, "single precision only"
        return x.logsumexp(1)

    library.impl("total", total, "CompositeImplicitAutograd")
    operator = torch.ops.tnbackprop_tests_single.total
    loss: Loss = lambda f, y: (operator(f) - f.gather(1, y[:, None])[:, 0]).mean()  # noqa: E731
    for margin in (1.0, 20.0):
        model, y = linear(margin * torch.eye(3)), torch.tensor([0, 1, 2, 1, 0])
        x = F.one_hot(y, 3).float()
        got = weight_of(model, loss, (x, y), tn.DiagGGN())
        want = weight_of(model, nn.CrossEntropyLoss(), (x, y), tn.DiagGGN())
        assert (got - want).abs().max() <= 1e-6


@pytest.mark.slow
def test_one_hessian_for_all_roots() -> None:
    """Exact, drawn, signed and in one matrix: one eigendecomposition, and the numbers of each alone."""
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 4), (torch.randn(5, 3), torch.arange(5) % 4)
    quantities = [tn.DiagGGN(), tn.DiagGGNMC(), tn.HessianDiag(), tn.HesScale(), tn.KFRA()]
    program = tn.compile(model, SATURABLE["logsumexp"], batch, quantities)
    assert program.source.count("torch.linalg.eigh") == program.source.count("def loss_") == 1
    result = program(*batch)
    for quantity in (tn.DiagGGN(), tn.HessianDiag(), tn.HesScale()):
        alone = weight_of(model, SATURABLE["logsumexp"], batch, quantity)
        torch.testing.assert_close(result[quantity.name]["weight"], alone)


@pytest.mark.slow
def test_torch_compile_takes_it_whole() -> None:
    model, batch = nn.Linear(3, 3), (torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0]))
    program = tn.compile(model, SATURABLE["logsumexp"], batch, [tn.DiagGGN(), tn.HessianDiag(), tn.BL89()])
    namespace: dict[str, Callable[..., tuple[object, object, dict[str, dict[str, Tensor]], object]]] = {}
    exec(program.source, namespace)
    torch._dynamo.reset()
    with torch.no_grad():
        _, _, values, _ = torch.compile(namespace["program"], fullgraph=True, backend="eager")(program.tensors(*batch))
    for name, want in program(*batch).items():
        torch.testing.assert_close(values[name]["weight"], want["weight"])
