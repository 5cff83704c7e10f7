"""torch's warnings of what a program does inside do not reach the user; those of the user's own calls do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.running.torch_quiet import UNWARNED

from ..capturing import Function

X = torch.randn(4, 3, dtype=torch.float64)


def grid(m: Any, x: Tensor) -> Tensor:
    """torch has no batching rule for `affine_grid`, nor for its derivative."""
    return F.affine_grid(m.a(x).reshape(-1, 2, 3), (x.shape[0], 1, 2, 2), align_corners=False).flatten(1)  # type: ignore[no-any-return]


def written(m: Any, x: Tensor) -> Tensor:
    """Nor for `scatter_` with a number, nor for what masks write in place."""
    return m.a(x).scatter(1, torch.zeros_like(x[:, :1], dtype=torch.long), 2.0)  # type: ignore[no-any-return]


def squares(f: Tensor, y: Tensor) -> Tensor:
    """A loss whose second derivative is taken of a function that is mapped."""
    return grid_loss(f) + f.square().sum()


def grid_loss(f: Tensor) -> Tensor:
    theta = f[:, :6].reshape(-1, 2, 3)
    return F.affine_grid(theta, (f.shape[0], 1, 2, 2), align_corners=False).square().sum()


def products(model: nn.Module, x: Tensor) -> None:
    product = tn.hessian_product(model, squares, (x, x))
    product({name: torch.randn(2, *p.shape, dtype=p.dtype) for name, p in model.named_parameters()})


def quantities(model: nn.Module, x: Tensor) -> None:
    program = tn.compile(model, squares, (x, x), [tn.BatchGrad(), tn.DiagGGN()])
    program(x, x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("forward", [grid, written])
@pytest.mark.parametrize("work", [quantities, products])
def test_no_word_of_mapping(
    forward: Callable[..., Any], work: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings(record=True, action="always") as told:
        work(Function(forward, a=nn.Linear(3, 6)).double(), X)
    assert [str(each.message) for each in told] == [] and capfd.readouterr().err == ""


def test_others_are_warned() -> None:
    """After a program has run, also in several threads at once, and after one that failed."""
    model = Function(grid, a=nn.Linear(3, 6)).double()
    program = tn.compile(model, squares, (X, X), [tn.BatchGrad()])
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: program(X, X), range(16)))
    with pytest.raises(KeyError), UNWARNED, UNWARNED:
        raise KeyError
    with pytest.warns(UserWarning, match="performance drop"):
        torch.func.vmap(lambda theta: torch.affine_grid_generator(theta, (1, 1, 2, 2), False))(torch.ones(4, 1, 2, 3))
