"""Assemble: results whose value is several tensors, as the object that a user expects."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from ..approximate import Factors
from ..compiler import Compiled
from ..compiler.derived import Extraction
from ..linalg import KroneckerFactors, Layout

Values = Mapping[str, Mapping[str, torch.Tensor]]


def assemble(compiled: Compiled, values: Values, quantity: str) -> Mapping[str, object]:
    """The quantity by parameter: tensors as they are, factors as `KroneckerFactors`."""
    if quantity in values:
        return values[quantity]
    graph = compiled.graph
    found: dict[str, object] = {}
    for item in compiled.derived.items:
        if isinstance(item, Extraction) and quantity in item.factors:
            dotted = graph.parameters[item.parameter][0]
            factors = item.factors[quantity]
            tensors = [values[f"{quantity}#{k}"][dotted] for k in range(len(factors.diagrams))]
            shape = tuple(int(size) for size in graph.values[item.parameter].shape)
            found[dotted] = _kronecker(factors, tensors, shape, dotted)
    names = [dotted[0] for dotted in graph.parameters.values()]
    return {name: found[name] for name in names if name in found}


def _kronecker(factors: Factors, tensors: list[torch.Tensor], shape: tuple[int, ...], name: str) -> KroneckerFactors:
    blocks = [prod(int(leg.size) for leg in factors.blocks)] if factors.blocks else []
    sized = []
    for legs, tensor in zip(factors.legs, tensors, strict=True):
        d = prod(int(leg.size) for leg in legs)
        whole = tensor.numel() == prod(blocks) * d * d
        sized.append(tensor.reshape(*blocks, d, d) if whole else tensor.expand(*blocks, d, d))
    place = {leg: k for k, leg in enumerate(factors.parameter)}
    sizes = tuple(int(leg.size) for leg in factors.parameter)
    layout = Layout(sizes, tuple(tuple(place[leg] for leg in legs) for legs in factors.legs))
    return KroneckerFactors(tuple(sized), shape, assumption=factors.assumption, layout=layout, name=name)
