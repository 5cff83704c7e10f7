"""What the results of a graph are computed of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from ...errors import InputError, UnsupportedError
from ..batched.axes import show
from ..translate.graph import Value

WRITTEN = frozenset({"BUFFER_MUTATION", "PARAMETER_MUTATION"})
"""Kinds of outputs that are no outputs, by name: not every torch has all of them."""


def refuse_written(exported: torch.export.ExportedProgram) -> None:
    """Raises `UnsupportedError` where the model writes to a parameter or a buffer of its own."""
    for spec in exported.graph_signature.output_specs:
        if spec.kind.name in WRITTEN:
            raise UnsupportedError(
                f"the model writes to {str(spec.target).removeprefix('model.')!r} during forward: a program changes no "
                "parameter and no buffer. Call model.eval(), or remove the update"
            )


def check_loss(values: Mapping[str, Value], loss: Any) -> None:
    """The loss is one of the values, and a scalar. Raises `InputError`."""
    value = values.get(loss) if isinstance(loss, str) else None
    if value is None:
        raise InputError(f"the loss returns a {type(loss).__name__}: it must return one scalar tensor")
    if value.axes or not value.dtype.is_floating_point:
        raise InputError(
            f"the loss returns {value.dtype} {show(value.shape)}: it must be a floating point scalar. "
            "Take the mean or the sum over the batch"
        )


def above(node: Any) -> set[Node]:
    """A node and all that it is computed of."""
    todo, found = [node] if isinstance(node, Node) else [], set[Node]()
    while todo:
        if (last := todo.pop()) not in found:
            found.add(last)
            todo += last.all_input_nodes
    return found


def batch_in_train(node: Node) -> bool:
    """Whether a batch norm takes its statistics from samples, not from a weight, or from each of them as channels."""
    source = node.args[0]
    assert isinstance(source, Node)
    first, channels, *positions = source.meta["val"].shape
    alone = not isinstance(first, torch.SymInt) and first == 1
    sizes = (first, *positions) if alone else (first, channels, *positions)
    return bool(node.args[5]) and any(isinstance(size, torch.SymInt) for size in sizes)
