"""Attention that the graph has in its parts, softmax(c · q kᵀ + mask) v, as one call.

Where one column goes back nothing looks inside: the kernel of the whole does, and its rule. Written out by hand or by
`scaled_dot_product_attention`, it is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..diagram.core import N
from ..quantities import Quantity
from ..rules import RULES
from ..table import Rules
from .translate.graph import Call, Graph, Value

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
SAFE = aten._safe_softmax.default
SOFTMAX = (aten.softmax.int, aten._softmax.default, SAFE)
MASKED = (aten.masked_fill.Scalar, aten.add.Tensor)
PARTS = (*SOFTMAX, *MASKED, aten.matmul.default, aten.mul.Tensor, aten.div.Tensor, aten.transpose.int)
DTYPES = (torch.float32, torch.float64)


def with_attention(graph: Graph, quantities: Sequence[Quantity], rules: Rules) -> Graph:
    """The graph with calls of attention where a kernel of it will do; else as it is, as with rules of one's own."""
    if not all(each.single for quantity in quantities for each in quantity.propagations):
        return graph
    if any(rules.get(target) is not RULES[target] for target in (ATTENTION, *PARTS)):
        return graph
    reader = Reader(graph)
    found = {call.output.name: made for call in graph.calls if (made := reader.attention(call)) is not None}
    return without_unread(graph, found)


def without_unread(graph: Graph, found: Mapping[str, Call]) -> Graph:
    """With other calls for the values of these names, and without what nothing reads then."""
    if not found:
        return graph
    read = Reader(graph).read
    calls = [found.get(call.output.name, call) for call in graph.calls]
    parts = _unread(calls, read) - _unread(graph.calls, read)
    values = {name: value for name, value in graph.values.items() if name not in parts}
    kept = tuple(call for call in calls if call.output.name not in parts)
    return replace(graph, calls=kept, values=MappingProxyType(values))


class Reader:
    """Who makes and who reads every value."""

    def __init__(self, graph: Graph) -> None:
        self.made = {call.output.name: call for call in graph.calls}
        self.users: dict[str, int] = {}
        for call in graph.calls:
            for value in call.tensors.values():
                self.users[value.name] = self.users.get(value.name, 0) + 1
        leaves = (leaf for leaf in pytree.tree_leaves(graph.output) if isinstance(leaf, str))
        self.read = frozenset({*leaves, *filter(None, [graph.loss])})

    def attention(self, call: Call) -> Call | None:
        """The call as attention, if its output is softmax(…) value."""
        weights, value = self._matmul(call)
        softmax = self.only(weights, SOFTMAX)
        if softmax is None or len(softmax.output.shape) != 4 or softmax.dim % 4 != 3:
            return None
        scores, masks = self._mask(softmax)
        product, scale = self._scale(scores)
        query, transposed = self._matmul(self.only(product, (aten.matmul.default,)))
        key = self._transposed(transposed)
        if query is None or key is None or value is None or not _fits(query, key, value, call.output):
            return None
        arguments = {
            "query": query, "key": key, "value": value, "attn_mask": None, "dropout_p": 0.0, "is_causal": False,
            "scale": scale, "enable_gqa": False, **masks,
        }  # fmt: skip
        return Call(ATTENTION, MappingProxyType(arguments), call.output, call.path, call.module_type)

    def only(self, value: Value | None, targets: tuple[Any, ...]) -> Call | None:
        """The call that makes a value which nobody else reads."""
        call = self.made.get(value.name) if value is not None else None
        own = value is not None and self.users.get(value.name) == 1 and value.name not in self.read
        return call if own and call is not None and call.target in targets else None

    def _matmul(self, call: Call | None) -> tuple[Value | None, Value | None]:
        if call is None or call.target is not aten.matmul.default:
            return None, None
        return call.input, call.other

    def _mask(self, softmax: Call) -> tuple[Value, dict[str, Any]]:
        """What is masked, and the arguments that say by what; the kernel has no derivative by them.

        `hidden` is none of the operator's own: what is filled by hand. A row of which nothing is left `softmax` makes
        nan, where the operator has zeros. What is added by hand stays: where a whole row is -1e9, the kernel's is off.
        """
        call, safe = self.only(softmax.input, MASKED), softmax.target is SAFE
        if call is None:
            return softmax.input, {}
        scores, name, mask = call.input, "attn_mask", None
        if call.target is aten.masked_fill.Scalar and call.value == float("-inf"):
            hidden = self.made.get(call.mask.name)
            kept = hidden.input if hidden is not None and hidden.target in NOT else None
            if self._triangle(kept, aten.tril.default, 0, 1, scores):
                return scores, {"is_causal": True}
            name, mask = ("attn_mask", kept) if safe else ("hidden", call.mask)
        elif call.target is aten.add.Tensor and isinstance(call.other, Value) and call.alpha == 1:
            scores, mask = sorted((call.input, call.other), key=lambda value: not value.differentiable)
            if self._triangle(mask, aten.triu.default, 1, float("-inf"), scores):
                return scores, {"is_causal": True}
            mask = mask if safe and len(mask.axes) != 3 else None
        return (scores, {name: mask}) if _spread(mask, scores) else (softmax.input, {})

    def _triangle(self, mask: Value | None, target: Any, diagonal: int, number: float, scores: Value) -> bool:
        """Whether it has this number in a triangle, and leaves each position those that are not after it."""
        cut = self.made.get(mask.name) if mask is not None else None
        full = self.made.get(cut.input.name) if cut is not None and cut.target is target else None
        if cut is None or full is None or cut.diagonal != diagonal or full.target not in FULL:
            return False
        same = full.arguments.get("fill_value", 1) == number
        return same and cut.output.shape == scores.shape[2:] and scores.shape[2] == scores.shape[3]

    def _scale(self, scores: Value) -> tuple[Value, float]:
        for targets, number in SCALED:
            call = self.only(scores, targets)
            if call is not None and isinstance(call.other, int | float) and call.other:
                return call.input, number(float(call.other))
        return scores, 1.0

    def _transposed(self, value: Value | None) -> Value | None:
        """What the last two axes are exchanged of."""
        call = self.made.get(value.name) if value is not None else None
        if call is None or len(call.output.shape) != 4 or call.target not in (aten.mT.default, aten.transpose.int):
            return None
        own: Value = call.input
        return own if call.target is aten.mT.default or {call.dim0 % 4, call.dim1 % 4} == {2, 3} else None


FULL = (aten.full.default, aten.ones.default)
NOT = (aten.bitwise_not.default, aten.logical_not.default)
SCALED: tuple[tuple[tuple[Any, ...], Callable[[float], float]], ...] = (
    ((aten.mul.Tensor, aten.mul.Scalar), lambda number: number),
    ((aten.div.Tensor, aten.div.Scalar), lambda number: 1 / number),
)


def _spread(mask: Value | None, scores: Value) -> bool:
    """Whether the kernel takes the mask: no derivative is asked by it, and it broadcasts against the scores."""
    if mask is None or mask.differentiable or mask.dtype not in (torch.bool, scores.dtype) or not mask.axes:
        return False
    sizes = zip(mask.axes[::-1], scores.axes[::-1], strict=False)
    return len(mask.axes) <= 4 and all(own in (full, (1,)) for own, full in sizes)


def _fits(query: Value, key: Value, value: Value, output: Value) -> bool:
    """Whether the kernel takes them: samples in front, equal numbers of heads and sizes of a head."""
    every = (query, key, value)
    alike = all(v.dtype == output.dtype and v.dtype in DTYPES and v.device == "cpu" for v in every)
    sampled = all(len(v.axes) == 4 and v.axes[0] == (N,) and v.differentiable for v in every)
    alike = alike and len({v.name for v in every}) == 3  # a value that is two operands has no VJP of one kernel
    return alike and sampled and len({(v.shape[1], v.shape[3]) for v in every}) == 1 and key.shape == value.shape


def _unread(calls: Iterable[Call], wanted: frozenset[str]) -> set[str]:
    """The outputs that nothing reads, which is wanted itself or read in turn."""
    every, needed = list(calls), set(wanted)
    for call in reversed(every):
        if call.output.name in needed:
            needed |= {value.name for value in call.tensors.values()}
    return {call.output.name for call in every} - needed
