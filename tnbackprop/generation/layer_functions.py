"""The functions of a layer: its output, what is pulled back to its inputs, and every quantity of every parameter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..approximate import Factors
from ..compiler import compile_layer, part
from ..compiler.arrange import text
from ..compiler.derive import rules_text
from ..compiler.explain_text import legs_text
from ..compiler.layer import COLUMNS, COTANGENT, Layer
from ..diagram import Diagram, N, V
from ..errors import InputError, UnsupportedError
from ..quantities import Propagation, Quantity, Source
from ..rule import Rules
from ..version import __version__
from .function import Function, Inputs, extractions, factors_code, flops, formulas, function, refuse_random
from .names import Names, formula_names, layer_names
from .text import sizes


@dataclass(frozen=True)
class Prepared:
    """A layer that is ready to be written down."""

    module: torch.nn.Module
    layer: Layer
    quantities: Sequence[Quantity]
    names: Names
    inputs: Inputs
    rules: Sequence[str]  # the text of every rule
    factors: Mapping[tuple[str, str], Factors]

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
    def columns(self) -> bool:
        return any(p.source in (Source.ROOT, Source.SAMPLE) for p in self.propagations)

    @property
    def propagations(self) -> list[Propagation]:
        return [quantity.propagates for quantity in self.quantities]


def prepare(module: torch.nn.Module, x: object, quantities: Sequence[Quantity], rules: Rules) -> Prepared:
    """The layer through the compiler. Raises `UnsupportedError` for one that has no rule or no batch in front."""
    layer = compile_layer(module, x, quantities, rules)
    graph = layer.graph
    refuse_random(graph)
    output = graph.values[graph.output]
    if output.axes[0] != (N,):
        raise UnsupportedError(f"a layer on its own needs the batch alone on axis 0 of its output {output}.")
    names = layer_names(module, layer)
    order = [v for v in graph.inputs if v != COTANGENT] + [*graph.parameters, *graph.buffers, COTANGENT]
    shapes = {value: graph.values[value].shape for value in order}
    shapes[COLUMNS] = (V, *output.shape)
    floating = [value for value in order if graph.values[value].dtype.is_floating_point]
    inputs = Inputs(shapes, graph.constants, floating, names)
    factors = {
        (quantity, graph.parameters[item.parameter][0]): found
        for item in extractions(layer.derived)
        for quantity, found in item.factors.items()
    }
    return Prepared(module, layer, quantities, names, inputs, tuple(rules_text(layer.derived, rules)), factors)


def forward(prepared: Prepared) -> Function:
    graph = prepared.layer.graph
    plan = part(prepared.layer, (), graph.output)
    code = plan.output[graph.output]
    doc = [f"The layer's output, {sizes(graph.values[graph.output].shape)}.", f"{flops(plan)}."]
    return function("forward", plan, [code], code, prepared.inputs, doc)


def pull_backs(prepared: Prepared, columns: bool = True) -> Iterator[Function]:
    """What is propagated to every input, of the cotangent and of columns."""
    layer = prepared.layer
    for value, name, stacked in layer.pulled_back:
        if stacked and not columns:
            continue
        plan = part(layer, (), name)
        own, lead = prepared.names.of[value], "columns_" if stacked else ""
        shape = (*((V,) if stacked else ()), *layer.graph.values[value].shape)
        code = plan.output[name]
        returns = code if plan.shapes[code] == shape else f"{code}.reshape({text(shape)})"
        what = "columns" if stacked else "cotangent"
        doc = [
            f"Vector-Jacobian product: the {what} pulled back to {own}, {sizes(shape)}.",
            *_formulas(prepared, {}, name),
            f"{flops(plan)}. {_origin(prepared)}",
        ]
        yield function(f"vjp_{lead}{own}", plan, [code], returns, prepared.inputs, doc)


def extracted(prepared: Prepared) -> dict[tuple[str, str], Function]:
    """(quantity, dotted parameter) -> its function."""
    graph = prepared.layer.graph
    diagrams: dict[tuple[str, str], dict[str, Diagram]] = {}
    for item in extractions(prepared.layer.derived):
        for name, diagram in item.diagrams.items():
            key = (name.partition("#")[0], graph.parameters[item.parameter][0])
            diagrams.setdefault(key, {})[name] = diagram
    found: dict[tuple[str, str], Function] = {}
    for quantity in prepared.quantities:
        for dotted, own in prepared.parameters.items():
            key = (quantity.name, dotted)
            plan = part(prepared.layer, [key])
            codes = [by[dotted] for by in plan.results.values()]
            factors = prepared.factors.get(key)
            returns = codes[0] if factors is None else factors_code(factors, codes, plan.shapes)
            shape = sizes(plan.shapes[codes[0]]) if factors is None else _product(factors)
            doc = [
                f"{quantity.name} of {own}, {shape}.",
                (type(quantity).__doc__ or "").strip().splitlines()[0],
                *_formulas(prepared, diagrams[key]),
                *([f"Assumes: {factors.assumption}."] if factors is not None else []),
                f"{flops(plan)}. {_origin(prepared)}",
            ]
            name = f"{_identifier(quantity.name)}_{own}"
            if any(name == each.name for each in found.values()):
                raise InputError(f"two functions would be called {name!r}: give {quantity.name!r} another name=")
            found[key] = function(name, plan, codes, returns, prepared.inputs, doc)
    return found


def _product(factors: Factors) -> str:
    names = [f"F_{k}" for k in range(len(factors.diagrams))]
    acts = [f"{name} acts on ({legs_text(legs)})" for name, legs in zip(names, factors.legs, strict=True)]
    blocks = f", one for each ({legs_text(factors.blocks)})" if factors.blocks else ""
    return f"({', '.join(names)}): the block is {' ⊗ '.join(names)}{blocks}; {', '.join(acts)}"


def _identifier(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name)


def _formulas(prepared: Prepared, diagrams: Mapping[str, Diagram], cotangent: str = "") -> list[str]:
    shown = formula_names(prepared.layer, prepared.names)
    lines = (shown.code(line) for line in formulas(prepared.layer.derived, diagrams, cotangent))
    return [f"    {_LONG.sub(lambda match: format(int(match[1]) / int(match[2]), '.6g'), line)}" for line in lines]


_LONG = re.compile(r"(\d{9,})/(\d{9,})")
"""A float as the exact fraction that it is."""


def _origin(prepared: Prepared) -> str:
    return f"From the rules {prepared.key}."
