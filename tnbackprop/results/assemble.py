"""Assemble: results whose value is several tensors, as the object that a user expects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from ..compiler import Compiled
from ..compiler.explain.factors import not_joined
from ..compiler.merge.join import Join, Merging, Way, refused
from ..compiler.merge.merging import merging
from ..compiler.sweep.derived import Extraction, joined_with
from ..compiler.sweep.derived import Result as Name
from ..diagram.core import is_head
from ..linalg import Joined, Kind, KroneckerFactors, Layout, Role
from ..quantities.factors import Factors
from .result import Axes

Values = Mapping[str, Mapping[str, torch.Tensor | tuple[torch.Tensor, ...]]]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one quantity in the order of the model: the factors and the shape of every parameter."""

    factors: Mapping[str, Factors]
    shapes: Mapping[str, tuple[int, ...]]
    joined: Mapping[str, str]  # weight -> the bias in its block
    axes: Axes | None  # of its values, where they are tensors and all alike


def blocks(compiled: Compiled, quantity: str) -> Blocks:
    """What a quantity's blocks are made of; without factors, its values are tensors. Worked out once for a program."""
    graph = compiled.graph
    items = [item for item in compiled.derived.items if isinstance(item, Extraction) and quantity in item.factors]
    found = {item.parameter: item.factors[quantity] for item in items}
    names = {parameter: dotted[0] for parameter, dotted in graph.parameters.items() if parameter in found}
    shapes = {name: tuple(int(size) for size in graph.values[p].shape) for p, name in names.items()}
    joined = joined_with({names[item.parameter]: item.factors[quantity] for item in items})
    return Blocks({name: found[p] for p, name in names.items()}, shapes, joined, _axes(compiled, quantity))


def merged_by(compiled: Compiled, every: Mapping[str, Blocks]) -> Merging:
    """How values join as they are assembled: a weight with its bias is one, in the order of its factors."""
    found = merging(compiled)
    return replace(found, joins={name: _of_blocks(each, found.joins.get(name, {})) for name, each in every.items()})


def _of_blocks(blocks: Blocks, joins: Mapping[str, tuple[Join, ...]]) -> dict[str, tuple[Join, ...]]:
    found = {name: own[: len(blocks.factors[name].diagrams)] if name in blocks.factors else own
             for name, own in joins.items() if name not in blocks.joined.values()}
    for name in blocks.joined:
        first = blocks.factors[name].means.index(None)
        own = joins[name]
        A, mean = own[1 - first], own[-1]
        if A != mean or (A.way, A.power, A.loss) != (Way.SUM, -1.0, 0.0):  # its last element is 1
            A = refused(A.why or mean.why or "its factor of the input is no mean over the samples")
        found[name] = (own[first], A)
    return found


def _axes(compiled: Compiled, quantity: str) -> Axes | None:
    """The samples and columns of its values, and whether the parameter's own axes come after them."""
    found = set()
    for item in compiled.derived.items:
        if isinstance(item, Extraction) and quantity in item.quantities:
            diagram = item.diagrams.get(Name(quantity))
            if diagram is None or quantity in item.streams:
                return None
            own = [leg for leg in diagram.legs if not is_head(leg)]
            own = [] if item.own.issuperset(own) else own
            elements = prod(map(int, compiled.graph.values[item.parameter].shape))
            if own and prod(leg.size for leg in own) != elements:
                return None
            found.add(Axes(len(diagram.legs) - len(own), bool(own)))
    return found.pop() if len(found) == 1 else None


def assemble(blocks: Blocks, values: Values, quantity: str) -> Mapping[str, object]:
    """The quantity by parameter: tensors as they are, factors as `KroneckerFactors`."""
    found: dict[str, object] = {name: value for name, value in values[quantity].items() if name not in blocks.factors}
    for dotted, factors in blocks.factors.items():
        tensors = list(values[quantity][dotted])
        if dotted in blocks.joined:
            (k,) = (k for k, mean in enumerate(factors.means) if mean is not None)
            tensors[k] = _with_one(tensors[k], tensors[-1])
            found[dotted] = _with_bias(blocks, tensors, dotted, blocks.joined[dotted])
        elif dotted not in blocks.joined.values():
            found[dotted] = _kronecker(blocks, tensors[: len(factors.diagrams)], dotted)
    return found


def _with_one(A: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The factor of an input that ends in a 1."""
    d = mean.numel()
    column = mean.reshape(d, 1)
    top = torch.cat([A.reshape(d, d), column], 1)
    return torch.cat([top, torch.cat([column.T, torch.ones_like(column[:1])], 1)])


def _with_bias(blocks: Blocks, tensors: list[torch.Tensor], weight: str, bias: str) -> KroneckerFactors:
    """The block of [weight, bias] as a matrix [out, in + 1]."""
    factors = blocks.factors[weight]
    first = factors.means.index(None)
    B, A = tensors[first], tensors[1 - first]
    d = math.isqrt(B.numel())
    own = _layout(factors)
    layout = Layout(own.legs, (own.factors[first], own.factors[1 - first]))
    return KroneckerFactors(
        (B.reshape(d, d), A),
        (d, len(A)),
        assumption=factors.assumption,
        name=f"{weight}, {bias}",
        roles=(Role.LOSS, Role.INPUT),
        joined=Joined(weight, bias, blocks.shapes[weight], blocks.shapes[bias], layout),
    )


def _kronecker(blocks: Blocks, tensors: list[torch.Tensor], name: str) -> KroneckerFactors:
    factors = blocks.factors[name]
    shapes = zip(tensors, factors.shapes, strict=True)
    sized = tuple(t.reshape(size) if t.numel() == prod(size) else t.expand(size).contiguous() for t, size in shapes)
    rows = zip(factors.diagonal, factors.rows, strict=True)
    kinds = tuple(Kind.DIAGONAL if flat else Kind.BLOCKS if size else Kind.FULL for flat, size in rows)
    alone = f"; a block of its own: {not_joined(factors)}" if factors.means else ""
    assumption = f"{factors.assumption}{alone}"
    return KroneckerFactors(sized, blocks.shapes[name], kinds, assumption, _layout(factors), name, _roles(factors))


def _layout(factors: Factors) -> Layout:
    place = {leg: k for k, leg in enumerate(factors.parameter)}
    sizes = tuple(int(leg.size) for leg in factors.parameter)
    return Layout(sizes, tuple(tuple(place[leg] for leg in legs) for legs in factors.legs))


def _roles(factors: Factors) -> tuple[Role, ...]:
    """Of each factor; none where a quantity does not say which has the loss."""
    rows = zip(factors.loss, factors.relative, strict=False)
    return tuple(Role.RELATIVE if cut else Role.LOSS if loss else Role.INPUT for loss, cut in rows)
