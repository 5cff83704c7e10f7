"""The captured model: calls on values, in execution order. Frozen; no torch.fx object survives here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.utils import _pytree as pytree

from ...diagram.core import Size
from .sizes import Condition, shown
from .torch_internals import OpOverload


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. `axes[k]` are the row-major factors of axis k; a batch factor is exactly N.

    [N*4, D] (n outer) has axes ((N, 4), (D,)). A value without a batch factor does not depend on the sample.
    """

    name: str
    axes: tuple[tuple[Size, ...], ...]
    dtype: torch.dtype
    depends_on: frozenset[str] = frozenset()  # names of trainable parameters upstream (itself included)
    device: str = "cpu"  # its type: what is fast differs, what is right does not

    @cached_property
    def shape(self) -> tuple[Size, ...]:
        """The stored shape, with products of the factors."""
        return tuple(_product(axis) for axis in self.axes)

    @property
    def axes_text(self) -> str:
        """[N·4, 3]: the factors of each axis, outer first."""
        return "[" + ", ".join("·".join(str(factor) for factor in axis) or "1" for axis in self.axes) + "]"

    def __str__(self) -> str:
        return self.name + self.axes_text

    @property
    def differentiable(self) -> bool:
        return bool(self.depends_on)


def op_text(target: Any) -> str:
    """An operator with its overload, the name of a class, "primitive f"."""
    return target.__name__ if isinstance(target, type) else str(target)


def _product(factors: tuple[Size, ...]) -> Size:
    result: Size = 1
    for factor in factors:
        result = result * factor
    return result


@dataclass(frozen=True)
class Call:
    """One call of an operator's overload, or of a module or a primitive that has a rule.

    `arguments` follow the operator's schema, all defaults filled in; `self` is renamed `input`. Tensors are
    `Value`s (lists of them stay tuples) or, where they are complex, the calls that make them; everything else is a
    plain Python number, string, bool, tuple, None.
    Sizes that contain the batch are sympy expressions in N. `call.stride` is short for the argument.
    """

    target: Any
    arguments: Mapping[str, Any]
    output: Value
    path: str = ""  # dotted module path, "" for the model itself
    module_type: str = ""
    module: torch.nn.Module | None = None  # for a module target
    item: int | None = None  # which output it is, of an operator with several
    outputs: str = ""  # the same for all outputs of one call

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["arguments"][name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('target')} has no argument {name!r}") from None

    @property
    def by_rule(self) -> bool:
        """A module, a primitive or an operator of our own: its forward is that of its rule, nobody else has it."""
        return not isinstance(self.target, OpOverload) or self.target.namespace == "tnbackprop"

    @cached_property
    def tensors(self) -> dict[str, Value]:
        """Tensor arguments by name; element k of a list argument `tensors` is `tensors0`, `tensors1`, …

        Of an argument that is a call itself, those of that: `input.other`.
        """
        found: dict[str, Value] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Value):
                found[name] = value
            for key, each in [(name, value)] if isinstance(value, Call) else _items(name, value):
                if isinstance(each, Call):
                    found |= {f"{key}.{own}": inside for own, inside in each.tensors.items()}
                else:
                    found[key] = each
        return found

    @property
    def nested(self) -> tuple[Call, ...]:
        """The arguments that are calls: they make complex numbers, of which the graph has no values."""
        every = (each for a in self.arguments.values() for each in (a if isinstance(a, tuple) else (a,)))
        return tuple(each for each in every if isinstance(each, Call))

    @property
    def where(self) -> str:
        """For messages: "aten.relu.default in module 'features.1' (ReLU)"."""
        kind = f" ({self.module_type})" if self.module_type else ""
        shown = op_text(self.target)
        return f"{shown} in module {self.path!r}{kind}" if self.path else f"{shown} in the model"


def _items(name: str, argument: Any) -> list[tuple[str, Value | Call]]:
    every = enumerate(argument) if isinstance(argument, tuple) else ()
    return [(f"{name}{k}", each) for k, each in every if isinstance(each, Value | Call)]


def _placed(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree, each with its place; that is a number where a class of it does not say its keys."""
    try:
        return [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:
        return [(f"[{k}]", leaf) for k, leaf in enumerate(pytree.tree_leaves(tree))]


class NotGiven(Enum):
    """A place among the outputs where a program gives None, which a class of outputs may drop with its place."""

    NOT_GIVEN = "None"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Graph:
    """A model with its loss, captured once, with a symbolic batch size.

    `parameters` maps a value name to the dotted names of the parameter (several: tied; the first is the
    key in results). `inputs` are the value names of the flattened example inputs, x first, then y.
    """

    calls: tuple[Call, ...]
    values: Mapping[str, Value]
    parameters: Mapping[str, tuple[str, ...]]  # trainable and frozen; trainable ones have depends_on
    buffers: Mapping[str, str]  # value name -> dotted name
    constants: Mapping[str, torch.Tensor]  # lifted tensor constants
    inputs: tuple[str, ...]
    output: Any  # pytree of value names, as the model returned it; NOT_GIVEN for what no program gives
    loss: str | None
    example_batch: int
    in_spec: Any = None  # torch.utils._pytree spec of (x, y)
    absent: tuple[int, ...] = ()  # which of its leaves are None: they are no inputs
    least: int = 1  # samples: for fewer the model does something else
    conditions: tuple[Condition, ...] = ()  # on N, for others it does something else, too
    unchecked: tuple[str, ...] = ()  # checks of values that the forward has and a program leaves out
    fixed: tuple[tuple[str, torch.Tensor], ...] = ()  # buffers whose values it is made of, by dotted name
    kept: tuple[str, ...] = ()  # attributes that a forward sets on modules of the model, and a program does not
    left: tuple[str, ...] = ()  # outputs that no program gives and the loss does not read, each with the reason
    joint: str = ""  # the value where curvature is taken, where that is not the output: several joined, one moved
    cotangent: str = ""  # of a layer on its own: the input that is the cotangent of its output

    @cached_property
    def readers(self) -> Mapping[str, tuple[Call, ...]]:
        """The calls that read a value, in order."""
        found: dict[str, tuple[Call, ...]] = {}
        for call in self.calls:
            found |= {value.name: (*found.get(value.name, ()), call) for value in call.tensors.values()}
        return found

    @property
    def returned(self) -> dict[str, Value]:
        """The tensors that the model returns, each once, by their place in what it returns: "['logits']"."""
        found: dict[str, Value] = {}
        for place, leaf in _placed(self.output):
            if isinstance(leaf, str) and self.values[leaf] not in found.values():
                found[place] = self.values[leaf]
        return found

    @property
    def read_by_loss(self) -> dict[str, Value]:
        """Those of which the loss is computed, without what they are computed of themselves; all without a loss."""
        if self.joint:
            return {"outputs": self.values[self.joint]}
        outputs = {value.name: place for place, value in self.returned.items()}
        made = {call.output.name: call for call in self.calls}
        found, seen, todo = dict[str, Value](), set[str](), [self.loss] if self.loss else list(outputs)
        while todo:
            name = todo.pop()
            if name in outputs and name != self.loss:
                found[outputs[name]] = self.values[name]
            elif name in made and name not in seen:
                todo += [value.name for value in made[name].tensors.values()]
            seen.add(name)
        ordered = {place: found[place] for place in outputs.values() if place in found}
        return ordered or self.returned

    def is_bottleneck(self, value: str) -> bool:
        """Whether what is computed after a value reads nothing trainable that is read or computed before it."""
        made = next((k for k, call in enumerate(self.calls) if call.output.name == value), None)
        if made is None:
            return False
        earlier, later = self.calls[: made + 1], self.calls[made + 1 :]
        before = {v.name for call in earlier for v in (*call.tensors.values(), call.output)}
        after = {v.name for call in later for v in call.tensors.values()}
        return not any(self.values[name].differentiable for name in before & after - {value})

    def __str__(self) -> str:
        """A table: one line per call with its output, shape, op, operands and module."""
        return "\n".join(self.rows())

    def rows(self) -> list[str]:
        """Its lines."""
        named = [f"{self.values[name]}" for name in (*self.inputs, *self.parameters, *self.buffers, *self.constants)]
        rows = [("value", "shape", "op", "operands", "module")]
        for call in self.calls:
            operands = ", ".join(value.name for value in call.tensors.values())
            rows.append((call.output.name, call.output.axes_text, op_text(call.target), operands, call.path))
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        sizes = ", ".join(filter(None, [f"N >= {self.least}" * (self.least > 1), shown(self.conditions)]))
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        gives = f"gives  output {self.output}, loss {self.loss}" + (f", for {sizes}" if sizes else "")
        made = [f"holds  numbers or shapes made of {', '.join(name for name, _ in self.fixed)}"] if self.fixed else []
        made += [f"keeps  not {', '.join(self.kept)}, which forward sets on modules"] if self.kept else []
        told = [*made, *(f"leaves  {each}" for each in self.left), *(f"not checked  {line}" for line in self.unchecked)]
        return ["reads  " + ", ".join(named), *lines, gives, *told]


def is_batch(size: Size) -> bool:
    """Whether a size contains the batch symbol."""
    return isinstance(size, sympy.Expr) and bool(size.free_symbols)


def values_in(arguments: Mapping[str, Any]) -> list[Value]:
    """The tensors in the arguments of a call, those in lists too."""
    every = (each for a in arguments.values() for each in (a if isinstance(a, tuple) else (a,)))
    return [each for each in every if isinstance(each, Value)]


def depends_on(arguments: Mapping[str, Any]) -> frozenset[str]:
    """The trainable parameters behind the arguments of a call."""
    return frozenset().union(*(value.depends_on for value in values_in(arguments)))


def needed(calls: list[Call], wanted: set[str]) -> list[Call]:
    """The calls that some values are computed by."""
    kept: list[Call] = []
    for call in reversed(calls):
        if call.output.name in wanted:
            kept.append(call)
            wanted |= {value.name for value in call.tensors.values()}
    return kept[::-1]
