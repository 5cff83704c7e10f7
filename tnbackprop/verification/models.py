"""A model or a program on one batch: the rule of every call, then every quantity of every parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..api import compile
from ..compiler.capture.export import batch_size, model_arguments, plain
from ..compiler.translate.torch_modes import twice_differentiable
from ..declare import Declaration
from ..definitions.calls import BUILD_ERRORS, tensors_of, trace
from ..definitions.defined import SEED
from ..definitions.oracle import Problem
from ..definitions.outputs import Squares, packed
from ..definitions.report import LeftOut, NotDefined
from ..diagram.reference import size_of
from ..errors import InputError, UnsupportedError
from ..quantities import Propagation, Quantity
from ..runtime import Program
from ..runtime.handed import Handed, with_cotangent
from ..subsampled import with_rows
from .draws import unsettled
from .merged import check_merged
from .quantities import ALL, check_quantities
from .rules import Finding, check_rule, subjects

Batch = tuple[Any, Any]


def try_model(
    model: nn.Module,
    batch: Batch,
    loss: Any,
    quantities: Sequence[Quantity] | None,
    rules: Mapping[Any, Declaration] | None,
) -> Iterator[Finding]:
    if batch[0] is None:
        raise InputError("a model is verified on a batch: verify(model, x), or the shape of x: verify(model, (8, 3))")
    model = _finite(model, filled(batch[0]))
    x, y = filled(batch[0]), filled(batch[1])
    loss = copy.deepcopy(loss).double().cpu() if isinstance(loss, nn.Module) else loss
    if loss is None:
        loss, y = _default(model, x, y)
    y = _cotangent(model, loss, x, y)
    example = x if isinstance(loss, Handed) else (x, y)
    programs, left_out = programs_for(model, loss, example, quantities or ALL, rules, bool(quantities))
    for program in programs:
        for each, own in with_rows(program, (x, y)):
            yield from _program_case(each, own, each is programs[0].each[0])
    yield from left_out


def _cotangent(model: nn.Module, loss: Any, x: Any, y: Any) -> Any:
    """What takes the place of y where the cotangent is handed in: drawn, if there is none."""
    return with_cotangent(model, x, ())[1] if isinstance(loss, Handed) and y is None else y


def _default(model: nn.Module, x: Any, y: Any) -> tuple[nn.Module, Any]:
    """The loss where nobody gives one, and its target: squared errors, or the squares of several outputs."""
    output = _run(model, x)
    if isinstance(output, Tensor):
        return nn.MSELoss(), torch.randn_like(output) if y is None else y
    name = type(model).__name__
    if not any(tensor.is_floating_point() for tensor in tensors_of(output)):
        raise InputError(f"{name} returns {type(output).__name__} without a floating point tensor: nothing to compare")
    if y is not None:
        raise InputError(
            f"{name} returns {type(output).__name__}, so what y is the target of is not known\n"
            "  Give the loss as well, loss= a function (output, y); or no y, and the outputs are squared."
        )
    return Squares(), None


def try_program(program: Program, batch: Batch, quantities: Sequence[Quantity] | None) -> Iterator[Finding]:
    if quantities is not None:
        raise InputError("a program has its own quantities: compile it with those, or pass the model to verify")
    model = program.model
    x, y = batch if batch[0] is not None else _batch_for(program)
    model = _finite(model, filled(x))
    y = _cotangent(model, program.loss, filled(x), y)
    for each, own in with_rows(program, (filled(x), filled(y))):
        yield from _program_case(in_float64(each, model), own, each is program.each[0])


def _program_case(program: Program, batch: Batch, with_rules: bool) -> Iterator[Finding]:
    size = batch_size(batch)
    for n in dict.fromkeys((size, 1)):
        x, y = pytree.tree_map(lambda t, n=n: t[:n] if isinstance(t, Tensor) and t.ndim else t, batch)
        case = _case(n, x)
        if with_rules:
            for subject in subjects(trace(program, x, y, n), case, "", None):
                yield from check_rule(subject)
        yield from compare_quantities(program, x, y, n, case, means=n == size)
    yield from check_merged(program, *batch, size, _case(size, batch[0]))


def _case(size: int, x: Any) -> str:
    return f"N = {size}, x {', '.join(str(list(t.shape)) for t in tensors_of(x))}"


def compare_quantities(program: Program, x: Any, y: Any, size: int, case: str, means: bool = True) -> Iterator[Finding]:
    """Every quantity of every parameter; `means`: what is drawn also in the mean over many draws."""
    model, loss = program.model, program.loss
    try:
        several = packed(program.compiled.graph, _run(model, x), size)
    except NotDefined as reason:
        yield LeftOut("quantities", str(reason))
        return
    loss = loss if several is None else several.loss(loss)

    def forward(theta: Mapping[str, Tensor], x: Any) -> Tensor:
        args, kwargs = model_arguments(model, x)
        with twice_differentiable():
            result = functional_call(model, dict(theta), args, kwargs)
        found: Tensor = result if several is None else several.pack(result)
        return found

    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    own = pytree.tree_map(lambda c: c * size, y) if isinstance(loss, Handed) and loss.mean else y
    loss = _averaged if own is not y else loss
    problem = Problem(forward, loss, theta, x, own, size)
    values = program(x, y, seed=SEED, operands=program.some_operands(x, y))
    yield from check_quantities(program, problem, dict(values), case, means)


def _averaged(output: Tensor, y: Tensor) -> Tensor:
    """The loss whose cotangent is handed in for `HANDED_MEAN`, of ∂ℓ_n/∂output."""
    return (output * y).mean(0).sum()


def programs_for(
    model: nn.Module,
    loss: Any,
    example: Any,
    quantities: Sequence[Quantity],
    rules: Mapping[Any, Declaration] | None,
    asked: bool = False,
) -> tuple[list[Program], list[LeftOut]]:
    """One program for all that propagate alike; what is refused is left out, unless somebody `asked` for it."""
    if not asked and not any(p.requires_grad for p in model.parameters()):
        return [], [LeftOut("quantities", "the model has no trainable parameter")]
    groups: dict[type[Propagation], list[Quantity]] = {}
    for quantity in quantities:
        groups.setdefault(type(quantity.host), []).append(quantity)
    waiting = list(groups.values())
    programs: list[Program] = []
    left_out: list[LeftOut] = []
    while waiting:
        group = waiting.pop(0)
        try:
            programs.append(compile(model, loss, example, group, rules=rules, check=False))
        except UnsupportedError as error:
            if asked or (len(group) == 1 and not programs and not waiting):
                raise
            waiting = [[quantity] for quantity in group if len(group) > 1] + waiting
            left_out += [LeftOut(group[0].name, str(error).splitlines()[0])] if len(group) == 1 else []
    return programs, left_out


def in_float64(program: Program, model: nn.Module) -> Program:
    """The same program, its source unchanged, for a copy of its model in float64."""

    def double(dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype.is_floating_point else dtype

    compiled = program.compiled
    values = {name: replace(value, dtype=double(value.dtype)) for name, value in compiled.graph.values.items()}
    constants = {name: tensor.to("cpu", double(tensor.dtype)) for name, tensor in compiled.graph.constants.items()}
    calls = tuple(
        replace(call, arguments={k: double(v) if isinstance(v, torch.dtype) else v for k, v in call.arguments.items()})
        for call in compiled.graph.calls
    )
    graph = replace(compiled.graph, calls=calls, values=MappingProxyType(values), constants=MappingProxyType(constants))
    loss = copy.deepcopy(program.loss).double().cpu() if isinstance(program.loss, nn.Module) else program.loss
    return Program(model, replace(compiled, graph=graph), loss, list(program.quantities.values()), program.indefinite)


def _finite(model: nn.Module, x: Any) -> nn.Module:
    """A copy in float64 with noise on its parameters, or without where that leaves the domain of the forward."""
    noisy = unsettled(model)
    output, again = _run(noisy, x), _run(noisy, x)
    if any(not torch.equal(a, b) for a, b in zip(tensors_of(output), tensors_of(again), strict=True)):
        raise InputError(f"{type(model).__name__} gives another output each time (dropout?): call .eval() first")
    finite = all(bool(torch.isfinite(t).all()) for t in tensors_of(output))
    return noisy if finite else copy.deepcopy(model).double().cpu()


def _run(model: nn.Module, x: Any) -> Any:
    args, kwargs = model_arguments(model, x)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except BUILD_ERRORS as error:
        shapes = ", ".join(str(list(t.shape)) for t in tensors_of(x))
        raise InputError(f"{type(model).__name__} fails on x {shapes}: {error}\n  Pass x that fits it.") from error


def filled(x: Any) -> Any:
    """Shapes as random tensors, tensors in float64."""
    if isinstance(x, tuple | list) and x and all(isinstance(size, int) for size in x):
        return torch.randn(x, dtype=torch.float64)

    def converted(leaf: Any) -> Any:
        return leaf.detach().cpu().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(converted, plain(x))


def _batch_for(program: Program) -> Batch:
    """A batch of three samples for a program: normal numbers, and the first indices where it wants integers."""
    graph = program.compiled.graph
    leaves: list[Any] = [None] * (len(graph.inputs) + len(graph.absent))
    kept = [k for k in range(len(leaves)) if k not in graph.absent]
    for k, name in zip(kept, graph.inputs, strict=True):
        value = graph.values[name]
        shape = [size_of(size, 3) for size in value.shape]
        floating = value.dtype.is_floating_point
        leaves[k] = torch.randn(shape).double() if floating else torch.randint(2, shape).to(value.dtype)
    batch: Batch = pytree.tree_unflatten(leaves, graph.in_spec)
    return batch
