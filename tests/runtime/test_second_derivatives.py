"""Products with the Hessian of cross-entropy in closed form: the same numbers as torch's, in little memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tnbackprop as tn

Loss = Callable[[Tensor, Tensor], Tensor]
WEIGHT = torch.tensor([0.3, 1.7, 0.4, 1.1, 0.8]).double()


def with_options(reduction: str, ignored: int, weighted: bool, smoothing: float = 0.0) -> Loss:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(
            f, y, WEIGHT if weighted else None, ignore_index=ignored, reduction=reduction, label_smoothing=smoothing
        )
        return found if found.ndim == 0 else (found.square()).sum() / 7

    return loss


OPTIONS = product(("mean", "sum", "none"), (-100, 1), (False, True))
LOSSES: dict[str, Loss] = {str(each): with_options(*each) for each in OPTIONS} | {
    "smoothed": with_options("mean", 1, True, 0.1),
    "module": nn.CrossEntropyLoss(WEIGHT),
    "exponential": lambda f, y: F.cross_entropy(f, y).exp(),
    "two": lambda f, y: F.cross_entropy(f, y) + F.cross_entropy(2 * f.flip(1), y, reduction="sum"),
    "probabilities": lambda f, y: F.cross_entropy(f, F.one_hot(y, 5).double().movedim(-1, 1)),
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def dense(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """GGN and Hessian by torch alone, [P, P]."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def output(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in theta.values()])
        return functional_call(model, {n: q.view_as(p) for (n, p), q in zip(theta.items(), parts, strict=True)}, (x,))

    flat = torch.cat([p.reshape(-1) for p in theta.values()])
    J = torch.autograd.functional.jacobian(output, flat).flatten(0, -2)
    H = torch.autograd.functional.hessian(lambda f: loss(f, y), output(flat)).reshape(len(J), len(J))
    return J.T @ H @ J, torch.autograd.functional.hessian(lambda t: loss(output(t), y), flat)


@pytest.mark.parametrize("name", LOSSES)
def test_products(name: str) -> None:
    """All rows of both matrices, several vectors at once, and one alone."""
    model, loss = model_of(), LOSSES[name]
    x, y = torch.randn(6, 3).double(), torch.tensor([1, 0, 2, 4, 1, 3])
    G, H = dense(model, loss, x, y)
    vector = torch.randn(len(G)).double()
    for made, want in ((tn.ggn_product(model, loss, (x, y)), G), (tn.hessian_product(model, loss, (x, y)), H)):
        assert (made.to_dense() - want).abs().max() <= 1e-10 * want.abs().max()
        assert (made @ vector - want @ vector).abs().max() <= 1e-10 * (want @ vector).abs().max()


@pytest.mark.parametrize("flat", [False, True])
def test_positions(flat: bool) -> None:
    model, x, y = model_of(), torch.randn(2, 4, 3).double(), torch.randint(5, (2, 4))
    loss: Loss = lambda f, y: (  # noqa: E731
        F.cross_entropy(f.flatten(0, 1), y.flatten()) if flat else F.cross_entropy(f.movedim(-1, 1), y)
    )
    G, H = dense(model, loss, x, y)
    assert (tn.ggn_product(model, loss, (x, y)).to_dense() - G).abs().max() <= 1e-10 * G.abs().max()
    assert (tn.hessian_product(model, loss, (x, y)).to_dense() - H).abs().max() <= 1e-10 * H.abs().max()


def test_nothing_but_ignored_positions() -> None:
    """torch's loss is 0/0 then, and its gradient 0; so are the products."""
    model, x, y = model_of(), torch.randn(2, 3).double(), torch.full((2,), -100)
    assert not tn.ggn_product(model, F.cross_entropy, (x, y)).to_dense().any()


class Large(TorchDispatchMode):
    """How many values of so many elements are made, in memory of their own, and what is there at once."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.alive, self.most = elements, dict[int, Any](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() >= self.elements * each.element_size():
                self.alive[each.untyped_storage()._cdata] = torch.multiprocessing.reductions.StorageWeakRef(
                    each.untyped_storage()
                )
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return found


@pytest.mark.slow
def test_few_values_as_large_as_the_output() -> None:
    """The output is kept; next to it a product has J v in two summands and their sum, or J v, p and p v."""
    torch.manual_seed(0)
    classes = 500
    model = nn.Sequential(nn.Embedding(40, 3), nn.Tanh(), nn.Linear(3, classes))
    x, y = torch.randint(40, (64,)), torch.randint(classes, (64,))
    with Large(64 * classes) as made:
        multiply = tn.ggn_product(model, F.cross_entropy, (x, y))
    gc.collect()  # torch.func leaves cycles
    assert sum(not each.expired() for each in made.alive.values()) <= 1, "kept"
    vector = torch.randn(sum(p.numel() for p in model.parameters()))
    with Large(64 * classes) as seen:
        multiply(vector)
    assert seen.most <= 3
