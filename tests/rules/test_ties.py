"""Where elements are equal, masked or all the same: individual gradients are those of autograd, and no NaN arises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ..models import Apply

ZERO = torch.zeros(3).double()
TIED = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0], [0.5, -1.0, 0.5]]).double()
SIGNS = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 0.5], [-1.0, -2.0, -3.0]]).double() / 4
MASK = torch.tensor([[True, False, True]])


def spread(x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, 3)


EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda h: spread(h.amax(1)),
    "amin": lambda h: h - h.amin(1, keepdim=True),
    "amax of two axes": lambda h: spread((h[:, :, None] * h[:, None]).amax((1, 2))),
    "aminmax": lambda h: h * torch.aminmax(h, dim=1, keepdim=True)[1] - torch.aminmax(h, dim=1, keepdim=True)[0],
    "std": lambda h: spread(h.std(1)),
    "std, correction 0": lambda h: (h - h.mean(1, keepdim=True)) / (h.std(1, correction=0, keepdim=True) + 1e-3),
    "std of one": lambda h: h * h[:, :1].std(1, correction=0, keepdim=True),
}
SAME = {"aminmax": lambda h: h * h.amax(1, keepdim=True) - h.amin(1, keepdim=True)}
"""Of what older versions of torch have no derivative."""
MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda h: torch.where(h > 0, h, 0.0).sqrt(),
    "where, other": lambda h: torch.where(h <= 0, 0.0, h).sqrt(),
    "masked_fill": lambda h: h.masked_fill(h <= 0, 0.0).sqrt(),
    "clamp": lambda h: torch.acos((5 * h).clamp(-1, 1)),
    "clamp_min": lambda h: h.clamp_min(0).square().sum(1, keepdim=True).sqrt() * h,
    "relu6": lambda h: F.relu6(h).sqrt(),
    "hardshrink": lambda h: F.hardshrink(h.exp(), 0.9).log().clamp(min=-3),
    "softshrink": lambda h: F.softshrink(h.exp(), 0.9).sqrt(),
    "maximum": lambda h: torch.maximum(h, ZERO).sqrt(),
    "minimum": lambda h: (-torch.minimum(-h, ZERO)).sqrt(),
    "tril": lambda h: (h.exp()[:, :, None] * h.exp()[:, None]).tril(-1).square().sum(-1).sqrt(),
    "all masked": lambda h: h.masked_fill(h < 0, -torch.inf).softmax(1).nan_to_num(0.0),
}


class Applied(nn.Module):
    """A function of a product with a parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.ones(3).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.w)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", [*EQUAL, *MASKED])
def test_as_autograd(name: str) -> None:
    model, x = Applied((EQUAL | MASKED)[name]), TIED if name in EQUAL else SIGNS
    y, loss = torch.zeros(3, 3).double(), nn.MSELoss(reduction="sum")
    got = tn.compute(model, loss, (x, y), [tn.BatchGrad()])["batch_grad"]["w"]
    model.function = SAME.get(name, model.function)
    want = [torch.autograd.grad(loss(model(x[n : n + 1]), y[:1]), model.w)[0] for n in range(3)]
    assert torch.stack(want).isfinite().all()
    torch.testing.assert_close(got, torch.stack(want))


def test_a_parameter_of_equal_elements() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w / self.w.abs().amax() + self.w.std()

    model, y, loss = Scaled(), torch.zeros(3, 3).double(), nn.MSELoss()
    got = tn.compute(model, loss, (TIED, y), [tn.Grad()])["grad"]["w"]
    torch.testing.assert_close(got, torch.autograd.grad(loss(model(TIED), y), model.w)[0])


SIZES: dict[str, Callable[[int], float]] = {
    "max": lambda n: max(n - 1, 1), "half": lambda n: (n + 1) // 2, "root": lambda n: (n + 1) ** 0.5,
    "correction": lambda n: 1 / (1 - 1 / (n + 1)), "truncated": lambda n: int(n**0.5), "square": lambda n: n**2,
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SIZES)
def test_a_loss_over_any_function_of_the_batch_size(name: str) -> None:
    torch.manual_seed(0)
    model, of = nn.Linear(3, 2).double(), SIZES[name]
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().sum() / of(len(f))

    result = tn.compute(model, loss, (x, y), [tn.Grad(), tn.BatchGrad(), tn.Variance(), tn.SecondMoment()])
    want = torch.autograd.grad(loss(model(x), y), model.weight)[0]
    torch.testing.assert_close(result["grad"]["weight"], want)
    torch.testing.assert_close(result["batch_grad"]["weight"].sum(0), want)


DETACHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "detached": lambda f, y: (f.detach() - y).square().mean(),
    "without": lambda f, y: y.square().mean(),
}


@pytest.mark.parametrize("name", DETACHED)
def test_no_curvature_of_what_nothing_reaches(name: str) -> None:
    model, x, y = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randn(6, 2).double()
    for quantity in (tn.DiagGGN(), tn.KFAC(), tn.HessianDiag()):
        with pytest.raises(tn.UnsupportedError, match="nothing trainable reaches"):
            tn.compile(model, DETACHED[name], (x, y), [quantity])
    constant = nn.Sequential(model, Apply(Tensor.detach))
    with pytest.raises(tn.UnsupportedError, match="nothing trainable reaches the output"):
        tn.compile(constant, None, (x, None), [tn.Jacobians()])


def test_curvature_of_huber_at_its_ends() -> None:
    """Its second derivative is torch's, 0 where the distance is delta."""
    model, y = nn.Linear(1, 1, bias=False).double(), torch.zeros(3, 1).double()
    x = torch.tensor([[1.0], [2.0], [0.5]]).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    loss = nn.HuberLoss()
    slope = torch.autograd.grad(loss(model(x), y), model.weight, create_graph=True)[0]
    want = torch.autograd.grad(slope.sum(), model.weight)[0]
    result = tn.compute(model, loss, (x, y), [tn.DiagGGN(), tn.HessianDiag()])
    for key in result:
        torch.testing.assert_close(result[key]["weight"], want)
