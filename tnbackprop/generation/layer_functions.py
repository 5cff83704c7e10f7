"""The functions of a layer: its output, what is pulled back to its inputs, and every quantity of every parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compiler.derive.derive import rules_text
from ..compiler.derive.layer import Layer
from ..compiler.emit.naming import identifier
from ..compiler.lower.arrange import reshaped
from ..compiler.program.lines import alive
from ..compiler.single import compile_layer, part
from ..compiler.sweep.derived import Result
from ..diagram.core import Diagram, N, Size, V
from ..errors import InputError, UnsupportedError
from ..quantities import Handed, InputGrad, Quantity, Total
from ..quantities.propagation import COTANGENT
from ..table import Rules
from ..version import __version__
from .parts.function import Function, Inputs, Tree, extractions, flops, formulas, function, refuse_unchecked
from .parts.kronecker import Block, absorbed, blocks_of, factors_of
from .parts.names import Names, formula_names, layer_names
from .parts.text import sizes


@dataclass(frozen=True)
class Prepared:
    """A layer that is ready to be written down."""

    module: torch.nn.Module
    example: Any  # its input
    layer: Layer
    quantities: Sequence[Quantity]
    names: Names
    inputs: Inputs
    rules: Sequence[str]  # the text of every rule
    blocks: Mapping[tuple[str, str], Block]

    @property
    def key(self) -> str:
        """A hash of the rules' text and the library's version."""
        return hashlib.sha256("\n".join([*self.rules, __version__]).encode()).hexdigest()[:16]

    @property
    def parameters(self) -> dict[str, str]:
        """Dotted name -> argument, of the trainable ones."""
        graph = self.layer.graph
        return {dotted[0]: self.names.of[v] for v, dotted in graph.parameters.items() if graph.values[v].depends_on}

    @property
    def state(self) -> dict[str, str]:
        """Dotted name -> argument, of all parameters and buffers."""
        graph = self.layer.graph
        found = {dotted[0]: self.names.of[value] for value, dotted in graph.parameters.items()}
        return found | {dotted: self.names.of[value] for value, dotted in graph.buffers.items()}

    @property
    def arguments(self) -> list[str]:
        """The layer's inputs."""
        return [self.names.of[value] for value in self.layer.graph.inputs if value != COTANGENT]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(quantity, dotted parameter) of every function; a bias that is joined to its weight has none."""
        inside = absorbed(self.blocks)
        every = [(quantity.name, dotted) for quantity in self.quantities for dotted in self.parameters]
        return [key for key in every if key not in inside]

    @property
    def handed(self) -> list[str]:
        """What is handed in at the output next to the cotangent."""
        return [value for each in self.layer.handed for value in each.values]


def prepare(module: torch.nn.Module, x: Any, quantities: Sequence[Quantity], rules: Rules) -> Prepared:
    """The layer through the compiler. Raises `UnsupportedError` for one that has no rule or no batch in front."""
    layer = compile_layer(module, x, quantities, rules)
    graph = layer.graph
    refuse_unchecked(graph)
    if read := layer.derived.readings:
        told = f"{next(iter(read.values()))} is handed in at the call"
        raise _not_alone(", ".join(q.name for q in quantities), told)
    output = graph.values[graph.output]
    if output.axes[0] != (N,):
        raise UnsupportedError(f"a layer on its own needs the batch alone on axis 0 of its output {output}.")
    if any(columns.noises for columns in layer.derived.columns):
        asked = ", ".join(type(quantity).__name__ for quantity in quantities)
        raise UnsupportedError(
            f"{asked} for a layer on its own: what is propagated is drawn, and a file could not be checked.\n"
            "  Let its `alone` return another, tn.Exact() for columns that are handed in, or generate a model."
        )
    names = layer_names(module, layer)
    order = [v for v in graph.inputs if v != COTANGENT] + [*graph.parameters, *graph.buffers, COTANGENT]
    shapes = {value: graph.values[value].shape for value in order}
    for each in layer.handed:
        shapes |= dict(zip(each.values, (each.shape(output.shape), (V, N)), strict=False))
    floating = [value for value in order if graph.values[value].dtype.is_floating_point]
    inputs = Inputs(shapes, graph.constants, floating, names)
    blocks = blocks_of(extractions(layer.derived), graph)
    return Prepared(module, x, layer, quantities, names, inputs, tuple(rules_text(layer.derived, rules)), blocks)


def refuse_for_layers(quantities: Sequence[Quantity]) -> None:
    """Raises `UnsupportedError` for quantities that are of more than one parameter."""
    for each in quantities:
        if each.needs or isinstance(each, Total):
            raise _not_alone(each.name, "it is made of sums over all parameters of a model")
        if isinstance(each, InputGrad):
            raise _not_alone(each.name, "the file's vjp, which is there anyway, pulls a cotangent back to the inputs")
        if len(each.propagations) > 1:
            raise _not_alone(each.name, "it propagates several things, and a layer is handed one")


def _not_alone(name: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} is not available for a layer on its own: {why}.\n"
        "  Generate a model's file: tn.generate(model, quantities, example=(x, y), loss=loss), or --model."
    )


def forward(prepared: Prepared) -> Function:
    graph = prepared.layer.graph
    plan = part(prepared.layer, (), graph.output)
    value = plan.output[graph.output]
    doc = [f"The layer's output, {sizes(graph.values[graph.output].shape)}.", f"{flops(plan)}."]
    return function("forward", plan, value, prepared.inputs, doc)


def pulled_shape(prepared: Prepared, value: str, handed: Handed) -> tuple[Size, ...]:
    """Of what is pulled back to an input."""
    return handed.shape(prepared.layer.graph.values[value].shape)


def pull_backs(prepared: Prepared) -> dict[tuple[str, str], Function]:
    """(word, input) -> its function: what is propagated to every input."""
    layer = prepared.layer
    found: dict[tuple[str, str], Function] = {}
    for value, name, handed in layer.pulled_back:
        plan = part(layer, (), name)
        word, own = handed.pulled, prepared.names.of[value]
        shape = pulled_shape(prepared, value, handed)
        pulled = reshaped(plan.output[name], plan.output[name].shape, shape)
        doc = [
            f"{handed.what} {own}, {sizes(shape)}.",
            *_formulas(prepared, (), name),
            f"{flops(plan)}. {_origin(prepared)}",
        ]
        found[word, own] = function(f"{word}_{own}", plan, pulled, prepared.inputs, doc)
    return found


def extracted(prepared: Prepared) -> dict[tuple[str, str], Function]:
    """(quantity, dotted parameter) -> its function."""
    graph = prepared.layer.graph
    diagrams: dict[tuple[str, str], list[tuple[Result, Diagram]]] = {}
    for item in extractions(prepared.layer.derived):
        for result, diagram in item.diagrams.items():
            key = (result.quantity, graph.parameters[item.parameter][0])
            diagrams.setdefault(key, []).append((result, diagram))
    found: dict[tuple[str, str], Function] = {}
    for key in prepared.keys:
        quantity = next(each for each in prepared.quantities if each.name == key[0])
        own = prepared.parameters[key[1]]
        plan = part(prepared.layer, [key])
        block = prepared.blocks.get(key)
        joined = block is not None and bool(block.bias)
        values = {result: by[key[1]] for result, by in plan.results.items() if joined or not result.mean}
        plan = replace(plan, steps=alive(plan.steps, set(values.values())))
        returns: Tree = values[Result(key[0])] if block is None else factors_of(block, key[0], values)
        shape = block.shape(own) if block is not None else sizes(values[Result(key[0])].shape)
        doc = [
            f"{quantity.name} of {own}, {shape}.",
            (type(quantity).__doc__ or "").strip().splitlines()[0],
            *_formulas(prepared, [(str(result), diagram) for result, diagram in diagrams[key] if result in values]),
            *([f"Assumes: {block.factors.assumption}."] if block is not None else []),
            f"{flops(plan)}. {_origin(prepared)}",
        ]
        name = f"{identifier(quantity.name)}_{own}"
        if any(name == each.name for each in found.values()):
            raise InputError(f"two functions would be called {name!r}: give {quantity.name!r} another name=")
        found[key] = function(name, plan, returns, prepared.inputs, doc)
    return found


def _formulas(prepared: Prepared, diagrams: Sequence[tuple[str, Diagram]], cotangent: str = "") -> list[str]:
    shown = formula_names(prepared.layer, prepared.names)
    return [f"    {line}" for line in formulas(prepared.layer.derived, diagrams, shown, cotangent)]


def _origin(prepared: Prepared) -> str:
    return f"From the rules {prepared.key}."
