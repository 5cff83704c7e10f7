"""A model's output as one tensor with the samples along axis 0: what it is already, or several tensors side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.translate.graph import Graph
from ..diagram.core import N
from .report import NotDefined


class Squares(nn.Module):
    """A loss for a model that returns several tensors: the sum of their mean squares. It reads no target."""

    def forward(self, output: Any, target: Any) -> Tensor:
        floating = (leaf for leaf in pytree.tree_leaves(output) if leaf.is_floating_point())
        first, *others = (leaf.square().mean() for leaf in floating)
        total: Tensor = sum(others, start=first)
        return total


@dataclass(frozen=True)
class Packed:
    """Several tensors as one, [N, F]: each with its samples along one axis of its own.

    axes    of the samples, for every tensor
    shapes  of one sample of every tensor
    """

    spec: Any
    axes: tuple[int, ...]
    shapes: tuple[torch.Size, ...]

    def pack(self, output: Any) -> Tensor:
        leaves = zip(pytree.tree_leaves(output), self.axes, strict=True)
        rows = [leaf.movedim(axis, 0) for leaf, axis in leaves]
        return torch.cat([row.reshape(len(row), -1) for row in rows], 1)

    def unpack(self, flat: Tensor) -> Any:
        pieces = torch.split(flat, [shape.numel() for shape in self.shapes], 1)
        parts = zip(pieces, self.shapes, self.axes, strict=True)
        leaves = [piece.reshape(len(flat), *shape).movedim(0, axis) for piece, shape, axis in parts]
        return pytree.tree_unflatten(leaves, self.spec)

    def loss(self, loss: Callable[[Any, Any], Tensor] | None) -> Callable[[Tensor, Any], Tensor] | None:
        """The same loss, of the one tensor."""
        return None if loss is None else lambda flat, y: loss(self.unpack(flat), y)


def packed(graph: Graph, output: Any, size: int) -> Packed | None:
    """How an output of `size` samples is packed; None: it is one tensor already. Raises `NotDefined`: it cannot be."""
    if isinstance(output, Tensor) and output.ndim and output.shape[0] % size == 0:
        return None
    leaves, spec = pytree.tree_flatten(output)
    values = [graph.values[name] for name in pytree.tree_leaves(graph.output)]
    if len(values) != len(leaves) or not all(isinstance(t, Tensor) and t.is_floating_point() for t in leaves):
        raise NotDefined("the outputs are not all floating point tensors")
    axes = tuple(next((k for k, axis in enumerate(value.axes) if axis == (N,)), -1) for value in values)
    if min(axes, default=-1) < 0:
        raise NotDefined("not all outputs have the samples along one axis")
    shapes = (torch.Size(leaf.movedim(axis, 0).shape[1:]) for leaf, axis in zip(leaves, axes, strict=True))
    return Packed(spec, axes, tuple(shapes))
