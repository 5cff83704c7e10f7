"""Functions that a rule's code calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tnbackprop as tn

from .. import oracle


class One(nn.Tanh):
    pass


class Other(nn.Tanh):
    pass


def first() -> Callable[..., torch.Tensor]:
    def pulled(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return g * (1 - y * y)

    return pulled


def second() -> Callable[..., torch.Tensor]:
    def pulled(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return g - g * y**2

    return pulled


def rule(function: Callable[..., torch.Tensor]) -> tn.Rule:
    return tn.Rule(
        forward="{input}.tanh()",
        vjp={"input": "pulled({cotangents}, {output})"},
        legs={"output": "n, c"},
        functions=(function,),
    )


@pytest.mark.parametrize("other", [first, second])
def test_two_of_one_name(other: Callable[[], Callable[..., torch.Tensor]]) -> None:
    """One source serves both; another one of that name would be taken for the first, silently."""
    model = nn.Sequential(nn.Linear(2, 2), One(), nn.Linear(2, 2), Other())
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    rules = tn.RULES | {One: rule(first()), Other: rule(other())}
    if other is second:
        with pytest.raises(tn.RuleError, match="two functions of rules are called pulled"):
            tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchGrad()], rules=rules)
    else:
        found = tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchGrad()], rules=rules)(x, y)["batch_grad"]
        for name, want in oracle.batch_grad(model, nn.MSELoss(), x, y).items():
            torch.testing.assert_close(found[name], want)


def test_what_has_no_source_of_its_own() -> None:
    scale = 2.0

    def pulled(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return g * scale

    model, batch = nn.Sequential(nn.Linear(2, 2), One()), (torch.randn(3, 2), torch.randn(3, 2))
    for function, wrong in ((pulled, "reads scale from around it"), (lambda g, y: g, "has no name")):
        with pytest.raises(tn.RuleError, match=wrong):
            tn.compile(model, nn.MSELoss(), batch, [tn.Grad()], rules=tn.RULES | {One: rule(function)})
