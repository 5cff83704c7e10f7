"""What the tests of captured models share: a program has autograd's gradients, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import UnsupportedError

LOSS = nn.MSELoss()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(size, 3, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def layers(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), **more}


def compiled(model: nn.Module, size: int = 5, loss: Any = LOSS, more: Any = (), **options: Any) -> tn.Program:
    return tn.compile(model.double(), loss, batch(size), [tn.Grad(), tn.BatchL2(), *more], **options)


def check(model: nn.Module, size: int = 5, loss: Any = LOSS, **options: Any) -> tn.Result:
    """The gradient, and the norms of those of single samples, as autograd gives them; the result, with what is more."""
    result, (x, y) = compiled(model, size, loss, **options)(*batch(size)), batch(size)
    parameters = dict(model.named_parameters())

    def gradient(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss(model(x), y), list(parameters.values()), allow_unused=True, materialize_grads=True
        )

    each = [gradient(x[n : n + 1], y[n : n + 1]) for n in range(size)]
    for k, (name, whole) in enumerate(zip(parameters, gradient(x, y), strict=True)):
        torch.testing.assert_close(result["grad"][name], whole)
        norms = torch.stack([g[k].square().sum() for g in each]) / size**2
        torch.testing.assert_close(result["batch_l2"][name], norms)
    return result


def refused(model: nn.Module, message: str, **options: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s){message}"):
        compiled(model, **options)
