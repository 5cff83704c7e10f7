"""What a random program's quantities are, by autograd on the plain forward, and how a compiled program compares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.quantities import Quantity

from .random_models import Problem

Values = Mapping[str, Tensor]
FIRST: tuple[Quantity, ...] = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance())
SECOND: tuple[Quantity, ...] = (tn.DiagGGN(), tn.HessianDiag(), tn.Jacobians())
TOLERANCE, ROUNDED = 1e-8, 1e-4
"""Of float64, and of a program that casts to float32 on the way (autograd rounds the derivative as well)."""


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rows(values: Tensor, theta: list[nn.Parameter], create_graph: bool = False) -> list[Tensor]:
    """The gradient of each number, [count, *p]; zeros where nothing is read."""
    found = [
        torch.autograd.grad(value, theta, retain_graph=True, create_graph=create_graph, materialize_grads=True)
        if value.requires_grad
        else [torch.zeros_like(p) for p in theta]
        for value in values.flatten()
    ]
    return [torch.stack(each) for each in zip(*found, strict=True)]


def jacobians(problem: Problem) -> list[Tensor]:
    """[N, F, *p]."""
    theta = list(parameters(problem.model).values())
    samples = [rows(problem.model(problem.x[n : n + 1]), theta) for n in range(len(problem.x))]
    return [torch.stack(each) for each in zip(*samples, strict=True)]


def expected(problem: Problem) -> dict[str, Values]:
    """Every quantity, {parameter: value}."""
    model, loss, x, y = problem.model, problem.loss, problem.x, problem.y
    theta, size = parameters(model), len(x)
    output = model(x)
    f = output.detach().requires_grad_()
    (pulled,) = torch.autograd.grad(loss(f, y), f, create_graph=True, materialize_grads=True)
    J = jacobians(problem)
    G = [torch.einsum("nf...,nf->n...", j, pulled.detach().reshape(size, -1)) for j in J]
    H = rows(pulled, [f])[0].reshape(size, -1, size, f[0].numel())  # type: ignore[list-item]
    H = torch.stack([H[n, :, n] for n in range(size)])
    scale = size if loss.reduction == "mean" else 1
    unscaled = [scale * g for g in G]
    diagonal = []
    for p in theta.values():
        (g,) = torch.autograd.grad(loss(model(x), y), p, create_graph=True, materialize_grads=True)
        diagonal.append(rows(g, [p])[0].reshape(p.numel(), p.numel()).diagonal().reshape(p.shape))
    found = {
        "grad": [g.sum(0) for g in G],
        "batch_grad": G,
        "batch_l2": [g.flatten(1).square().sum(1) for g in G],
        "second_moment": [g.square().mean(0) for g in unscaled],
        "variance": [(g - g.mean(0)).square().mean(0) for g in unscaled],
        "diag_ggn": [torch.einsum("nf...,nfg,ng...->...", j, H, j) for j in J],
        "hessian_diag": diagonal,
        "jacobians": J,
    }
    return {name: dict(zip(theta, values, strict=True)) for name, values in found.items()}


def usable(problem: Problem) -> bool:
    """Whether PyTorch itself computes it, in finite numbers, sample by sample."""
    try:
        want = expected(problem)
        single = torch.cat([problem.model(problem.x[n : n + 1]) for n in range(len(problem.x))])
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    if not torch.allclose(single, problem.model(problem.x), atol=1e-10):
        return False
    every = [value for values in want.values() for value in values.values()]
    return all(bool(value.isfinite().all()) for value in every) and max(float(v.abs().max()) for v in every) < 1e6


def faults(problem: Problem) -> list[str]:
    """What is wrong; empty where every quantity is right. What is refused is noted with "refused"."""
    want, found = expected(problem), []
    tolerance = ROUNDED if "float()" in repr(problem.model) else TOLERANCE
    groups: list[tuple[Quantity, ...]] = [(*FIRST, *SECOND)]
    while groups:
        quantities = groups.pop()
        try:
            program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
            result = program(problem.x, problem.y)
        except (tn.UnsupportedError, tn.InputError) as error:
            if len(quantities) > len(FIRST):
                groups += [*((each,) for each in SECOND), FIRST]
            else:
                found.append(f"refused {quantities[0].name}: {error}")
            continue
        for quantity in quantities:
            for name, value in want[quantity.name].items():
                got = result[quantity.name][name]
                same = got.shape == value.shape
                error_size = float((got - value).abs().max() / value.abs().max().clamp(min=1.0)) if same else torch.inf
                if not error_size <= tolerance:
                    found.append(f"wrong {quantity.name} of {name!r}: {error_size:.3g}")
    return found
