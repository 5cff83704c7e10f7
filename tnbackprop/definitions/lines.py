"""A program's lines on one sample as torch functions: what is defined line by line is made of their Jacobians.

A line is a call with its own operator; of a rule with several lines, each of them, from its formula. What the compiler
made of them (diagrams of Jacobians, plans, source) is not used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import sympy
import torch
from sympy.printing.pytorch import TorchPrinter
from torch import Tensor
from torch.func import grad

from ..compiler.translate.graph import Call
from ..diagram.core import BATCH, Diagram, Leg, Map, N, Product, argument, leaves
from ..diagram.core import Tensor as Operand
from ..diagram.reference import materialise, size_of
from ..notation.bind import BoundRule, Equation
from ..runtime import Program
from . import oracle
from .calls import Env, operate, trace, with_lines

Function = Callable[[Env], Tensor]


@dataclass(frozen=True)
class Line:
    """A value as a function of the values that it reads.

    reads    those with trainable parameters behind them
    data     those with the batch
    sampled  whether it has the batch; what is made of parameters alone has not
    sizes    of its legs, row-major, without the batch
    opaque   it has no rule: nothing is said of its positions
    """

    name: str
    reads: tuple[str, ...]
    data: tuple[str, ...]
    sampled: bool
    sizes: tuple[int, ...]
    opaque: bool
    function: Function


class Sample:
    """One sample's values, and the dense Jacobians of the lines there; computed when they are first asked for."""

    def __init__(self, program: Program, x: Any, y: Any) -> None:
        traced = trace(program, x, y, 1)
        graph = program.compiled.graph
        assert isinstance(graph.output, str)
        self.output = graph.output
        self.trainable = {name: dotted[0] for name, dotted in graph.parameters.items()}
        self.trainable = {n: dotted for n, dotted in self.trainable.items() if graph.values[n].depends_on}
        self.env: dict[str, Tensor] = dict(traced.env)
        self.lines: list[Line] = []
        varying = {name for name, value in graph.values.items() if value.differentiable}
        sampled = {name for name, value in graph.values.items() if any(N in axis for axis in value.axes)}
        for call, rule in traced.bound:
            self.env |= with_lines(rule, self.env, self.env[call.output.name], 1)
            sampled |= {equation.name for equation in rule.equations if BATCH in equation.legs}
            own = list(_lines(call, rule, varying, sampled))
            varying |= {line.name for line in own}
            self.lines += own
        self.lines = _behind(self.lines, self.output)
        self.jacobian = cache(self._jacobian)

    @property
    def entries(self) -> int:
        """Of all Jacobians of lines."""
        return sum(self.env[line.name].numel() * self.env[name].numel() for line in self.lines for name in line.reads)

    def _jacobian(self, line: Line, name: str) -> Tensor:
        """∂line/∂value, [elements, elements]."""
        found: Tensor = oracle.jacobian(self._of(line, name), self.env[name].contiguous())
        return found.reshape(self.env[line.name].numel(), -1)

    def probe(self, line: Line, name: str, seed: int) -> Tensor:
        """∂line/∂value where the line's data are others, of the same signs: what varies with them shows."""
        generator = torch.Generator().manual_seed(seed)
        changed = {}
        for other in line.data:
            value = self.env[other]
            if value.is_floating_point():
                factor = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                changed[other] = value * (0.5 + factor)
            elif value.dtype is not torch.bool and value.numel():
                changed[other] = torch.randint(int(value.max()) + 1, value.shape, generator=generator).to(value.dtype)
        found: Tensor = oracle.jacobian(lambda own: line.function({**self.env, **changed, name: own}), self.env[name])
        return found.reshape(self.env[line.name].numel(), -1)

    def curvature(self, line: Line, name: str, g: Tensor) -> Tensor:
        """diag ∂²(g·line)/∂value², [elements]."""
        function = self._of(line, name)
        at = self.env[name].contiguous()
        second: Tensor = oracle.jacobian(grad(lambda value: (function(value).reshape(-1) * g).sum()), at)
        return second.reshape(at.numel(), -1).diagonal()

    def _of(self, line: Line, name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: line.function({**self.env, name: value})


def _behind(lines: list[Line], output: str) -> list[Line]:
    """The lines that the output is made of: those of the loss are left out."""
    wanted, found = {output}, []
    for line in reversed(lines):
        if line.name in wanted:
            wanted |= {*line.reads}
            found.append(line)
    return found[::-1]


def _lines(call: Call, rule: BoundRule, varying: set[str], sampled: set[str]) -> Iterator[Line]:
    """The lines of one call; of one line, the operator itself."""
    alone = len(rule.equations) == 1 or any(equation.diagram is None for equation in rule.equations)
    for equation in rule.equations[-1:] if alone else rule.equations:
        named = [value.name for value in call.tensors.values()] if alone else leaves(_diagram(equation))
        reads = tuple(dict.fromkeys(name for name in named if name in varying))
        varying = varying | {equation.name} if reads else varying
        function: Function = _operator(call) if alone else _formula(_diagram(equation))
        sizes = tuple(size for leg, size in zip(equation.legs, _sizes(equation.legs), strict=True) if leg.size != N)
        if reads:
            data = tuple(dict.fromkeys(name for name in named if name in sampled))
            yield Line(equation.name, reads, data, BATCH in equation.legs, sizes, bool(rule.fallback), function)


def _diagram(equation: Equation) -> Diagram:
    assert equation.diagram is not None
    return equation.diagram


def _operator(call: Call) -> Function:
    return lambda env: operate(call, env, 1)


# -- a line of a formula in torch


def _formula(diagram: Diagram) -> Function:
    """The value of a diagram, so that torch.func can differentiate it."""
    return lambda env: torch.stack([_product(product, diagram.legs, env) for product in diagram.products]).sum(0)


def _product(product: Product, output: tuple[Leg, ...], env: Env) -> Tensor:
    legs = [operand.legs for operand in product.operands]
    like = next(value for value in env.values() if value.is_floating_point())
    values = [_operand(operand, env, like) for operand in product.operands]
    missing = tuple(leg for leg in output if leg not in product.legs)
    legs, values = [*legs, missing], [*values, like.new_ones(_sizes(missing))]
    numbers = {leg: k for k, leg in enumerate(dict.fromkeys(leg for own in legs for leg in own))}
    pairs = [part for value, own in zip(values, legs, strict=True) for part in (value, [numbers[leg] for leg in own])]
    scale = float(sympy.sympify(product.scale).subs(N, 1))
    return scale * torch.einsum(*pairs, [numbers[leg] for leg in output])


def _operand(operand: Any, env: Env, like: Tensor) -> Tensor:
    match operand:
        case Operand():
            return env[operand.name].reshape(_sizes(operand.legs)).to(like.dtype)
        case Map():
            return _map(operand, env, like)
        case _:  # deltas, windows and selections are constants
            values = {name: value.detach().numpy() for name, value in env.items() if not value.is_floating_point()}
            return torch.as_tensor(materialise(operand, values, 1)).to(like.dtype)


def _map(operand: Map, env: Env, like: Tensor) -> Tensor:
    args = []
    for arg in operand.args:
        present = [leg for leg in operand.legs if leg in arg.legs]
        value = _operand(arg, env, like).permute([arg.legs.index(leg) for leg in present])
        args.append(value.reshape([size_of(leg.size, 1) if leg in arg.legs else 1 for leg in operand.legs]))
    return torch.as_tensor(_torch(operand.expr, len(args))(*args), dtype=like.dtype).expand(_sizes(operand.legs))


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "power": torch.pow,
    "quotient": operator.truediv,
    "sigmoid": torch.sigmoid,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "softplus": lambda x: -torch.nn.functional.logsigmoid(-x),
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "erfc": torch.erfc,
    "loggamma": torch.lgamma,
    "polygamma": torch.polygamma,
}


@lru_cache(2**10)
def _torch(expression: sympy.Expr, count: int) -> Callable[..., Any]:
    symbols, modules = [argument(k) for k in range(count)], [_FUNCTIONS, "torch"]
    printer = _Printer({"fully_qualified_modules": False, "inline": True})
    function: Callable[..., Any] = sympy.lambdify(symbols, expression.subs(N, 1), modules, printer)
    return function


class _Printer(TorchPrinter):  # type: ignore[misc]
    """sympy's own knows no further functions."""

    def _print_Function(self, expr: sympy.Function) -> str:
        name = type(expr).__name__
        shown = ", ".join(map(self._print, expr.args))
        return f"{name}({shown})" if name in _FUNCTIONS else str(super()._print_Function(expr))


def _sizes(legs: tuple[Leg, ...]) -> tuple[int, ...]:
    return tuple(size_of(leg.size, 1) for leg in legs)
