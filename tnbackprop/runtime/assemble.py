"""Assemble: results whose value is several tensors, as the object that a user expects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod

import torch

from ..approximate import Factors
from ..compiler import Compiled
from ..compiler.derived import Extraction, joined_with
from ..linalg import Kind, KroneckerFactors, Layout

Values = Mapping[str, Mapping[str, torch.Tensor]]


def assemble(compiled: Compiled, values: Values, quantity: str) -> Mapping[str, object]:
    """The quantity by parameter: tensors as they are, factors as `KroneckerFactors`."""
    if quantity in values:
        return values[quantity]
    graph = compiled.graph
    items = [item for item in compiled.derived.items if isinstance(item, Extraction) and quantity in item.factors]
    names = {item.parameter: graph.parameters[item.parameter][0] for item in items}
    joined = joined_with({names[item.parameter]: item.factors[quantity] for item in items})
    found: dict[str, object] = {}
    for item in items:
        dotted, factors = names[item.parameter], item.factors[quantity]
        tensors = [values[f"{quantity}#{k}"][dotted] for k in range(len(factors.diagrams))]
        shape = tuple(int(size) for size in graph.values[item.parameter].shape)
        if dotted in joined:
            (k,) = (k for k, mean in enumerate(factors.means) if mean is not None)
            tensors[k] = _with_one(tensors[k], values[f"{quantity}#mean{k}"][dotted])
            found[dotted] = _with_bias(factors, tensors, f"{dotted}, {joined[dotted]}")
        elif dotted not in joined.values():
            found[dotted] = _kronecker(factors, tensors, shape, dotted)
    order = [dotted[0] for dotted in graph.parameters.values()]
    return {name: found[name] for name in order if name in found}


def _with_one(A: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The factor of an input that ends in a 1."""
    d = mean.numel()
    column = mean.reshape(d, 1)
    top = torch.cat([A.reshape(d, d), column], 1)
    return torch.cat([top, torch.cat([column.T, torch.ones_like(column[:1])], 1)])


def _with_bias(factors: Factors, tensors: list[torch.Tensor], name: str) -> KroneckerFactors:
    """The block of [weight, bias] as a matrix [out, in + 1]."""
    first = factors.means.index(None)
    B, A = tensors[first], tensors[1 - first]
    d = math.isqrt(B.numel())
    return KroneckerFactors((B.reshape(d, d), A), (d, len(A)), assumption=factors.assumption, name=name)


def _kronecker(factors: Factors, tensors: list[torch.Tensor], shape: tuple[int, ...], name: str) -> KroneckerFactors:
    shapes = zip(tensors, factors.shapes, strict=True)
    sized = tuple(t.reshape(size) if t.numel() == prod(size) else t.expand(size) for t, size in shapes)
    kinds = tuple(Kind.DIAGONAL if flat else Kind.FULL for flat in factors.diagonal)
    place = {leg: k for k, leg in enumerate(factors.parameter)}
    sizes = tuple(int(leg.size) for leg in factors.parameter)
    layout = Layout(sizes, tuple(tuple(place[leg] for leg in legs) for legs in factors.legs))
    return KroneckerFactors(sized, shape, kinds, factors.assumption, layout, name)
