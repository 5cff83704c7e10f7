"""The compiler, in order: capture, bind, then for a batch size (`Front.planned`) derive, plan, the program, emit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..quantities import Quantity
from ..quantities.total import Needed, of_all_samples, with_needs
from ..table import Rules
from .attention import with_attention
from .capture.export import capture
from .derive.derive import bind_all
from .derive.layer import with_inputs
from .derive.trial import Trial
from .emit.compiled import Compiled
from .formulas import with_formulas
from .invariants.stage import Stage
from .invariants.table import asked, check
from .joined import with_one_output, with_output_at_loss
from .lower.candidate import Lowering
from .recurrence import with_layers
from .search import Device
from .sizes import Front
from .softmax_heads import with_cross_entropy
from .translate.graph import Graph

__all__ = ["Compiled", "compile_program"]


@with_formulas
def compile_program(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor] | None,
    example: tuple[Any, Any],
    quantities: Sequence[Quantity],
    rules: Rules,
    memory_limit: int | None = None,
    here: bool = True,
    lowerings: Sequence[Lowering] = (),
    known: Graph | None = None,
    accumulate: torch.dtype | None = None,
) -> Compiled:
    """Run the stages on an example batch; `here` where the source runs on this machine: by what this one has."""
    quantities = with_needs(of_all_samples(quantities))
    first = graph = capture(model, loss, example, rules) if known is None else known
    graph = with_cross_entropy(with_one_output(graph, quantities), rules)
    graph = with_layers(with_attention(with_inputs(graph, quantities), quantities, rules), quantities, rules)
    check(Stage.CAPTURE, graph, seen := asked(model, quantities))
    trial = Trial.of(graph, model, loss, example)
    bound = check(Stage.BIND, bind_all(graph, rules, trial), seen := replace(seen, graph=graph))
    graph = with_output_at_loss(graph, bound, quantities)
    title = f"{type(model).__name__}: {', '.join(q.name for q in quantities if not isinstance(q, Needed))}"
    device = Device.of(model, here, accumulate)
    front = Front(graph, bound, quantities, device, memory_limit, lowerings, title, seen)
    return replace(front.planned(graph.example_batch), captured=first)
