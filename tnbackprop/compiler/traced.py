"""Traced: torch code of quantities, on its own, as calls on values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..diagram.core import N, Size
from ..errors import InputError, TnError, UnsupportedError
from .program.cost import size_at
from .running.torch_quiet import Quiet
from .translate.foreign import MISTAKES
from .translate.graph import Call, Value
from .translate.sizes import Sizes
from .translate.torch_internals import OpOverload, alone, arguments_of, export_refusals, is_mutation

SAMPLES = 11, 13, 17, 19, 23, 29, 31, 37, 41, 43
"""What it is traced for: one that is no other size, so that nothing is taken for the batch which is not."""


@dataclass(frozen=True)
class Given:
    """A tensor that a function is given; a size may be N."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Traced:
    """What a function computes.

    inputs     what it is given, leaf by leaf
    calls      in order
    made       what it returns, with values for tensors
    constants  tensors that the calls read
    """

    inputs: tuple[Value, ...]
    calls: tuple[Call, ...]
    made: Any
    constants: dict[str, Tensor]


def traced(function: Callable[[Any], Any], given: Any, where: str, prefix: str) -> Traced:
    """The calls of a function of a tree of `Given`, for any number of samples; their values are called `prefix:…`.

    Raises `UnsupportedError` where the code depends on values or on one number of samples, or draws random ones,
    `InputError` where it fails.
    """
    batch = torch.export.Dim("batch")
    dims = pytree.tree_map(lambda each: {k: batch for k, size in enumerate(each.shape) if size == N} or None, given)
    fixed = {size for each in pytree.tree_leaves(given) for size in each.shape}
    samples = next(count for count in SAMPLES if count not in fixed)
    example = pytree.tree_map(lambda each: _example(each, samples), given)
    try:
        with alone(), Quiet(), torch.no_grad():
            program = torch.export.export(_Function(function), (example,), dynamic_shapes=(dims,), strict=False)
            if any(is_mutation(node.target) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except TnError:
        raise
    except export_refusals() as error:
        raise UnsupportedError(
            f"{where} depends on the values of what it is given, or is written for one number of samples.\n"
            "  Use torch.where and clamp in place of an if, and .shape[0] in place of a number."
        ) from error
    except (RuntimeError, AssertionError, *MISTAKES) as error:
        raise InputError(f"{where} fails: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    return _Reader(program, where, prefix).traced()


def _example(given: Given, samples: int) -> Tensor:
    shape = [size_at(size, samples) for size in given.shape]
    return torch.empty(shape, dtype=given.dtype, device=given.device)


class _Function(nn.Module):
    """A function as a module, which is what torch exports."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, given: Any) -> Any:
        return self.function(given)


class _Reader:
    """The nodes of an exported function as calls."""

    def __init__(self, program: torch.export.ExportedProgram, where: str, prefix: str) -> None:
        self.program, self.where, self.prefix, self.sizes = program, where, prefix, Sizes(program)
        self.env: dict[Node, Any] = {}
        self.calls: list[Call] = []

    def traced(self) -> Traced:
        inputs: list[Value] = []
        constants: dict[str, Tensor] = {}
        user = set(self.program.graph_signature.user_inputs)
        targets = {s.arg.name: str(s.target) for s in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                value = self.env[node] = self._value(node.name, node.meta["val"])
                if node.name in user:
                    inputs.append(value)
                else:
                    constants[value.name] = self.program.constants[targets[node.name]].detach()
            elif node.op == "call_function":
                self.env[node] = self._node(node)
        outputs: Any = self.program.graph.output_node().args[0]
        leaves = [self.env[node] if isinstance(node, Node) else node for node in outputs]
        made = pytree.tree_unflatten(leaves, self.program.call_spec.out_spec)
        return Traced(tuple(inputs), tuple(self.calls), made, constants)

    def _value(self, name: str, val: Tensor) -> Value:
        axes = tuple((size,) for size in self.sizes.shape(val, self.where))
        return Value(f"{self.prefix}:{name}", axes, val.dtype, device=val.device.type)

    def _node(self, node: Node) -> Any:
        val = node.meta.get("val")
        if not isinstance(val, Tensor) and not isinstance(val, list | tuple):
            return self.sizes.number(val, self.where)
        source = node.args[0] if node.args else None
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(source, Node) and isinstance(val, Tensor):
            target, arguments, outputs = self.env[source]
            which: Any = node.args[1]
            found = Call(target, arguments, self._value(node.name, val), item=which, outputs=outputs)
            self.calls.append(found)
            return found.output
        if not isinstance(node.target, OpOverload):
            raise UnsupportedError(f"{self.where} uses {node.target}, which is no plain operator of torch")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise UnsupportedError(
                f"{self.where} draws random numbers ({node.target}), which seed= and generator= do not reach.\n"
                "  Draw them outside and read the tensor, or hand it in as an operand."
            )
        arguments = {}
        for k, argument in enumerate(arguments_of(node.target)):
            value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            arguments["input" if argument.name == "self" else argument.name] = self._argument(value)
        if not isinstance(val, Tensor):
            return node.target, MappingProxyType(arguments), f"{self.prefix}:{node.name}:outputs"
        call = Call(node.target, MappingProxyType(arguments), self._value(node.name, val))
        self.calls.append(call)
        return call.output

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self.env[value]
        if isinstance(value, list | tuple):
            return tuple(map(self._argument, value))
        return self.sizes.converted(value)
