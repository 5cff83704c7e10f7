"""Between: what quantities compute from totals before their own extraction, captured once as calls on values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..diagram.core import Size
from ..diagram.reading import Reading
from ..errors import InputError, TnError, UnsupportedError
from ..quantities import Quantity
from ..quantities.total import ALL, Needed, level_of
from .program.cost import size_at
from .running.torch_quiet import Quiet
from .sweep.derived import Derived, Extraction, Phase, Result
from .translate.foreign import MISTAKES
from .translate.graph import Call, Graph, Value
from .translate.sizes import Sizes
from .translate.torch_internals import OpOverload, alone, arguments_of, export_refusals, is_mutation

SAMPLES = 7
"""In the totals that it is captured with."""
Names = dict[str, dict[str, tuple[Result, tuple[Size, ...]]]]
"""Key of a total -> group -> what it is the sum of, and its shape."""


def with_phases(
    graph: Graph, derived: Derived, quantities: Sequence[Quantity], known: Derived | None = None
) -> Derived:
    """What is derived, with what comes between its phases; `known`: the same for other widths, captured before."""
    later = [quantity for quantity in sorted(quantities, key=level_of) if quantity.needs]
    phases = tuple(_phase(graph, derived, q, quantities) for q in later) if known is None else known.phases
    made = {name for phase in phases for name in phase.outcome}
    readings = {name: each if name in made else replace(each, of="") for name, each in derived.readings.items()}
    return replace(derived, readings=readings, phases=phases)


def _phase(graph: Graph, derived: Derived, quantity: Quantity, quantities: Sequence[Quantity]) -> Phase:
    needed = [each for each in quantities if isinstance(each, Needed) and each.of == quantity.name]
    totals = {each.key: _totals(derived, each) for each in needed}
    dtypes = {graph.values[name].dtype for name in graph.parameters if graph.values[name].dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    device = next((graph.values[name].device for name in graph.parameters), "cpu")

    def one(shape: tuple[Size, ...]) -> Tensor:
        return torch.ones([size_at(size, SAMPLES) for size in shape], dtype=dtype, device=device)

    example = {key: {group: one(shape) for group, (_, shape) in by.items()} for key, by in totals.items()}
    shown = {key: by[ALL] if list(by) == [ALL] else by for key, by in example.items()}
    program = _exported(quantity, shown)
    return _Captured(quantity, program, totals).phase(derived)


def _totals(derived: Derived, needed: Needed) -> dict[str, tuple[Result, tuple[Size, ...]]]:
    """The groups of a total, and its shape: the legs that are left are samples and columns."""
    result, found = Result(needed.name), {}
    for item in derived.items:
        if isinstance(item, Extraction) and result in item.diagrams:
            shape = tuple(leg.size for leg in item.diagrams[result].legs)
            found[item.groups[needed.name]] = result, shape
    return found


class _Between(nn.Module):
    """`between` as a module, which is what torch exports."""

    def __init__(self, quantity: Quantity) -> None:
        super().__init__()
        self.quantity = quantity

    def forward(self, totals: Any) -> Any:
        return self.quantity.between(totals)


def _exported(quantity: Quantity, totals: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The graph of its torch code, for any number of samples."""
    batch = torch.export.Dim("batch")
    dims = pytree.tree_map(lambda t: {k: batch for k, size in enumerate(t.shape) if size == SAMPLES} or None, totals)
    try:
        with alone(), Quiet(), torch.no_grad():
            program = torch.export.export(_Between(quantity), (totals,), dynamic_shapes=(dims,), strict=False)
            mutates = any(is_mutation(node.target) for node in program.graph.nodes)
            return program.run_decompositions({}) if mutates else program
    except TnError:
        raise
    except export_refusals() as error:
        raise UnsupportedError(
            f"{_where(quantity)} depends on the values of its totals, or is written for one number of samples.\n"
            "  Use torch.where and clamp in place of an if, and totals.shape[0] in place of a number."
        ) from error
    except (RuntimeError, AssertionError, *MISTAKES) as error:
        _refuse(quantity, error)


def _refuse(quantity: Quantity, error: Exception) -> NoReturn:
    raise InputError(f"{_where(quantity)} fails: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def _where(quantity: Quantity) -> str:
    return f"between() of quantity {quantity.name!r}"


class _Captured:
    """The nodes of an exported `between` as calls on values, whose names are those of the quantity's own."""

    def __init__(self, quantity: Quantity, program: torch.export.ExportedProgram, totals: Names) -> None:
        self.quantity, self.program, self.sizes = quantity, program, Sizes(program)
        self.env: dict[Node, Any] = {}
        self.calls: list[Call] = []
        self.totals: dict[str, tuple[Result, str]] = {}
        self.constants: dict[str, Tensor] = {}
        self.level = level_of(quantity)
        given = iter([(result, group) for by in totals.values() for group, (result, _) in by.items()])
        user = set(program.graph_signature.user_inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                value = self._value(node.name, node.meta["val"])
                if node.name in user:
                    self.totals[value.name] = next(given)
                else:
                    target = next(str(s.target) for s in program.graph_signature.input_specs if s.arg.name == node.name)
                    self.constants[value.name] = program.constants[target].detach()
                self.env[node] = value
            elif node.op == "call_function":
                self.env[node] = self._node(node)

    def _value(self, name: str, val: Tensor) -> Value:
        axes = tuple((size,) for size in self.sizes.shape(val, _where(self.quantity)))
        return Value(f"between:{self.quantity.name}:{name}", axes, val.dtype, device=val.device.type)

    def _node(self, node: Node) -> Any:
        val = node.meta.get("val")
        if not isinstance(val, Tensor) and not isinstance(val, list | tuple):
            return self.sizes.number(val, _where(self.quantity))
        source = node.args[0] if node.args else None
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(source, Node) and isinstance(val, Tensor):
            target, arguments, outputs = self.env[source]
            which: Any = node.args[1]
            found = Call(target, arguments, self._value(node.name, val), item=which, outputs=outputs)
            self.calls.append(found)
            return found.output
        if not isinstance(node.target, OpOverload):
            raise UnsupportedError(f"{_where(self.quantity)} uses {node.target}, which is no plain operator of torch")
        arguments = {}
        for k, argument in enumerate(arguments_of(node.target)):
            value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            arguments["input" if argument.name == "self" else argument.name] = self._argument(value)
        if not isinstance(val, Tensor):
            return node.target, MappingProxyType(arguments), f"between:{self.quantity.name}:{node.name}:outputs"
        call = Call(node.target, MappingProxyType(arguments), self._value(node.name, val))
        self.calls.append(call)
        return call.output

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self.env[value]
        if isinstance(value, list | tuple):
            return tuple(map(self._argument, value))
        return self.sizes.converted(value)

    def phase(self, derived: Derived) -> Phase:
        """What it makes of totals, for what the quantity reads."""
        outputs: Any = self.program.graph.output_node().args[0]
        leaves = [self.env[node] if isinstance(node, Node) else node for node in outputs]
        made = pytree.tree_unflatten(leaves, self.program.call_spec.out_spec)
        if not isinstance(made, Mapping):
            raise InputError(f"{_where(self.quantity)} returns {type(made).__name__}: give {{key: tensor}}")
        mine = {name: each for name, each in derived.readings.items() if each.of == self.quantity.name}
        outcome = {name: self._read(each, made) for name, each in mine.items() if each.key in made}
        unread = [key for key in made if key not in {each.key for each in mine.values()}]
        if unread:
            raise InputError(
                f"{_where(self.quantity)} makes {unread[0]!r}, which extract does not read: g.operand({unread[0]!r}), "
                f"or J.operand({unread[0]!r}) where it is {{parameter: tensor}}"
            )
        return Phase(self.quantity.name, self.totals, tuple(self.calls), outcome, self.constants, self.level)

    def _read(self, reading: Reading, made: Mapping[str, Any]) -> str:
        found, where = made[reading.key], f"{_where(self.quantity)} makes"
        if isinstance(found, Mapping) != bool(reading.parameter):
            has, reads = ("one tensor", "J.operand") if reading.parameter else ("one of each parameter", "g.operand")
            raise InputError(f"{where} {has} of {reading.key!r}, and extract reads it as {reads}")
        if isinstance(found, Mapping) and reading.parameter not in found:
            raise InputError(f"{where} nothing for parameter {reading.parameter!r} of {reading.key!r}")
        value = found[reading.parameter] if isinstance(found, Mapping) else found
        if not isinstance(value, Value):
            raise InputError(f"{where} {type(value).__name__} of {reading.key!r}, not a tensor")
        sizes = [size for size in reading.sizes if size != 1]
        if [size for size in value.shape if size != 1] != sizes and _count(value.shape) != _count(tuple(sizes)):
            told = ", ".join(map(str, value.shape))
            raise InputError(f"{where} {reading.key!r} as [{told}], and extract reads it as {sizes}")
        return value.name


def _count(shape: tuple[Size, ...]) -> Any:
    found: Any = 1
    for size in shape:
        found = found * size
    return found
