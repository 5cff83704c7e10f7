"""Labels that torch code of a user draws, from the model's own distribution: captured once, with the loss behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..diagram.core import N
from ..errors import InputError, UnsupportedError
from .program.inputs import of_loss
from .sweep.derived import Columns, Derived
from .sweep.roots import DrawnLabels, LossRoot, calls_behind
from .traced import Given, traced
from .translate.graph import Call, Graph, Value

KEPT = """\
{where}: the loss divides by what it keeps of the labels of a batch, and drawn ones would change that.
  Take a loss that divides by N alone; or leave the sampler out where the loss's own rule draws labels."""


def with_labels(graph: Graph, derived: Derived, known: Derived | None = None) -> Derived:
    """What is derived, with samplers captured; `known`: the same for other widths, captured before."""
    made = {} if known is None else dict(_captured(known))
    return replace(derived, columns=tuple(_with_labels(graph, derived, each, made) for each in derived.columns))


def _captured(derived: Derived) -> list[tuple[Callable[..., Any], DrawnLabels]]:
    starts = (each.start for each in derived.columns)
    return [(s.labels.sampler, s.labels) for s in starts if isinstance(s, LossRoot) and s.labels is not None]


def _with_labels(
    graph: Graph, derived: Derived, columns: Columns, made: dict[Callable[..., Any], DrawnLabels]
) -> Columns:
    root = columns.start
    if not isinstance(root, LossRoot) or root.sampler is None:
        return columns
    if root.sampler not in made:
        made[root.sampler] = _drawn(graph, derived, root, root.sampler, len(made))
    return replace(columns, start=replace(root, labels=made[root.sampler]))


def _drawn(
    graph: Graph, derived: Derived, root: LossRoot, sampler: Callable[..., Any], number: int
) -> DrawnLabels:
    """The code of a sampler, and the loss's calls behind the output and y. Raises `InputError`, `UnsupportedError`."""
    where = f"sampler {getattr(sampler, '__name__', type(sampler).__name__)}"
    y = _label(graph, where)
    if derived.divisors:
        raise UnsupportedError(KEPT.format(where=where))
    loss = _behind(graph, root.output, y, where)
    exact = torch.float32 if root.output.dtype.itemsize == 2 else root.output.dtype  # 16 bits draw too few numbers
    outputs, spec = pytree.tree_flatten(graph.output)
    if not all(isinstance(name, str) for name in outputs):
        raise UnsupportedError(f"{where} is given the model's output, which is not of tensors alone: return these")
    each = [graph.values[name] for name in outputs]
    shown = pytree.tree_unflatten([Given(value.shape, value.dtype, value.device) for value in each], spec)
    given = shown, Given(y.shape, exact, y.device)
    found = traced(lambda pair: sampler(*pair), given, where, f"labels:{number}")
    made = found.made
    if not isinstance(made, Value):
        raise InputError(f"{where} returns {type(made).__name__}: return labels, one tensor as y is")
    alike = made.dtype == y.dtype or (made.dtype.is_floating_point and y.dtype.is_floating_point)
    if made.shape != y.shape or not alike:
        raise InputError(
            f"{where} draws {_shown(made)}, and y is {_shown(y)}: return labels of the shape of the uniform numbers, "
            f".to({y.dtype})"
        )
    return DrawnLabels(sampler, y, tuple(outputs), found.inputs, found.calls, made, found.constants, loss)


def _label(graph: Graph, where: str) -> Value:
    """The only tensor of y."""
    own = [graph.values[name] for name in of_loss(graph)]
    if len(own) != 1:
        shown = ", ".join(map(_shown, own)) or "no tensor"
        raise InputError(f"{where}: labels are drawn in the place of y, which must be one tensor, and it is {shown}")
    return own[0]


def _behind(graph: Graph, output: Value, y: Value, where: str) -> tuple[Call, ...]:
    """The calls that lead from the output or y to the loss."""
    found = calls_behind(graph, output, y)
    for call in found:
        if not call.output.differentiable and not any(N in axis for axis in call.output.axes):
            raise UnsupportedError(KEPT.format(where=where))
        if call.by_rule:
            raise UnsupportedError(f"{where}: {call.where} is known by its formula alone: write the loss in torch code")
    made = {call.output.name for call in found}
    if graph.loss not in made or output.name in made:
        raise UnsupportedError(f"{where}: the model reads y, too, so labels cannot be drawn from its output")
    return tuple(found)


def _shown(value: Value) -> str:
    return f"{value.dtype} [{', '.join(map(str, value.shape))}]"

