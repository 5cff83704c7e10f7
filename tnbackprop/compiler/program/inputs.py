"""Which inputs of a graph are of x, and which of y; the shapes of its parameters."""

from __future__ import annotations

from typing import Any

from ...diagram.core import Size
from ..translate.graph import Graph


def specs_of(graph: Graph) -> list[Any]:
    """The trees of x and of y."""
    spec = graph.in_spec
    found: list[Any] = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    return found


def of_loss(graph: Graph) -> tuple[str, ...]:
    """The inputs that are of y."""
    kept = (k for k in range(graph.in_spec.num_leaves) if k not in graph.absent)
    first = specs_of(graph)[0].num_leaves
    return tuple(name for k, name in zip(kept, graph.inputs, strict=False) if k >= first)


def parameter_shapes(graph: Graph) -> dict[str, tuple[Size, ...]]:
    """Dotted name -> shape of every parameter, in the order of `named_parameters`."""
    return {dotted: graph.values[name].shape for name, (dotted, *_) in graph.parameters.items()}
