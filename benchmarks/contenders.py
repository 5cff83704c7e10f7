"""Who is timed: each contender builds a call that returns loss, output, gradient and one quantity (or all)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

import tnbackprop as tn

from .models import Problem

# A peer that is not installed is left out, and the benchmark says so.
HAS_BACKPACK = importlib.util.find_spec("backpack") is not None
HAS_OPACUS = importlib.util.find_spec("opacus") is not None
if HAS_BACKPACK:
    import backpack
    from backpack import extensions
    from backpack.core.derivatives.convnd import weight_jac_t_save_memory
if HAS_OPACUS:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

QUANTITIES = {
    "grad": tn.Grad,
    "batch_grad": tn.BatchGrad,
    "batch_l2": tn.BatchL2,
    "batch_dot": tn.BatchDot,
    "second_moment": tn.SecondMoment,
    "variance": tn.Variance,
}
ALL = "all"

Values = Mapping[str, Mapping[str, Tensor]]  # quantity -> parameter -> value


@dataclass(frozen=True)
class Outcome:
    loss: Tensor
    output: Tensor
    values: Values  # "grad" is always there


@dataclass(frozen=True)
class Setting:
    """A problem at a batch size on a device."""

    problem: Problem
    batch: int
    device: torch.device

    def build(self) -> tuple[nn.Sequential, nn.Module, Tensor, Tensor]:
        return *self.problem.build(self.device), *self.problem.data(self.batch, self.device)


Run = Callable[[], Outcome]


@dataclass(frozen=True)
class Contender:
    """`build(setting, keys)` gives the call for these quantities; `scale` brings a value to our convention."""

    name: str
    quantities: tuple[str, ...]
    build: Callable[[Setting, tuple[str, ...]], Run]
    needs: str = ""
    available: bool = True
    scale: Callable[[str, Tensor, int], Tensor] = lambda key, value, batch: value

    def rows(self) -> dict[str, tuple[str, ...]]:
        """Entry name -> quantities: each alone, and all that the contender has."""
        rows = {f"{self.name}/{key}": (key,) for key in self.quantities}
        if len(self.quantities) > 2:
            rows[f"{self.name}/{ALL}"] = self.quantities
        return rows


def plain(setting: Setting, keys: tuple[str, ...]) -> Run:
    """Autograd's gradient: the base of every ratio."""
    model, loss_function, x, y = setting.build()
    parameters = dict(model.named_parameters())

    def run() -> Outcome:
        output = model(x)
        loss = loss_function(output, y)
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        return Outcome(loss.detach(), output.detach(), {"grad": dict(zip(parameters, gradient, strict=True))})

    return run


def ours(setting: Setting, keys: tuple[str, ...]) -> Run:
    model, loss_function, x, y = setting.build()
    wanted = dict.fromkeys(("grad", *keys))
    program: Any = tn.compile(model, loss_function, (x, y), quantities=[QUANTITIES[key]() for key in wanted])

    def run() -> Outcome:
        result = program(x, y)
        return Outcome(result.loss, result.output, {key: result[key] for key in wanted})

    return run


def vmapped(setting: Setting, keys: tuple[str, ...]) -> Run:
    """torch.func.vmap(grad), then each quantity from the individual gradients."""
    model, loss_function, x, y = setting.build()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(model, parameters, (x.unsqueeze(0),))
        return loss_function(output, y.unsqueeze(0)) / setting.batch, output.squeeze(0)

    individual = vmap(grad_and_value(sample_loss, has_aux=True), in_dims=(None, 0, 0))

    def run() -> Outcome:
        gradients, (losses, output) = individual(parameters, x, y)
        return Outcome(losses.sum(), output, from_individual(gradients, keys))

    return run


def looped(setting: Setting, keys: tuple[str, ...]) -> Run:
    """One backward pass per sample."""
    model, loss_function, x, y = setting.build()
    parameters = dict(model.named_parameters())

    def run() -> Outcome:
        losses, outputs, gradients = [], [], []
        for sample, label in zip(x.split(1), y.split(1), strict=True):
            output = model(sample)
            loss = loss_function(output, label) / setting.batch
            gradients.append(torch.autograd.grad(loss, list(parameters.values())))
            losses.append(loss.detach())
            outputs.append(output.detach())
        stacked = map(torch.stack, zip(*gradients, strict=True))
        individual = dict(zip(parameters, stacked, strict=True))
        return Outcome(torch.stack(losses).sum(), torch.cat(outputs), from_individual(individual, keys))

    return run


def from_individual(gradients: Mapping[str, Tensor], keys: tuple[str, ...]) -> Values:
    """The quantities by definition, from scaled individual gradients (1/N) dl_n/dp [N, *p]."""
    return {
        key: {name: DEFINITIONS[key](gradient) for name, gradient in gradients.items()}
        for key in dict.fromkeys(("grad", *keys))
    }


DEFINITIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda g: g.sum(0),
    "batch_grad": lambda g: g,
    "batch_l2": lambda g: g.flatten(1).square().sum(1),
    "batch_dot": lambda g: g.flatten(1) @ g.flatten(1).T,
    "second_moment": lambda g: len(g) * g.square().sum(0),
    "variance": lambda g: len(g) * (g - g.mean(0)).square().sum(0),
}


def backpacked(save_memory: bool) -> Callable[[Setting, tuple[str, ...]], Run]:
    """BackPACK; `save_memory` chooses between its two algorithms for the convolution weight."""

    def build(setting: Setting, keys: tuple[str, ...]) -> Run:
        table = {
            "batch_grad": extensions.BatchGrad,
            "batch_l2": extensions.BatchL2Grad,
            "second_moment": extensions.SumGradSquared,
            "variance": extensions.Variance,
        }
        model, loss_function, x, y = setting.build()
        model, loss_function = backpack.extend(model), backpack.extend(loss_function)
        wanted = {key: table[key]() for key in keys}

        def run() -> Outcome:
            output = model(x)
            loss = loss_function(output, y)
            with weight_jac_t_save_memory(save_memory), backpack.backpack(*wanted.values()):
                loss.backward()
            fields = {"grad": "grad"} | {key: extension.savefield for key, extension in wanted.items()}
            values = {key: dict(_taken(model, field)) for key, field in fields.items()}
            return Outcome(loss.detach(), output.detach(), values)

        return run

    return build


def ghost(setting: Setting, keys: tuple[str, ...]) -> Run:
    """Opacus' ghost norms: the backward pass that comes before clipping."""
    model, loss_function, x, y = setting.build()
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, use_ghost_clipping=True)

    def run() -> Outcome:
        output = wrapped(x)
        loss = loss_function(output, y)
        loss.backward()
        values = {"batch_l2": dict(_taken(model, "_norm_sample")), "grad": dict(_taken(model, "grad"))}
        return Outcome(loss.detach(), output.detach(), values)

    return run


def _taken(model: nn.Module, field: str) -> Iterator[tuple[str, Tensor]]:
    """The attribute of each parameter, which is removed from it."""
    for name, parameter in model.named_parameters():
        yield name, getattr(parameter, field).detach()
        if field == "grad":
            parameter.grad = None
        else:
            delattr(parameter, field)


def _backpack_scale(key: str, value: Tensor, batch: int) -> Tensor:
    return value * {"second_moment": batch, "variance": batch**2}.get(key, 1)


def _ghost_scale(key: str, value: Tensor, batch: int) -> Tensor:
    return (value / batch).square() if key == "batch_l2" else value


BASE = "autograd/grad"
_BACKPACK = ("batch_grad", "batch_l2", "second_moment", "variance")


def _backpack(name: str, save_memory: bool) -> Contender:
    build = backpacked(save_memory)
    return Contender(name, _BACKPACK, build, "backpack-for-pytorch", HAS_BACKPACK, _backpack_scale)


CONTENDERS = (
    Contender("autograd", ("grad",), plain),
    Contender("tnbackprop", tuple(QUANTITIES), ours),
    Contender("vmap(grad)", tuple(QUANTITIES)[1:], vmapped),
    _backpack("backpack", save_memory=False),
    _backpack("backpack-save-memory", save_memory=True),
    Contender("opacus-ghost", ("batch_l2",), ghost, "opacus", HAS_OPACUS, _ghost_scale),
    Contender("for-loop", ("batch_grad",), looped),
)
