"""The quantities from torch.func on the plain forward, in the simplest way. Nothing of tnbackprop is used.

Individual gradients are those of per-sample copies of the parameters: with theta_n = theta for each sample n,
G_n = dL / dtheta_n. That is (1/N) grad l_n for every loss, also where a divisor couples the samples
(ignored targets, class weights).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Values = Mapping[str, Tensor]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by their first name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def grad(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """nabla L, [*p]."""

    def value(theta: dict[str, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(model, theta, (x,)), y)

    return torch.func.grad(value)(parameters(model))


def batch_grad(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """dL / dtheta_n of per-sample copies, [N, *p]."""
    size = x.shape[0]
    copies = {name: p.expand(size, *p.shape).clone() for name, p in parameters(model).items()}

    def value(theta: dict[str, Tensor]) -> Tensor:
        outputs = [
            torch.func.functional_call(model, {name: p[n] for name, p in theta.items()}, (x[n : n + 1],))
            for n in range(size)
        ]
        return loss(torch.cat(outputs), y)

    return torch.func.grad(value)(copies)


def batch_l2(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """||G_n||^2, [N]."""
    return {name: g.reshape(len(g), -1).square().sum(1) for name, g in batch_grad(model, loss, x, y).items()}


def batch_dot(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """<G_n, G_m>, [N, N]."""
    return {name: g.reshape(len(g), -1) @ g.reshape(len(g), -1).T for name, g in batch_grad(model, loss, x, y).items()}


def second_moment(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """(1/N) sum_n [grad l_n]^2, [*p]."""
    return {name: g.square().mean(0) for name, g in _unscaled(model, loss, x, y).items()}


def variance(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """(1/N) sum_n [grad l_n]^2 - [(1/N) sum_n grad l_n]^2, [*p], computed centred."""
    return {name: (g - g.mean(0)).square().mean(0) for name, g in _unscaled(model, loss, x, y).items()}


def _unscaled(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """grad l_n = G_n / c, with c = 1/N for a mean and 1 for a sum."""
    factor = x.shape[0] if loss.reduction == "mean" else 1
    return {name: factor * g for name, g in batch_grad(model, loss, x, y).items()}
