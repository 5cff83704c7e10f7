"""The calls of a program on one batch: what each really computes, and what its rule says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..compiler.translate.graph import Call, Value
from ..compiler.translate.opaque import signature_of
from ..compiler.translate.torch_internals import arguments_of
from ..compiler.translate.torch_modes import twice_differentiable
from ..diagram.core import Diagram, Leg, N
from ..diagram.derivatives import differentiate
from ..diagram.jacobian import Jacobian
from ..diagram.reference import evaluate, size_of
from ..notation.bind import BoundRule, Equation
from ..notation.code import Code
from ..notation.code import evaluated as result_of
from ..runtime import Program

Env = Mapping[str, Tensor]
BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a constructor or a forward may raise for sizes that it does not take."""
CODE_ERRORS = (*BUILD_ERRORS, NameError, SyntaxError)
"""What the code of a rule may raise."""


@dataclass(frozen=True)
class Trace:
    """A program's calls with the values before each, on one batch of `size` samples."""

    program: Program
    env: Env
    size: int

    @property
    def bound(self) -> tuple[tuple[Call, BoundRule], ...]:
        return self.program.compiled.derived.bound


def trace(program: Program, x: Any, y: Any, size: int) -> Trace:
    """Run every call with its own operator."""
    env = program.tensors(x, y)
    for call in program.compiled.graph.calls:
        env[call.output.name] = operate(call, env, size).detach()
    return Trace(program, env, size)


def operate(call: Call, env: Env, size: int) -> Tensor:
    """What the module or the operator of the call gives; nothing of its rule."""
    arguments = {name: _concrete(value, env, size) for name, value in call.arguments.items()}
    if not call.by_rule and call.module is None:
        named = {argument.name for argument in arguments_of(call.target)}
        if "self" in named:
            arguments["self"] = arguments.pop("input")
    with twice_differentiable():
        result = call.target(**arguments) if call.module is None else _run_module(call.module, arguments)
    found: Tensor = result[call.item or 0] if isinstance(result, tuple | list) else result
    return found


def _run_module(module: nn.Module, arguments: dict[str, Any]) -> Any:
    """The module with these values for its parameters and buffers, which the call names with '_' for '.'."""
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    state = {dotted: arguments.pop(dotted.replace(".", "_")) for dotted, _ in own}
    taken = signature_of(module).parameters  # an absent parameter is an argument of the call, too
    return functional_call(module, state, (), {name: v for name, v in arguments.items() if name in taken})


def _concrete(value: Any, env: Env, size: int) -> Any:
    match value:
        case Value():
            return env[value.name]
        case Call():
            return operate(value, env, size)
        case sympy.Basic():
            return int(value.subs(N, size))
        case tuple():
            return [_concrete(v, env, size) for v in value]
        case _:
            return value


# -- what the rule says


def run_code(code: Code, env: Env, size: int | None = None) -> Tensor:
    """Torch code of a rule, with values in its holes; N is the batch size."""
    result: Tensor = result_of(code, env, {"torch": torch, "N": size})
    return result


def dense(diagram: Diagram, env: Env, size: int) -> Tensor:
    """The value of a diagram by the reference interpreter, one axis per leg."""
    values = {name: value.detach().numpy() for name, value in env.items() if isinstance(value, Tensor)}
    return torch.as_tensor(evaluate(diagram, values, size))


def with_lines(
    rule: BoundRule, env: Env, output: Tensor, size: int, factors: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Tensor]:
    """The values with those that the rule saves, the lines of its formula (times `factors`), and its output."""
    found = dict(env)
    for saved in rule.saved:
        found[saved.name] = run_code(saved.code, found)
    for equation in rule.equations[:-1]:
        if equation.diagram is not None:
            found[equation.name] = dense(equation.diagram, found, size) * factors.get(equation.name, 1.0)
    found[rule.equations[-1].name] = output
    return found


def formula_value(
    rule: BoundRule, env: Env, output: Tensor, size: int, factors: Mapping[str, float] = MappingProxyType({})
) -> Tensor:
    """The value of the last line, one axis per leg."""
    diagram = rule.equations[-1].diagram
    assert diagram is not None
    return dense(diagram, with_lines(rule, env, output, size, factors), size)


def total_jacobian(rule: BoundRule, operand: str, env: Env, size: int) -> Tensor | None:
    """∂output/∂operand through all lines (which `env` has), [output elements, operand elements]. None: it is zero."""
    through: dict[str, Tensor] = {}
    for equation in rule.equations:
        direct = _line_jacobian(equation, operand)
        terms = [] if direct is None else [_matrix(direct, env, size)]
        for inner, before in through.items():
            jacobian = _line_jacobian(equation, inner)
            terms += [] if jacobian is None else [_matrix(jacobian, env, size) @ before]
        if terms:
            through[equation.name] = torch.stack(terms).sum(0)
    return through.get(rule.equations[-1].name)


def _line_jacobian(equation: Equation, operand: str) -> Jacobian | None:
    if operand in equation.jacobians:
        return equation.jacobians[operand]
    return None if equation.diagram is None else differentiate(equation.diagram, operand)


def _matrix(jacobian: Jacobian, env: Env, size: int) -> Tensor:
    value = dense(jacobian.diagram, env, size)
    return value.reshape(prod(leg_sizes(jacobian.out, size)), -1)


def leg_sizes(legs: tuple[Leg, ...], size: int) -> tuple[int, ...]:
    return tuple(size_of(leg.size, size) for leg in legs)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
