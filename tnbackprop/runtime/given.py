"""Given: the tensors that a program reads, checked against what it was compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..compiler.capture.export import plain, told_layout
from ..compiler.program.cost import size_at
from ..compiler.program.inputs import specs_of
from ..compiler.translate.graph import Graph
from ..compiler.translate.sizes import first_broken
from ..compiler.translate.torch_modes import check_plain
from ..errors import InputError

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
        leaves, mine = pytree.tree_flatten(in_order(plain(parts[k]), spec))
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


def fits(parts: tuple[Any, ...], graph: Graph) -> bool:
    """Whether a batch (x, y) has the structure of the example."""
    pairs = zip(parts, specs_of(graph), strict=False)
    return all(pytree.tree_structure(in_order(plain(part), spec)) == spec for part, spec in pairs)


def in_order(part: Any, spec: pytree.TreeSpec) -> Any:
    """A dict with its keys in the order of the one that was compiled for: what a call names has none."""
    keys = spec.context if spec.type is dict else ()
    return {key: part[key] for key in keys} if type(part) is dict and part.keys() == set(keys) else part


def structure(spec: pytree.TreeSpec) -> str:
    return str(pytree.tree_unflatten(["tensor"] * spec.num_leaves, spec)).replace("'tensor'", "tensor")


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
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise InputError(f"input {name!r} is {told_layout(tensor)}: give dense tensors, .to_dense()")
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
