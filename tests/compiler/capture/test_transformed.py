"""Forwards that differentiate or map functions themselves. Oracle: autograd on the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tnbackprop as tn

from ...capturing import Function
from ...oracle_second import diag_ggn
from ...rehearsing import LOSS, batch, check, compiled, layers, refused

torch.manual_seed(0)
ONE = torch.ones(1, 3, dtype=torch.float64)


def field(m: Any, x: Tensor) -> Tensor:
    """u(x), [N, 3], or [3] of one sample."""
    return m.b(m.a(x).tanh())


def slope(u: Tensor, x: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(u.sum(), x, **options)[0]


def pinn(m: Any, x: Tensor) -> Tensor:
    """u + Δu: two derivatives by the input."""
    x = x.detach().requires_grad_()
    u = field(m, x)
    first = slope(u, x, create_graph=True)
    return u + sum(slope(first[:, k], x, create_graph=True)[:, k : k + 1] for k in range(3))


def force(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        return -slope(m.norm(field(m, x)).square(), x, create_graph=True)


def constant(m: Any, x: Tensor) -> Tensor:
    """A derivative without a graph is a constant; so is what no_grad and detach cut."""
    x = x.clone().requires_grad_()
    u = field(m, x)
    with torch.no_grad():
        scale = field(m, x).exp()
    return u * slope(u, x, retain_graph=True) + scale + slope(u, x, create_graph=True) * u.detach()


def backward(m: Any, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    field(m, x).sum().backward(create_graph=True)
    return x.grad


def penalty(m: Any, x: Tensor, along: Callable[[Tensor], Tensor]) -> Tensor:
    """(‖∇(u · v)‖ - 1)², where v is made of sizes or numbers."""
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(field(m, x), x, along(x), create_graph=True)
    return (found.norm(dim=1, keepdim=True) - 1) ** 2


FORWARDS: dict[str, Callable[..., Any]] = {
    "along ones of a size": lambda m, x: penalty(m, x, lambda x: torch.ones(x.size(0), 3, dtype=x.dtype)),
    "along ones of a length": lambda m, x: penalty(m, x, lambda x: x.new_ones(len(x), 3)),
    "along numbers": lambda m, x: penalty(m, x, lambda x: torch.tensor([[1.0, 2.0, 3.0]]).to(x).expand(len(x), -1)),
    "pinn": pinn,
    "force": force,
    "constant": constant,
    "backward": backward,
    "grad": lambda m, x: grad(lambda z: field(m, z).sum())(x),
    "grad of samples": lambda m, x: vmap(grad(lambda z: field(m, z).square().sum()))(x),
    "jacrev of samples": lambda m, x: vmap(jacrev(lambda z: field(m, z)))(x).sum(1),
    "vjp": lambda m, x: (lambda u, back: u + back(torch.ones_like(u))[0])(*vjp(lambda z: field(m, z), x)),
    "vmap": lambda m, x: vmap(lambda z: field(m, z))(x),
    "vmap over positions": lambda m, x: vmap(m.a, in_dims=1, out_dims=1)(x[:, None] * m.b.bias[:, None]).sum(1),
    "ensemble": lambda m, x: vmap(lambda w: x @ w)(torch.stack([m.a.weight, m.b.weight])).mean(0),
    "by the weight": lambda m, x: (
        m.a(x) @ grad(lambda w: functional_call(m.a, {"weight": w}, (ONE,)).tanh().sum())(m.a.weight)
    ),
    "convolution": lambda m, x: grad(lambda z: m.conv(z[:, None]).tanh().flatten(1).sum())(x),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_right(forward: Callable[..., Any]) -> None:
    check(Function(forward, **layers(conv=nn.Conv1d(1, 2, 2), norm=nn.LayerNorm(3))))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["grad of samples", "vmap", "ensemble", "vjp"])
def test_curvature(name: str) -> None:
    model, (x, y) = Function(FORWARDS[name], **layers()).double(), batch()
    result = tn.compile(model, LOSS, (x, y), [tn.DiagGGN()])(x, y)["diag_ggn"]
    for key, value in diag_ggn(model, nn.MSELoss(), x, y).items():
        torch.testing.assert_close(result[key], value)


def test_any_batch_size() -> None:
    program = compiled(Function(pinn, **layers()), 4)
    for size in (1, 2, 7):
        model, (x, y) = program.model, batch(size)
        want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
        torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)


def test_a_derivative_in_the_loss() -> None:
    """A penalty of the output's own map."""
    model = nn.Linear(3, 3)
    check(model, loss=lambda f, y: vmap(grad(lambda z: (z - z.tanh()).square().sum()))(f - y).square().mean())


def dual(m: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(field(m, forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.slow
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: jvp(lambda z: field(m, z), (x,), (torch.ones_like(x),))[1],
        lambda m, x: vmap(jacfwd(lambda z: field(m, z)))(x).sum(1),
        lambda m, x: vmap(hessian(lambda z: field(m, z).sum()))(x).sum(1),
        dual,
    ],
)
def test_forward_mode(forward: Callable[..., Any]) -> None:
    """Right, or refused with the line and what to do."""
    model = Function(forward, **layers())
    try:
        check(model)
    except tn.UnsupportedError as error:
        what = "forward mode" if forward is dual else "a transform of torch.func"
        assert what in str(error) and "test_transformed.py, line" in str(error)
        assert "reverse mode" in str(error)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.g


@pytest.mark.slow
def test_next_to_a_rule() -> None:
    rules = {**tn.RULES, Scale: tn.Rule("output[n, i] = input[n, i] * g[i]")}
    model = Function(lambda m, x: m.scale(pinn(m, x)), **layers(scale=Scale()))
    check(model)
    refused(model, r"torch.autograd.grad in the model \(Function\)\n.*line \d+.*with a rule", rules=rules)


def test_samples_that_meet() -> None:
    model = Function(lambda m, x: m.a(x) * vmap(lambda z: z.mean(0), in_dims=1)(m.b(x)), **layers())
    refused(model, "mixes samples")


WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "with weights": nn.CrossEntropyLoss(WEIGHTS, ignore_index=1),
    "of each": lambda f, y: nn.functional.cross_entropy(f, y, reduction="none").mean(),
    "of probabilities": lambda f, y: nn.functional.cross_entropy(f, nn.functional.one_hot(y, 3).to(f.dtype)),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "smoothed, without some": nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1),
    "smoothed with weights": nn.CrossEntropyLoss(WEIGHTS, ignore_index=1, label_smoothing=0.1),
    "smoothed of each": lambda f, y: nn.functional.cross_entropy(f, y, label_smoothing=0.1, reduction="none").mean(),
    "of images": lambda f, y: nn.functional.cross_entropy(
        f[:, :, None, None].expand(-1, -1, 2, 1), y.view(-1, 1, 1).expand(-1, 2, 1)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_classes(name: str) -> None:
    """Losses that torch takes apart below autograd, in what has no derivative of its own."""
    torch.manual_seed(0)
    model, loss = Function(lambda m, x: m.b(torch.vmap(torch.sin)(m.a(x))), **layers()).double(), LOSSES[name]
    x, y = batch()[0], torch.tensor([0, 2, 1, 0, 2])
    result = tn.compute(model, loss, (x, y), [tn.Grad(), tn.DiagGGN()])
    want = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close(tuple(result["grad"].values()), want)
    for parameter, value in diag_ggn(model, loss, x, y).items():  # type: ignore[arg-type]
        torch.testing.assert_close(result["diag_ggn"][parameter], value)


def test_a_recurrent_layer() -> None:
    """oneDNN's has no rule."""
    torch.manual_seed(0)
    own = layers(lstm=nn.LSTM(3, 3, batch_first=True))
    model = Function(lambda m, x: m.lstm(torch.vmap(torch.sin)(m.a(x))[:, None])[0][:, 0], **own)
    x, y = (t.float() for t in batch())
    result = tn.compute(model.float(), LOSS, (x, y), [tn.Grad()])["grad"]
    want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(tuple(result.values()), want)
