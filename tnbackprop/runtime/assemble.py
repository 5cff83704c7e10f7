"""Assemble: results whose value is several tensors, as the object that a user expects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from ..compiler import Compiled
from ..compiler.sweep.derived import Extraction, joined_with
from ..linalg import Kind, KroneckerFactors, Layout
from ..quantities.factors import Factors

Values = Mapping[str, Mapping[str, torch.Tensor | tuple[torch.Tensor, ...]]]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one quantity in the order of the model: the factors and the shape of every parameter."""

    factors: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, ...]]
    joined: Mapping[str, str]  # weight -> the bias in its block


def blocks(compiled: Compiled, quantity: str) -> Blocks:
    """What a quantity's blocks are made of; without factors, its values are tensors. Worked out once for a program."""
    graph = compiled.graph
    items = [item for item in compiled.derived.items if isinstance(item, Extraction) and quantity in item.factors]
    found = {item.parameter: item.factors[quantity] for item in items}
    names = {parameter: dotted[0] for parameter, dotted in graph.parameters.items() if parameter in found}
    shapes = {name: tuple(int(size) for size in graph.values[p].shape) for p, name in names.items()}
    joined = joined_with({names[item.parameter]: item.factors[quantity] for item in items})
    return Blocks({name: found[p] for p, name in names.items()}, shapes, joined)


def assemble(blocks: Blocks, values: Values, quantity: str) -> Mapping[str, object]:
    """The quantity by parameter: tensors as they are, factors as `KroneckerFactors`."""
    found: dict[str, object] = {name: value for name, value in values[quantity].items() if name not in blocks.factors}
    for dotted, factors in blocks.factors.items():
        tensors = list(values[quantity][dotted])
        if dotted in blocks.joined:
            (k,) = (k for k, mean in enumerate(factors.means) if mean is not None)
            tensors[k] = _with_one(tensors[k], tensors[-1])
            found[dotted] = _with_bias(factors, tensors, f"{dotted}, {blocks.joined[dotted]}")
        elif dotted not in blocks.joined.values():
            found[dotted] = _kronecker(factors, tensors[: len(factors.diagrams)], blocks.shapes[dotted], dotted)
    return found


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
    sized = tuple(t.reshape(size) if t.numel() == prod(size) else t.expand(size).contiguous() for t, size in shapes)
    kinds = tuple(Kind.DIAGONAL if flat else Kind.FULL for flat in factors.diagonal)
    place = {leg: k for k, leg in enumerate(factors.parameter)}
    sizes = tuple(int(leg.size) for leg in factors.parameter)
    layout = Layout(sizes, tuple(tuple(place[leg] for leg in legs) for legs in factors.legs))
    return KroneckerFactors(sized, shape, kinds, factors.assumption, layout, name)
