"""An LSTM's layer that the graph has in its parts, linear, scan, linear, as one call for each direction.

Where gradients alone are asked nothing looks at single steps: kernels run all of them, forward and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch

from ..diagram.core import N
from ..quantities import Grad, InputGrad, Quantity
from ..rules import RULES
from ..rules.recurrent import OPERANDS, OPS
from ..table import Rules
from .attention import Reader, without_unread
from .translate.graph import Call, Graph, Value

aten = torch.ops.aten
PARTS = (OPS.layer.default, OPS.scan.default, OPS.states.default, aten.linear.default, aten.add.Tensor)


def with_layers(graph: Graph, quantities: Sequence[Quantity], rules: Rules) -> Graph:
    """The graph with layers where a kernel of them will do; else as it is, as with rules of one's own."""
    if not quantities or any(type(quantity) not in (Grad, InputGrad) for quantity in quantities):
        return graph
    if any(rules.get(target) is not RULES[target] for target in PARTS):
        return graph
    reader = Reader(graph)
    found = {call.output.name: made for call in graph.calls if (made := _layer(graph, reader, call)) is not None}
    return without_unread(graph, found)


def _layer(graph: Graph, reader: Reader, call: Call) -> Call | None:
    """The call as a layer, if it is what the scan of an LSTM gives and its weights are read nowhere else."""
    if call.target is not OPS.states.default or call.cell != "lstm":
        return None
    both = reader.made.get(call.gates.name)
    if both is None or both.target is not aten.add.Tensor or both.alpha != 1:
        return None
    into, own = reader.made.get(both.input.name), reader.made.get(both.other.name)
    if into is None or own is None or {into.target, own.target} != {aten.linear.default}:
        return None
    operands = (into.input, call.hidden, call.state, into.weight, own.weight, into.bias, own.bias)
    arguments = {**dict(zip(OPERANDS, operands, strict=True)), "time": call.time, "back": call.back}
    weights = [each for each in operands[3:] if each is not None and each.differentiable]
    moved = [each for each in operands if each is not None and each.differentiable]
    if not _fits(call, operands) or len({each.name for each in moved}) < len(moved):
        return None
    if not all(each.name in graph.parameters and _reads(graph, each) == 1 for each in weights):
        return None
    return Call(OPS.layer.default, MappingProxyType(arguments), call.output, call.path, call.module_type)


def _reads(graph: Graph, value: Value) -> int:
    """How many calls have derivatives by it."""
    return sum(reader.target is not aten.detach.default for reader in graph.readers.get(value.name, ()))


def _fits(call: Call, operands: tuple[Any, ...]) -> bool:
    """Whether the kernels take them: float32 on a CPU, and samples in what the steps are of."""
    alike = all(each is None or (each.dtype, each.device) == (torch.float32, "cpu") for each in operands)
    x, *states = operands[:3]
    sampled = x.axes[1 - call.time] == (N,) and all(each.axes[0] == (N,) for each in states)
    return alike and sampled and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
