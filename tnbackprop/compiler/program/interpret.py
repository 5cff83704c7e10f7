"""The reference interpreter of programs: what every line means, by the meaning of each function's row and no text.

It is slow and plain. Passes are checked against it: the lines before and after a pass give the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import reduce
from typing import Any

import sympy
import torch

from ...diagram.core import N
from ...notation.code import evaluated
from .expr import Body, Call, Filled, Join, Lambda, Of, Pointwise, Rounds, Slice, Value, Word
from .functions import Form
from .lines import Block, Line, lines_of
from .numbers import TOTAL, Number

Env = MutableMapping[Value, Any]
Elementwise = Callable[[sympy.Expr, Mapping[sympy.Symbol, Any]], Any]


class Interpreter:
    """Runs lines at a batch size; `elementwise` is what a sympy expression means of tensors.

    sizes  symbol -> number: N, and the others that sizes are written in
    """

    def __init__(self, sizes: Mapping[sympy.Symbol, int], elementwise: Elementwise) -> None:
        self.sizes, self.elementwise = dict(sizes), elementwise

    def run(self, lines: Iterable[Line], env: Env) -> Env:
        """Every line in order; in-place functions write as they do."""
        for line in lines:
            env[line.value] = self.value(line.expr, env) if line.block is None else self._block(line.block, env)
        return env

    def _block(self, block: Block, env: Env) -> Mapping[int, Any]:
        inner = dict(env)
        self.run(block.begin, inner)
        for piece in self._pieces([(self.value(whole, inner), 0) for _, whole in block.rows], block.width):
            rows = piece if block.width > 1 else [row.squeeze(0) for row in piece]
            self.run(block.lines, inner := {**inner, **dict(zip((v for v, _ in block.rows), rows, strict=True))})
        self.run(block.end, inner)
        return {k: inner[total] for k, total in block.totals.items()}

    def value(self, expr: Any, env: Mapping[Value, Any]) -> Any:
        """What an expression, or a plain argument, is."""
        match expr:
            case Value():
                return env[expr]
            case Call():
                return self._call(expr, env)
            case Pointwise():
                args = {symbol: self.value(each, env) for symbol, each in expr.args}
                return self.elementwise(expr.expr.xreplace(self.sizes), args)
            case Filled():
                holes = {name: self.value(each, env) for name, each in expr.holes}
                return evaluated(expr.code, holes, {"torch": torch, "N": self.sizes[N]})
            case Lambda():
                return lambda *args: self.value(expr.body, {**env, **dict(zip(expr.params, args, strict=True))})
            case Rounds():
                return self._rounds(expr, env)
            case Of():
                return self._body(expr.body, [self.value(each, env) for each in expr.args])
            case Number():
                return self._number(expr.value)
            case Word():
                return expr.meaning
            case Slice():
                return slice(*(self.value(each, env) for each in (expr.start, expr.stop, expr.step)))
            case tuple() | list():
                return type(expr)(self.value(each, env) for each in expr)
            case sympy.Basic():
                return int(expr.xreplace(self.sizes))
        return expr

    def _number(self, value: sympy.Expr) -> int | float:
        exact = sympy.sympify(value.xreplace(self.sizes))
        return int(exact) if exact.is_Integer else float(exact)

    def _call(self, call: Call, env: Mapping[Value, Any]) -> Any:
        args = [self.value(each, env) for each in call.args]
        options = {name: self.value(each, env) for name, each in call.options}
        if call.fn.form is Form.OPERATOR:
            return reduce(call.fn.meaning, args)
        return call.fn.meaning(*args, **options)

    def _rounds(self, expr: Rounds, env: Mapping[Value, Any]) -> Any:
        args = [(self.value(each, env), axis) for each, axis in expr.args]
        found = []
        for cut in self._pieces(args, expr.width):
            if expr.of_columns and expr.width == 1:
                cut = [each if axis is None else each.squeeze(0) for each, (_, axis) in zip(cut, args, strict=True)]
            found.append(self._body(expr.body, cut))
        if not expr.body.several:
            return self._joined(found, expr, 0)
        begin = [[] if start is None else [self.value(start, env)] for start in expr.begin or (None,) * len(expr.joins)]
        every = ([*start, *(each[k] for each in found)] for k, start in enumerate(begin))
        return [self._joined(values, expr, k) for k, values in enumerate(every)]

    def _pieces(self, args: list[tuple[Any, int | None]], width: int) -> Iterator[list[Any]]:
        """The arguments of each round."""
        size = next(each.shape[axis] for each, axis in args if axis is not None)
        for start in range(0, size, width):
            length = min(width, size - start)
            yield [each if axis is None else each.narrow(axis, start, length) for each, axis in args]

    def _joined(self, found: list[Any], expr: Rounds, k: int) -> Any:
        if expr.joins[k] is Join.SUM:
            return reduce(torch.add, found)
        joined = torch.cat(found, expr.axis)
        return joined[: expr.size] if expr.of_columns else joined

    def _body(self, body: Body, args: list[Any]) -> Any:
        env: dict[Value, Any] = dict(zip(body.params, args, strict=False))
        sizes = dict(self.sizes)
        if body.batch is not None:
            first, axis = body.batch
            sizes[N] = env[first].shape[axis]
        if body.total:
            sizes[TOTAL] = args[-1]
        inner = Interpreter(sizes, self.elementwise)
        inner.run(lines_of(body.steps, functional=True), env)
        results = tuple(inner.value(each, env) for each in body.results)
        return results if body.several else results[0]
