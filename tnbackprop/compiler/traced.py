"""Traced: torch code of quantities, on its own, as calls on values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
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

WRITTEN = (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION)
SAMPLES = 11
"""At least so many it is traced for: a number that is no other size, so that nothing is taken for the batch."""


MOST = 2**23
"""Of samples: slices end at sys.maxsize, which torch 2.7 tells apart from them, and quantiles are of at most 2²⁴."""


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
    batch = torch.export.Dim("batch", max=MOST)
    dims = pytree.tree_map(lambda each: {k: batch for k, size in enumerate(each.shape) if size == N} or None, given)
    fixed = {size for each in pytree.tree_leaves(given) for size in each.shape}
    samples = next(many for many in count(SAMPLES) if many not in fixed)
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
        keys = isinstance(error, KeyError) and isinstance(given, Mapping)
        there = f"\n  The keys are {', '.join(map(repr, given))}." if keys else ""
        raise InputError(f"{where} fails: {type(error).__name__}: {str(error).splitlines()[0]}{there}") from error
    if any(spec.kind in WRITTEN for spec in program.graph_signature.output_specs):
        raise UnsupportedError(f"{where} writes over what it is given: work on a clone, or without in-place operations")
    found = _Reader(program, where, prefix).traced()
    _check_one_sample(program, function, given, where)
    return found


def _check_one_sample(
    program: torch.export.ExportedProgram, function: Callable[[Any], Any], given: Any, where: str
) -> None:
    """Code that does something else for one sample than for several, which torch.export takes for granted."""
    if not any(N in each.shape for each in pytree.tree_leaves(given)):
        return
    generator = torch.Generator().manual_seed(0)

    def drawn(each: Given) -> Tensor:
        shape = [size_at(size, 1) for size in each.shape]
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(each.device, each.dtype)

    example = pytree.tree_map(drawn, given)
    with alone(), Quiet(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a function that has no value for one sample: the user has several
        try:
            plain = pytree.tree_leaves(function(pytree.tree_map(torch.clone, example)))
        except (RuntimeError, *MISTAKES):  # it has no value for one sample, and the program fails there, too
            return
        found = torch.fx.Interpreter(program.graph_module).run(*_placed(program, example))
    for one, other in zip(plain, found, strict=True):
        if isinstance(one, Tensor) and not (one.shape == other.shape and _close(one, other)):
            raise UnsupportedError(
                f"{where} does something else for one sample than for several: a program has one code for both.\n"
                "  Use torch.where on .shape[0] made a tensor, or what holds for any number of samples."
            )


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=torch.finfo(one.dtype).eps ** 0.5, atol=1e-6, equal_nan=True)


def _placed(program: torch.export.ExportedProgram, example: Any) -> list[Tensor]:
    """What the exported graph is given: constants, then the leaves."""
    leaves, signature = iter(pytree.tree_leaves(example)), program.graph_signature
    user = set(signature.user_inputs)
    return [next(leaves) if s.arg.name in user else _constant(program, str(s.target)) for s in signature.input_specs]


def _constant(program: torch.export.ExportedProgram, target: str) -> Tensor:
    """A tensor that the code reads: one of a closure, or of a module."""
    found = program.constants[target] if target in program.constants else program.state_dict[target]
    assert isinstance(found, Tensor)
    return found.detach()


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
                    constants[value.name] = _constant(self.program, targets[node.name])
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
