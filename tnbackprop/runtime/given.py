"""Given: the tensors that a program reads, checked against what it was compiled for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from ..compiler.capture.export import plain
from ..compiler.program.cost import size_at
from ..compiler.program.inputs import specs_of
from ..compiler.translate.graph import Graph, Value
from ..compiler.translate.sizes import first_broken
from ..compiler.translate.torch_modes import check_plain
from ..errors import InputError


def own(kind: str, dotted: str, own: Mapping[str, torch.Tensor], value: Value) -> torch.Tensor:
    """A tensor of the model, which is still what the program was compiled for."""
    tensor = own.get(dotted)
    if tensor is None:
        raise InputError(f"the model has no {kind} {dotted!r} any more: compile again")
    for what, now, then in (
        ("dtype", tensor.dtype, value.dtype),
        ("shape", list(tensor.shape), [size_at(size, 1) for size in value.shape]),
    ):
        if now != then:
            raise InputError(
                f"{kind} {dotted!r} has {what} {now} now, but the program was compiled for {then}: compile again"
            )
    return tensor


def check_parameters(model: torch.nn.Module, graph: Graph, others: frozenset[str] = frozenset()) -> None:
    """The model has the parameters that the program was compiled for: the same are tied, and the same trainable.

    others  trainable ones that the program is not of
    """
    names: dict[int, list[str]] = {}
    trainable: dict[str, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        trainable[name] = parameter.requires_grad
    now = {name: frozenset(tied) for tied in names.values() for name in tied}
    then = {name: frozenset(tied) for tied in graph.parameters.values() for name in tied}
    for name in (*then, *now):
        if name not in now:
            raise InputError(f"the model has no parameter {name!r} any more: compile again")
        if name not in then:
            _changed(name, "was not there")
        for other in sorted(then[name] - now[name]):
            _changed(name, f"is no longer the same as {other!r} (tied)")
        for other in sorted(now[name] - then[name]):
            _changed(name, f"is the same as {other!r} now (tied)")
    for value, (first, *_) in graph.parameters.items():
        if first not in others and trainable[first] != graph.values[value].differentiable:
            _changed(first, f"has requires_grad={trainable[first]} now")


def _changed(name: str, what: str) -> NoReturn:
    raise InputError(
        f"parameter {name!r} {what}: the model is not the one that the program was compiled for.\n  Compile again."
    )


LATER = object()
"""In the place of x: `flattened((LATER, y), graph)` are the inputs of y alone."""


def flattened(parts: tuple[Any, ...], graph: Graph) -> dict[str, Any]:
    """The tensors of a batch by the names of inputs: of (x, y), of (x,) alone, or of (LATER, y)."""
    found: dict[str, Any] = {}
    names, place = iter(graph.inputs), 0
    for k, spec in enumerate(specs_of(graph)):
        own = [next(names) for at in range(place, place + spec.num_leaves) if at not in graph.absent]
        absent = [at - place for at in graph.absent if place <= at < place + spec.num_leaves]
        place += spec.num_leaves
        if k >= len(parts) or parts[k] is LATER:
            continue
        leaves, mine = pytree.tree_flatten(plain(parts[k]))
        if mine != spec or (k == 0 and parts[0] is None and own):
            raise InputError(
                f"the batch (x, y) has the structure {structure(mine)} as its {'xy'[k]}, but the program was compiled "
                f"for {structure(spec)}"
            )
        if any(leaves[at] is not None for at in absent):
            raise InputError("the batch has a tensor where the program was compiled for None: compile again with it")
        found |= dict(zip(own, (leaf for at, leaf in enumerate(leaves) if at not in absent), strict=True))
    for name, leaf in found.items():
        if isinstance(leaf, torch.Tensor):
            check_plain(f"input {name!r}", leaf)
    return found


def structure(spec: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["tensor"] * spec.num_leaves, spec)).replace("'tensor'", "tensor")


def named_tensors(model: torch.nn.Module, loss: Callable[..., Any] | None) -> dict[str, torch.Tensor]:
    modules = {"": model} | ({"loss.": loss} if isinstance(loss, torch.nn.Module) else {})
    found: dict[str, torch.Tensor] = {}
    for prefix, module in modules.items():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            check_plain(f"{prefix + name!r} of the model", tensor)
            found.setdefault(prefix + name, tensor.detach())
    return found


def replaced(found: dict[str, torch.Tensor], graph: Graph, parameters: object) -> dict[str, torch.Tensor]:
    """The model's tensors with others in the place of some, by name. Raises `InputError` for names that it has not."""
    if not isinstance(parameters, Mapping):
        raise InputError(f"parameters is {type(parameters).__name__}: give {{name: tensor}}")
    tied = {name: first for first, *others in graph.parameters.values() for name in (first, *others)}
    known = tied | {name: name for name in graph.buffers.values()}
    other, given = dict(found), dict[str, str]()
    for name, tensor in parameters.items():
        if name not in known:
            raise InputError(f"parameters: the model has no parameter or buffer {name!r} that the program reads")
        before = found[known[name]]
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"parameters: {name!r} is {type(tensor).__name__}, not a tensor")
        check_plain(f"{name!r} of parameters", tensor)
        if (one := given.setdefault(known[name], name)) != name and parameters[one] is not tensor:
            raise InputError(f"parameters: {one!r} and {name!r} are one parameter of the model (tied): give one")
        if tensor.device != before.device:
            raise InputError(f"parameters: {name!r} is on {tensor.device}, the model's on {before.device}: move it")
        other[known[name]] = tensor.detach()
    return other


def check_batch(batch: Mapping[str, torch.Tensor], graph: Graph) -> dict[str, torch.Tensor]:
    """Every input has the dtype, rank and sizes that the program was compiled for, and one batch size."""
    size: int | None = None
    first = ""
    for name, tensor in batch.items():
        value = graph.values.get(name)
        if value is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"input {name!r} is {type(tensor).__name__}, not a tensor")
        if tensor.dtype != value.dtype:
            raise InputError(
                f"input {name!r} has dtype {tensor.dtype}, but the program was compiled for {value.dtype}: "
                "convert it, or compile again"
            )
        fits = tensor.ndim == len(value.shape)
        for axis, expected in enumerate(value.shape if fits else ()):
            if isinstance(expected, int):
                fits = fits and tensor.shape[axis] == expected
            elif size is None:
                size, first = tensor.shape[axis], name
            elif size_at(expected, size) != tensor.shape[axis]:
                raise InputError(f"input {name!r} has {tensor.shape[axis]} samples, but {first!r} has {size}")
        if not fits:
            wanted = "[" + ", ".join(str(s) for s in value.shape) + "]"
            raise InputError(
                f"input {name!r} has shape {list(tensor.shape)}, but the program was compiled for {wanted}: "
                "compile again for this shape"
            )
    if size == 0:
        raise InputError("the batch is empty: give at least one sample")
    if size is not None and size < graph.least:
        raise InputError(
            "the batch has one sample, for which the model does something else (it branches on the batch size): the "
            f"program is for {graph.least} or more.\n  Give more samples, or do not branch on x.shape[0] and compile "
            "again."
        )
    broken = None if size is None else first_broken(graph.conditions, size)
    if broken is not None:
        raise InputError(
            f"the batch has {size} samples, for which the model does something else (it branches on the batch size): "
            f"the program is for {broken}.{broken.line}\n  Compile another one with an example of {size} samples, or "
            "do not branch on x.shape[0]."
        )
    return dict(batch)


def floating_of(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The first of floating numbers."""
    return next(t for t in tensors.values() if t.is_floating_point())


def device_of(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """That of the first of floating numbers."""
    return floating_of(tensors).device
