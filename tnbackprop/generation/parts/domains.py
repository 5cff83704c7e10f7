"""Between which numbers the check of a generated file draws its values; the same file whatever the parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...compiler.capture.export import model_arguments
from ...compiler.translate.graph import Graph
from ...diagram.core import N

Domain = tuple[tuple[Any, ...], float, float]
SIGNED, POSITIVE, UNIT = (-1.0, 1.0), (0.5, 1.5), (0.0, 1.0)


def domains(
    module: torch.nn.Module, x: Any, graph: Graph, inputs: Mapping[str, Tensor], unit: bool = False
) -> dict[str, Domain]:
    """{value: (shape, least, largest)} for inputs, parameters and buffers; with `unit`, inputs may be probabilities."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    found = {value: _given(tensor, unit) for value, tensor in inputs.items()}
    names = {value: dotted[0] for value, dotted in graph.parameters.items()} | dict(graph.buffers)
    for value, name in names.items():
        whole = not named[name].is_floating_point()
        found[value] = _whole(named[name]) if whole else POSITIVE if _must_be_positive(module, name, x) else SIGNED
    shapes = {value: tuple("N" if size == N else size for size in graph.values[value].shape) for value in found}
    return {value: (shapes[value], *bounds) for value, bounds in found.items()}


def _given(tensor: Tensor, unit: bool) -> tuple[float, float]:
    if not tensor.is_floating_point():
        return _whole(tensor)
    if unit and bool(((tensor >= 0) & (tensor <= 1)).all()):
        return UNIT
    return POSITIVE if _positive(tensor) else SIGNED


def _whole(tensor: Tensor) -> tuple[int, int]:
    used = tensor[tensor >= 0] if bool((tensor >= 0).any()) else tensor  # a negative label among others is ignored
    return (int(used.min()), int(used.max())) if tensor.numel() else (0, 0)


def _positive(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and bool((tensor > 0).all())


def _must_be_positive(module: torch.nn.Module, name: str, x: Any) -> bool:
    """Whether it is, and the output is no number where it is not: four numbers are positive by chance, too."""
    tensor = module.get_parameter(name) if name in dict(module.named_parameters()) else module.get_buffer(name)
    if not _positive(tensor):
        return False
    with torch.no_grad():
        output = torch.func.functional_call(module, {name: -tensor}, *model_arguments(module, x))
    return not all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
