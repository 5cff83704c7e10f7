"""Each row against its own operator: formula, saved tensors, forward code, Jacobians and native VJPs, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from tnbackprop import compiler
from tnbackprop.compiler.translate.graph import Call, Graph, Value
from tnbackprop.diagram.core import Diagram, N
from tnbackprop.diagram.derivatives import differentiate
from tnbackprop.diagram.jacobian import Jacobian
from tnbackprop.diagram.reference import evaluate
from tnbackprop.notation.bind import COTANGENT, COTANGENTS, BoundRule, bind
from tnbackprop.notation.code import Code
from tnbackprop.rules import RULES

from ..cases import EVERY, RANDOM_CASES, Case

Env = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """A call with its values: before it, and its output."""

    call: Call
    env: Env
    output: Tensor


def steps(case: Case) -> Iterator[Step]:
    """The calls of a case in order, each run with its own operator."""
    problem = case.build()
    graph = compiler.capture(problem.model, problem.loss, (problem.x, problem.y), RULES)
    env = inputs_of(graph, problem.model, problem.x, problem.y)
    for call in graph.calls:
        torch.manual_seed(0)  # a random row then draws what the operator drew
        output = run(call, env)
        yield Step(call, dict(env), output)
        env[call.output.name] = output


def inputs_of(graph: Graph, model: torch.nn.Module, x: Tensor, y: Tensor) -> Env:
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    env = {name: parameters[paths[0]].detach() for name, paths in graph.parameters.items()}
    env |= {name: buffers[path] for name, path in graph.buffers.items()}
    return env | dict(graph.constants) | dict(zip(graph.inputs, (x, y), strict=True))


def concrete(value: Any, env: Env, n: int) -> Any:
    if isinstance(value, Value):
        return env[value.name]
    if isinstance(value, sympy.Basic):
        return int(value.subs(N, n))
    if isinstance(value, tuple):
        return [concrete(v, env, n) for v in value]
    return value


def run(call: Call, env: Env, **replaced: Tensor) -> Tensor:
    """The operator itself."""
    n = next(v for k, v in env.items() if k.startswith("x")).shape[0]
    arguments = {("self" if k == "input" else k): concrete(v, env, n) for k, v in call.arguments.items()}
    arguments |= {("self" if k == "input" else k): v for k, v in replaced.items()}
    if "hidden" in arguments:  # of attention by hand
        arguments["attn_mask"] = ~arguments.pop("hidden")
    named = {a.name for a in call.target._schema.arguments}
    if "self" in arguments and "self" not in named:
        arguments["input"] = arguments.pop("self")
    result = call.target(**arguments)
    return result[0] if isinstance(result, tuple) else result


def bound(call: Call) -> BoundRule:
    optional = {a.name for a in call.target._schema.arguments if str(a.type) == "Optional[Tensor]"}
    axes: dict[str, Any] = {name: value.axes for name, value in call.tensors.items()}
    axes |= {name: None for name in optional if call.arguments.get(name) is None}
    names = {name: value.name for name, value in call.tensors.items()}
    return bind(RULES[call.target](call), axes, names, call.output.name, call.output.axes, call.where)


def code(given: Code, env: Mapping[str, Tensor]) -> Tensor:
    """Torch code of a rule, with values in its holes."""
    names = {name: f"v{k}" for k, name in enumerate(env)}
    return eval(given.filled(names.__getitem__), {"torch": torch}, {names[name]: value for name, value in env.items()})


def reference(diagram: Diagram, env: Env, n: int) -> Tensor:
    values = {name: value.detach().numpy() for name, value in env.items() if isinstance(value, Tensor)}
    return torch.as_tensor(evaluate(diagram, values, n))


def evaluated(rule: BoundRule, env: Env, output: Tensor) -> Env:
    """`env` with the saved tensors and the lines of the formula."""
    env = dict(env)
    for saved in rule.saved:
        env[saved.name] = code(saved.code, env)
    env[rule.equations[-1].name] = output
    n = next(v for k, v in env.items() if k.startswith("x")).shape[0]
    for equation in rule.equations[:-1]:
        assert equation.diagram is not None
        value = reference(equation.diagram, env, n)
        if equation.name in env:  # native code gives it, too
            torch.testing.assert_close(env[equation.name].reshape(value.shape), value)
        env[equation.name] = value
    return env


def matrix(jacobian: Jacobian, env: Env, n: int) -> Tensor:
    """The Jacobian as a matrix [output elements, operand elements]."""
    dense = reference(jacobian.diagram, env, n)
    return dense.reshape(dense.shape[: len(jacobian.out)].numel(), -1)


def check(step: Step) -> None:
    """One call: forward code, formula, Jacobians, native VJPs."""
    call, n = step.call, next(v for k, v in step.env.items() if k.startswith("x")).shape[0]
    rule = bound(call)
    torch.manual_seed(0)
    env = evaluated(rule, step.env, step.output)
    last = rule.equations[-1]
    if rule.forward:
        torch.testing.assert_close(code(rule.forward, env), step.output)
    if last.diagram is not None:
        value = reference(last.diagram, env, n).reshape(step.output.shape)
        torch.testing.assert_close(value, step.output)
    for name, operand in call.tensors.items():
        value = env[operand.name]
        twice = list(call.tensors.values()).count(operand) > 1
        if not operand.differentiable or twice:
            continue
        expected = reference_jacobian(step, name, rule, env)
        if len(rule.equations) == 1:
            declared = last.jacobians.get(operand.name)
            jacobian = declared or differentiate(last.diagram, operand.name)
            found = torch.zeros_like(expected) if jacobian is None else matrix(jacobian, env, n)
            torch.testing.assert_close(found, expected)
        for codes in (rule.vjp, rule.backward):
            if operand.name in codes:
                cotangent = torch.randn_like(step.output)
                native = code(codes[operand.name], env | {COTANGENT: cotangent, COTANGENTS: cotangent})
                torch.testing.assert_close(native.reshape(-1), cotangent.reshape(-1) @ expected)


def reference_jacobian(step: Step, name: str, rule: BoundRule, env: Env) -> Tensor:
    """[output elements, operand elements] by autograd of the operator (of the forward code, where it is random)."""
    value = env[step.call.tensors[name].name]

    def function(v: Tensor) -> Tensor:
        random = torch.Tag.nondeterministic_seeded in step.call.target.tags
        if rule.forward and random and step.call.arguments.get("dropout_p") != 0:
            return code(rule.forward, env | {step.call.tensors[name].name: v})
        return run(step.call, step.env, **split(step.call, name, v, env))

    jacobian = torch.autograd.functional.jacobian(function, value.contiguous())
    return jacobian.reshape(step.output.numel(), value.numel())


def split(call: Call, name: str, value: Tensor, env: Env) -> dict[str, Any]:
    """The argument that holds tensor `name`, replaced; `tensors1` is element 1 of the list `tensors`."""
    if name in call.arguments:
        return {name: value}
    base = name.rstrip("0123456789")
    own = call.tensors[name].name
    return {base: [value if v.name == own else env[v.name] for v in call.arguments[base]]}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", EVERY + RANDOM_CASES, ids=str)
def test_rows(case: Case) -> None:
    """Formula = operator, saved code and forward code run, Jacobian = autograd, native VJP = autograd."""
    found = 0
    for step in steps(case):
        if step.output.is_floating_point() and step.call.output.differentiable:
            assert step.call.target in RULES, step.call.where
            check(step)
            found += 1
    assert found
