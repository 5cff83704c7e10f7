"""What the values of a graph are called in a generated file."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...compiler.derive.layer import Layer
from ...compiler.emit.naming import Scope, identifier
from ...compiler.lower.table import HELPERS
from ...compiler.sweep.derived import Backward
from ...compiler.translate.opaque import signature_of
from ...diagram.core import Diagram, hint_of
from ...diagram.renamed import renamed
from ...quantities.propagation import COTANGENT, HANDED

TAKEN = frozenset({
    "torch", "sys", "N", "V", "like", "each", "forward", "compute", "check", "state", "results", "values",
    "module", "ext", "g_inp", "g_out", "bpQuantities", "ctx", "self", "with_one",
    *(hint_of(value) for each in HANDED for value in each.values), *keyword.kwlist,
    *(helper.name for helper in HELPERS), *(name for name in dir(builtins) if name != "input"),
})  # fmt: skip


@dataclass(frozen=True)
class Names:
    """value of the graph -> argument; everything else keeps its name."""

    of: Mapping[str, str]

    def shown(self, value: str) -> str:
        """What a value is called."""
        return self.of.get(value, hint_of(value))

    def diagram(self, diagram: Diagram) -> Diagram:
        """The diagram of values that are called so."""
        return renamed(diagram, self.shown)


def layer_names(module: torch.nn.Module, layer: Layer) -> Names:
    """Arguments are called as in the module: its parameters, and the names of forward's arguments."""
    graph = layer.graph
    wanted = _of_state({value: dotted[0] for value, dotted in graph.parameters.items()} | dict(graph.buffers))
    signature = list(signature_of(module).parameters)
    inputs = [name for name in graph.inputs if name != COTANGENT]
    for k, value in enumerate(inputs):
        by_key = value.partition("_")[2]
        wanted[value] = by_key if by_key in signature else signature[k] if k < len(signature) else value
    state = {graph.parameters[v][0] for v in graph.parameters} | set(graph.buffers.values())
    lines = {e.name for _, rule in layer.derived.bound for e in rule.equations}
    handed = {hint_of(value) for each in layer.handed for value in each.values}
    taken = TAKEN | handed | {hint_of(value) for value in {*graph.values, *lines} - set(wanted)}
    scope = Scope(taken)
    found: dict[str, str] = {}
    for value, name in wanted.items():
        free = name == identifier(name) and name not in {*taken, *found.values()}
        found[value] = scope.fresh(name if free else hint_of(value))
    found |= {value: scope.fresh(f"input_{value}") for value in inputs if found[value] in state}
    return Names(found)


def _of_state(dotted: Mapping[str, str]) -> dict[str, str]:
    """Names of parameters and buffers; one that would begin with a number has its own first: weight, or weight_0."""
    last = [name.rpartition(".")[2] for name in dotted.values()]
    found = {}
    for value, name in dotted.items():
        path, _, own = name.rpartition(".")
        plain = name.replace(".", "_")
        numbered = own if last.count(own) == 1 else f"{own}_{path.replace('.', '_')}"
        found[value] = plain if plain.isidentifier() else numbered
    return found


def cotangent_names(names: Names, items: Iterable[Backward]) -> Names:
    """The same for cotangents of what has another name than in the graph: g_input."""
    mine = {
        item.name: f"{hint_of(item.name.removesuffix(item.value))}_{names.of[item.value]}"
        for item in items
        if item.value in names.of and not item.matrix_of
    }
    return Names({**mine, **names.of})


def formula_names(layer: Layer, names: Names) -> Names:
    """The same for formulas: a rule's inner lines are called as in the rule, where there is only one such line."""
    lines = [(call.output.name, e.name) for call, rule in layer.derived.bound for e in rule.equations[:-1]]
    inner = {name: name.removeprefix(f"{output}:") for output, name in lines}
    short = {name: line for name, line in inner.items() if list(inner.values()).count(line) == 1}
    return Names({**names.of, **short})
