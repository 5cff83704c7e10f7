"""Second-order contenders, and the definitions that their values are held against before anything is timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F

import tnbackprop as tn

from .contenders import HAS_BACKPACK, Outcome, Run, Setting

HAS_CURVLINOPS = importlib.util.find_spec("curvlinops") is not None
if HAS_BACKPACK:
    import backpack
    from backpack import extensions
if HAS_CURVLINOPS:
    from curvlinops import KFACLinearOperator

# Key -> class; a class that this version does not have is left out, and the benchmark says so.
CLASSES = {
    "grad": "Grad",
    "batch_grad": "BatchGrad",
    "batch_l2": "BatchL2",
    "batch_dot": "BatchDot",
    "second_moment": "SecondMoment",
    "variance": "Variance",
    "diag_ggn_mc": "DiagGGNMC",
    "kfac": "KFAC",
    "kflr": "KFLR",
    "diag_ggn": "DiagGGN",
    "ggn_trace": "GGNTrace",
    "sqrt_ggn_mc": "SqrtGGNMC",
    "sqrt_ggn": "SqrtGGN",
    "hessian_diag": "HessianDiag",
}
KNOWN = tuple(key for key, name in CLASSES.items() if hasattr(tn, name))
SAMPLED = ("diag_ggn_mc", "kfac", "sqrt_ggn_mc")
FIRST_ORDER = ("batch_grad", "batch_l2", "batch_dot", "second_moment", "variance")
ENTRIES = 6  # of each parameter, at which the Hessian's diagonal is checked
CHUNK = 10  # columns at a time in the definitions

Facts = Mapping[str, Mapping[str, tuple[Tensor, ...]]]  # quantity -> parameter -> what can be compared


def ours(memory_limit: str | None = None) -> Callable[[Setting, tuple[str, ...]], Run]:
    def build(setting: Setting, keys: tuple[str, ...]) -> Run:
        model, loss, x, y = setting.build()
        wanted = dict.fromkeys(("grad", *keys))
        quantities = [getattr(tn, CLASSES[key])() for key in wanted]
        program: Any = tn.compile(model, loss, (x, y), quantities=quantities, memory_limit=memory_limit)

        def run() -> Outcome:
            result = program(x, y)
            return Outcome(result.loss, result.output, {key: result[key] for key in wanted})

        return run

    return build


def backpacked(setting: Setting, keys: tuple[str, ...]) -> Run:
    table = {
        "batch_grad": extensions.BatchGrad,
        "batch_l2": extensions.BatchL2Grad,
        "second_moment": extensions.SumGradSquared,
        "variance": extensions.Variance,
        "diag_ggn_mc": extensions.DiagGGNMC,
        "kfac": extensions.KFAC,
        "kflr": extensions.KFLR,
        "diag_ggn": extensions.DiagGGNExact,
        "sqrt_ggn_mc": extensions.SqrtGGNMC,
        "sqrt_ggn": extensions.SqrtGGNExact,
        "hessian_diag": extensions.DiagHessian,
    }
    model, loss_function, x, y = setting.build()
    model, loss_function = backpack.extend(model), backpack.extend(loss_function)
    wanted = {key: table[key]() for key in keys}

    def run() -> Outcome:
        output = model(x)
        loss = loss_function(output, y)
        with backpack.backpack(*wanted.values()):
            loss.backward()
        fields = {"grad": "grad"} | {key: extension.savefield for key, extension in wanted.items()}
        return Outcome(loss.detach(), output.detach(), {key: dict(_taken(model, f)) for key, f in fields.items()})

    return run


def _taken(model: nn.Module, field: str) -> Iterator[tuple[str, Any]]:
    """The attribute of each parameter, which is removed from it."""
    for name, parameter in model.named_parameters():
        yield name, getattr(parameter, field)
        if field == "grad":
            parameter.grad = None
        else:
            delattr(parameter, field)


def curvlinops(setting: Setting, keys: tuple[str, ...]) -> Run:
    """Its factors only: no gradient for the labels comes with them."""
    model, loss, x, y = setting.build()
    names = {module: name for name, module in model.named_modules()}
    operator = KFACLinearOperator(
        model, loss, list(model.parameters()), [(x, y)], check_deterministic=False,
        fisher_type={"kfac": "mc", "kflr": "type-2"}[keys[0]],
        num_per_example_loss_terms=1, num_data=setting.batch,
    )  # fmt: skip

    def run() -> Outcome:
        inputs, gradients = operator._input_covariances, operator._gradient_covariances
        inputs.clear()
        gradients.clear()
        operator.compute_kronecker_factors()
        values: dict[str, tuple[Tensor, ...]] = {}
        for module in names.values():
            if module in gradients:
                values[f"{module}.weight"] = (gradients[module], inputs[module])
                values[f"{module}.bias"] = (gradients[module],)
        none = torch.empty(0)
        return Outcome(none, none, {keys[0]: values})

    return run


# What is compared. Roots are not unique and samples not the same, so each quantity has facts that must agree.


def facts(key: str, value: Any, probe: Tensor) -> tuple[Tensor, ...]:
    """Of one parameter: the value itself, or what of it is defined.

    Kronecker factors: each divided by its trace, and the product of the traces, since conventions split the scale.
    A root V: Vᵀ(V probe). Sampled ones: the trace, which must be near that of the exact quantity.
    """
    if key in ("kflr", "kfac"):
        factors = value.factors if hasattr(value, "factors") else tuple(value)
        traces = [factor.diagonal().sum() for factor in factors]
        product = torch.stack(traces).prod()
        shapes = tuple(factor / trace for factor, trace in zip(factors, traces, strict=True))
        return (product, *shapes) if key == "kflr" else (product, *shapes[1:])
    if key == "sqrt_ggn":
        V = value.detach().flatten(2).flatten(0, 1)
        return (V.T @ (V @ probe.flatten()),)
    if key == "sqrt_ggn_mc":
        return (value.detach().square().sum(),)
    if key == "diag_ggn_mc":
        return (value.detach().sum(),)
    if key == "hessian_diag":
        return (value.detach().flatten()[entries(value.numel())],)
    return (value.detach(),)


def entries(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(size, (min(ENTRIES, size),), generator=generator)


@dataclass(frozen=True)
class Definition:
    """The exact values, from torch.func and from hooks; only those that are asked for.

    `convolutions` are BackPACK's factors where they differ: B is the bias's GGN, A a sum over positions.
    """

    facts: dict[str, dict[str, tuple[Tensor, ...]]]
    convolutions: dict[str, tuple[Tensor, ...]]
    probes: dict[str, Tensor]


def define(setting: Setting, keys: tuple[str, ...]) -> Definition:
    model, loss, x, y = setting.build()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    probes = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p) for name, p in theta.items()}
    found: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    if set(keys) & {"diag_ggn", "diag_ggn_mc", "sqrt_ggn", "sqrt_ggn_mc", "ggn_trace"}:
        found |= _from_roots(model, theta, x, probes)
    convolutions: dict[str, tuple[Tensor, ...]] = {}
    if set(keys) & {"kflr", "kfac"}:
        found["kflr"], convolutions = _kronecker(model, x)
        found["kfac"] = {name: (parts[0], *parts[2:]) for name, parts in found["kflr"].items()}
    if "hessian_diag" in keys:
        found["hessian_diag"] = _hessian_entries(model, loss, theta, x, y)
    return Definition(found, convolutions, probes)


def _root(output: Tensor) -> Tensor:
    """S_n = (diag sqrt(p) - p sqrt(p)ᵀ) / sqrt(N) of the mean cross-entropy, [N, C, C]."""
    p = output.detach().softmax(1)
    return (torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)) / len(output) ** 0.5


def _from_roots(
    model: nn.Module, theta: Mapping[str, Tensor], x: Tensor, probes: Mapping[str, Tensor]
) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Sample by sample, the columns as vector-Jacobian products."""
    diagonal = {name: torch.zeros_like(p) for name, p in theta.items()}
    product = {name: torch.zeros_like(p) for name, p in theta.items()}
    traces: dict[str, list[Tensor]] = {name: [] for name in theta}
    roots = _root(functional_call(model, dict(theta), (x,)))
    for sample, S in zip(x, roots, strict=True):
        _, pullback = vjp(lambda t, s=sample: functional_call(model, t, (s.unsqueeze(0),))[0], dict(theta))
        sizes = dict.fromkeys(theta, 0.0)
        for columns in S.T.split(CHUNK):
            (rows,) = vmap(pullback)(columns)
            for name, V in rows.items():
                squares = V.square().sum(0)
                diagonal[name] += squares
                sizes[name] += squares.sum()
                along = V.flatten(1) @ probes[name].flatten()
                product[name] += torch.einsum("v...,v->...", V, along)
        for name, size in sizes.items():
            traces[name].append(torch.as_tensor(size))
    total = {name: (d.sum(),) for name, d in diagonal.items()}
    return {
        "diag_ggn": {name: (d,) for name, d in diagonal.items()},
        "diag_ggn_mc": total,
        "sqrt_ggn_mc": total,
        "sqrt_ggn": {name: (p.flatten(),) for name, p in product.items()},
        "ggn_trace": {name: (torch.stack(t),) for name, t in traces.items()},
    }


def _kronecker(model: nn.Module, x: Tensor) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, tuple[Tensor, ...]]]:
    """KFLR-expand of every layer as facts, and BackPACK's for convolutions: one backward pass per column."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda _, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output)))
        for name, m in layers.items()
    ]
    output = model(x)
    for hook in hooks:
        hook.remove()
    outputs = [out for _, out in seen.values()]
    expand = {name: torch.zeros(out.shape[1], out.shape[1]).to(x) for name, (_, out) in seen.items()}
    reduce = {name: torch.zeros_like(B) for name, B in expand.items()}
    for column in _root(output).unbind(2):
        for name, b in zip(seen, torch.autograd.grad(output, outputs, column, retain_graph=True), strict=True):
            b = b.flatten(2) if b.ndim > 2 else b.unsqueeze(2)
            rows = b.transpose(1, 2).flatten(0, 1)
            expand[name] += rows.T @ rows
            reduce[name] += b.sum(2).T @ b.sum(2)
    found, theirs = {}, {}
    for name, layer in layers.items():
        a = seen[name][0].detach()
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        rows = a.flatten(0, -2)
        A, T = rows.T @ rows / len(rows), len(rows) // len(x)
        for key, B, scale in ((found, expand[name], 1), (theirs, reduce[name], T)):
            key[f"{name}.weight"] = facts("kflr", (B, scale * A), A)
            key[f"{name}.bias"] = facts("kflr", (B,), B)
    return found, theirs


def _hessian_entries(
    model: nn.Module, loss: nn.Module, theta: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, ...]]:
    """e_iᵀ (∇²L) e_i at some entries of each parameter."""
    found = {}
    for name, p in theta.items():
        chosen = entries(p.numel())

        def value(own: Tensor, name: str = name) -> Tensor:
            return loss(functional_call(model, {**theta, name: own}, (x,)), y)

        values = []
        for index in chosen.tolist():
            direction = torch.zeros_like(p)
            direction.view(-1)[index] = 1
            values.append(jvp(grad(value), (p,), (direction,))[1].flatten()[index])
        found[name] = (torch.stack(values),)
    return found
