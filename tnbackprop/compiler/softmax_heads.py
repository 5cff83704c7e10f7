"""Cross-entropy that the graph has in its parts, nll_loss(log_softmax(f)), as one call.

Its gradient and the root of its Hessian are in closed form then, where the parts keep what they hand to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ..rules import RULES
from ..table import Rules
from .attention import Reader, without_unread
from .translate.graph import Call, Graph

aten = torch.ops.aten
LOSS = aten.cross_entropy_loss.default
LOGARITHMS = (aten.log_softmax.int, aten._log_softmax.default)
PARTS = (aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)


def with_cross_entropy(graph: Graph, rules: Rules) -> Graph:
    """The graph with calls of cross-entropy; as it is with rules of one's own for them or their parts."""
    if any(rules.get(target) is not RULES[target] for target in (LOSS, *LOGARITHMS, *PARTS)):
        return graph
    reader = Reader(graph)
    return without_unread(graph, {call.output.name: made for call in graph.calls if (made := _made(reader, call))})


def _made(reader: Reader, call: Call) -> Call | None:
    """The call as cross-entropy, if it is that of a log-softmax along the classes which nobody else reads."""
    inner = reader.only(call.input, LOGARITHMS) if call.target in PARTS else None
    if inner is None or len(inner.output.axes) < 2 or inner.dim % len(inner.output.axes) != 1:
        return None
    if inner.input.dtype != inner.output.dtype:
        return None
    arguments: Mapping[str, Any] = {**call.arguments, "input": inner.input, "label_smoothing": 0.0}
    return replace(call, target=LOSS, arguments=MappingProxyType(dict(arguments)))
