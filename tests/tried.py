"""Functions tried as models: what a program gives of one, against loops of autograd over samples and elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tnbackprop as tn

Part = Tensor | Callable[[], nn.Module]
FIRST = ("grad", "batch_grad")
GGN = (*FIRST, "diag_ggn")
TWICE = (*GGN, "hessian_diag")
QUANTITIES = {"grad": tn.Grad, "batch_grad": tn.BatchGrad, "diag_ggn": tn.DiagGGN, "hessian_diag": tn.HessianDiag}
MSE = nn.MSELoss()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Function(nn.Module):
    """forward(x) is function(self, x); parts are modules, and tensors that become parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], parts: dict[str, Part]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part.clone()) if isinstance(part, Tensor) else part())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass(frozen=True)
class Tried:
    """A function of the input and of parts, in float64 and eval mode, with a loss; by default a squared error."""

    name: str
    function: Callable[[Any, Tensor], Tensor]
    x: Tensor
    parts: dict[str, Part]
    quantities: Sequence[str] = GGN
    loss: Callable[[Tensor, Any], Tensor] = MSE
    y: Tensor | None = None
    bound: float = 1e-8
    options: dict[str, Any] = field(default_factory=dict)
    plain: Callable[[Any, Tensor], Tensor] | None = None
    """The same function for autograd, where some torch has no derivative of an operator."""

    def __str__(self) -> str:
        return self.name

    def build(self, function: Callable[[Any, Tensor], Tensor] | None = None) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = Function(function or self.function, self.parts).double().eval()
        with torch.no_grad():
            return model, randn(*model(self.x).shape, seed=9) if self.y is None else self.y

    def program(self) -> tn.runtime.Program:
        model, y = self.build()
        asked = [QUANTITIES[key]() for key in self.quantities]
        return tn.compile(model, self.loss, (self.x, y), asked, **self.options)

    def check(self) -> tn.runtime.Program:
        """The program, where every quantity is right for the whole batch and for two samples of it."""
        program = self.program()
        model, y = self.build(self.plain)
        for some in (slice(None), slice(1, 3)):
            x, labels = self.x[some], y[some]
            result = program(x, labels)
            for key in self.quantities:
                want = expected(key, model, self.loss, x, labels)
                assert set(result[key]) == set(want)
                for name, value in want.items():
                    got = result[key][name]
                    assert (got.shape, got.dtype) == (value.shape, value.dtype), f"{key} of {name}"
                    error = (got - value).abs().max() / value.abs().max().clamp(min=1e-6) if value.numel() else 0
                    assert error <= self.bound, f"{key} of {name}: relative error {error:.1e}"
        return program


def expected(
    key: str, model: nn.Module, loss: Callable[[Tensor, Any], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """A quantity by its definition. A loss is a sum or a mean over samples: what it is shows in its values."""
    parameters = dict(model.named_parameters())
    if key == "grad":
        return gradients(loss(model(x), y), parameters)
    if key == "hessian_diag":
        return hessian_diagonal(loss(model(x), y), parameters)
    outputs = [model(x[n : n + 1]) for n in range(len(x))]
    losses = [loss(output, y[n : n + 1]) for n, output in enumerate(outputs)]
    scale = float((loss(model(x), y) / sum(losses)).detach())
    if key == "batch_grad":
        each = [gradients(scale * value, parameters) for value in losses]
        return {name: torch.stack([one[name] for one in each]) for name in parameters}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n, output in enumerate(outputs):
        rows = [gradients(value, parameters) for value in output.flatten()]
        hessian = torch.autograd.functional.hessian(lambda o, n=n: scale * loss(o, y[n : n + 1]), output.detach())
        hessian = hessian.reshape(output.numel(), output.numel()).to(output.dtype)
        for name, p in parameters.items():
            jacobian = torch.stack([row[name].flatten() for row in rows])
            total[name] += torch.einsum("cp,cd,dp->p", jacobian, hessian.to(p.dtype), jacobian).view_as(p)
    return total


def gradients(value: Tensor, parameters: dict[str, nn.Parameter], further: bool = False) -> dict[str, Tensor]:
    every = list(parameters.values())
    found = torch.autograd.grad(value, every, allow_unused=True, retain_graph=True, create_graph=further)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def hessian_diagonal(value: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """By double backward, one element after the other."""
    first, found = gradients(value, parameters, further=True), {}
    for name, p in parameters.items():
        diagonal = torch.zeros_like(p).flatten()
        for k, element in enumerate(first[name].flatten() if first[name].requires_grad else ()):
            second = torch.autograd.grad(element, p, retain_graph=True, allow_unused=True)[0]
            diagonal[k] = 0 if second is None else second.flatten()[k]
        found[name] = diagonal.view_as(p)
    return found
