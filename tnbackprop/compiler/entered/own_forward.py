"""The forward of a module or a primitive whose rule has Jacobians alone: what it runs, next to the program."""

from __future__ import annotations

import inspect
import math
import operator
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from ...diagram.core import N
from ...errors import UnsupportedError
from ..program import expr as e
from ..program import functions as f
from ..program.expr import Expr
from ..program.store import Store
from ..running.printing import SILENT
from ..running.torch_quiet import Quiet
from ..running.torch_versions import sizes_by_builtins
from ..translate.foreign import MISTAKES
from ..translate.graph import Call, Value
from ..translate.opaque import check_output, named_tensors, operand_of, signature_of
from ..translate.sizes import TRIED, Condition
from ..translate.torch_internals import OpOverload, guards_of_sizes, traced_below_autograd, with_tensors

SAMPLES = 3
"""As many are traced; what is taken for granted of the number is asked of others."""
INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.mod: "%"}
"""What is done to sizes."""


def own_forward(store: Store, call: Call) -> Expr:
    """A call of what the module runs, by operators, for a batch of any size. Raises `UnsupportedError`."""
    values = list(dict.fromkeys(call.tensors.values()))
    batched = [value for value in values if any(N in axis for axis in value.axes)]
    if any(value.axes[0] != (N,) for value in batched):
        raise _refused(call, "the batch is not the first axis of what it reads")
    fixed = [value for value in values if value not in batched]
    order, asked = [*fixed, *batched], list[Any]()
    made = [[torch.zeros(_sizes(value), dtype=value.dtype) for value in each] for each in (fixed, batched)]
    try:
        with SILENT, Quiet(), torch.no_grad(), sizes_by_builtins(), guards_of_sizes(asked.append):
            program = traced_below_autograd(_function(call, order), *made)
    except (RuntimeError, AssertionError, *MISTAKES) as error:
        raise _refused(call, f"torch cannot trace it ({error})".splitlines()[0]) from error
    if not all(Condition(condition, "").at(size) for condition in asked for size in TRIED):
        raise _refused(call, "it does something else for other batch sizes")
    source = _Source(call, program.graph.nodes).text
    name = f"forward_{zlib.crc32(source.encode()):08x}"
    function = f.helper(name, f"def {name}{source}")
    return e.Call(function, tuple(store.find(value.name) for value in order))


def _sizes(value: Value) -> list[int]:
    return [size if isinstance(size, int) else SAMPLES for size in value.shape]


def _function(call: Call, order: list[Value]) -> Callable[..., Tensor]:
    """What is called, of the tensors in this order."""
    module = call.module
    if any(isinstance(leaf, sympy.Expr | Call) for leaf in pytree.tree_leaves(dict(call.arguments))):
        raise _refused(call, "it is called with the batch size")

    def function(*tensors: Tensor) -> Tensor:
        env = dict(zip(order, tensors, strict=True))
        given = {
            name: pytree.tree_map(lambda leaf: env[leaf] if isinstance(leaf, Value) else leaf, argument)
            for name, argument in call.arguments.items()
        }
        runs = call.target.function if module is None else module.forward
        signature = inspect.signature(runs) if module is None else signature_of(module)
        bound = inspect.BoundArguments(signature, {name: given[name] for name in signature.parameters})
        state = {} if module is None else {name: given[operand_of(name)] for name in named_tensors(module)}
        with nullcontext() if module is None else with_tensors(module, state):
            return check_output(call.where, runs(*bound.args, **bound.kwargs))

    return function


def _refused(call: Call, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{call.where} has a rule with Jacobians alone, and what its own forward computes cannot be written out: {why}."
        f'\n  Write it as torch code of {", ".join(f"{{{name}}}" for name in call.tensors)}: tn.Rule(…, forward="…").'
    )


class _Source:
    """The parameters and the body of a function, from the nodes of a traced graph."""

    def __init__(self, call: Call, nodes: Any) -> None:
        self.call, self.names = call, dict[Node, str]()
        lines, given = ["    # What a module whose rule has Jacobians alone runs itself."], list[str]()
        for node in nodes:
            if node.op == "placeholder":
                self.names[node] = f"x{len(given)}"
                given.append(self.names[node])
            elif node.op == "output":
                lines.append(f"    return {self._argument(node.args[0])}")
            else:
                called = self._called(node)
                self.names[node] = f"t{len(lines) - 1}"
                lines.append(f"    {self.names[node]} = {called}")
        self.text = "\n".join([f"({', '.join(given)}):", *lines])

    def _called(self, node: Node) -> str:
        if node.op != "call_function":
            raise _refused(self.call, "it reads a tensor that is neither a parameter nor a buffer")
        args = [self._argument(argument) for argument in node.args]
        if node.target in INFIX and len(args) == 2:
            return f" {INFIX[node.target]} ".join(args)
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if not isinstance(node.target, OpOverload):
            raise _refused(self.call, f"it calls {node.target}")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise _refused(self.call, "it draws random numbers")
        options = [f"{name}={self._argument(argument)}" for name, argument in node.kwargs.items()]
        return f"torch.ops.{node.target!s}({', '.join([*args, *options])})"

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, Node):
            return self.names[argument]
        if isinstance(argument, list | tuple):
            return f"[{', '.join(map(self._argument, argument))}]"
        if isinstance(argument, torch.device):
            return "x0.device"
        if isinstance(argument, float) and not math.isfinite(argument):
            return f'float("{argument}")'
        known = argument is None or isinstance(
            argument, bool | int | float | str | torch.dtype | torch.layout | torch.memory_format
        )
        if not known:
            raise _refused(self.call, f"it gives an operator {type(argument).__name__}")
        return repr(argument)
