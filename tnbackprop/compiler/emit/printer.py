"""The torch text of expressions: the one place where they become source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch

from ...diagram.core import Size
from ..program.expr import Body, Call, Expr, Filled, Join, Lambda, Of, Pointwise, Rounds, Slice, Value, Word
from ..program.functions import Form
from ..program.numbers import Number
from .printing import number_code, torch_code

ATOM = 100
STRENGTH = {"*": 50, "/": 50, "//": 50, "+": 40, "-": 40, "&": 30, "|": 20, "<": 10, ">=": 10, "==": 10}
"""How strongly operators bind."""
FOLLOWED = "progress"


class Printer:
    """Text of expressions with these names of values, and of the functions next to the program."""

    def __init__(self, names: Callable[[Value], str], functions: Mapping[Body, str]) -> None:
        self.names, self.functions = names, functions

    def text(self, expr: Any, outside: int = 0) -> str:
        """The expression; in parentheses where what is around it binds more strongly."""
        code, strength = self._shown(expr)
        return f"({code})" if strength < outside else code

    def _shown(self, expr: Any) -> tuple[str, int]:
        match expr:
            case Value():
                return self.names(expr), ATOM
            case Call():
                return self._call(expr)
            case Pointwise():
                return torch_code(expr.expr, {s: self.text(each, ATOM) for s, each in expr.args}), 0
            case Filled():
                return self._filled(expr)
            case Lambda():
                body = self.text(expr.body)
                return f"lambda {', '.join(map(self.names, expr.params))}: {body}", 0
            case Rounds():
                return self._rounds(expr), ATOM
            case Of():
                return f"{self.functions[expr.body]}({', '.join(map(self.text, expr.args))})", ATOM
            case Number():
                return number_code(expr.value), ATOM
        return literal(expr, self.text), ATOM

    def _call(self, call: Call) -> tuple[str, int]:
        name, form = call.fn.name, call.fn.form
        match form:
            case Form.OPERATOR:
                strength = STRENGTH[name]
                first, *rest = call.args
                shown = [self.text(first, strength), *(self.text(each, strength + 1) for each in rest)]
                return f" {name} ".join(shown), strength
            case Form.PROPERTY:
                return f"{self.text(call.args[0], ATOM)}.{name}", ATOM
            case Form.ITEM:
                return f"{self.text(call.args[0], ATOM)}[{self._places(call.args[1])}]", ATOM
        args = call.args
        head = name
        if form is Form.METHOD:
            head, args = f"{self.text(args[0], ATOM)}.{name}", args[1:]
        elif not name:
            head, args = self.text(args[0], ATOM), args[1:]
        shown = [*map(self.text, args), *(f"{key}={self.text(value)}" for key, value in call.options)]
        return f"{head}({', '.join(shown)})", ATOM

    def _places(self, places: Any) -> str:
        every = places if isinstance(places, tuple) else (places,)
        return ", ".join(self._slice(each) if isinstance(each, Slice) else self.text(each) for each in every)

    def _slice(self, piece: Slice) -> str:
        ends = ":".join("" if each is None else self.text(each) for each in (piece.start, piece.stop))
        return ends + (f":{piece.step}" if piece.step is not None else "")

    def _filled(self, expr: Filled) -> tuple[str, int]:
        holes = dict(expr.holes)
        code = expr.code.filled(lambda name: self.text(holes[name], ATOM))
        return code, ATOM if expr.code.call.whole else 0

    def _rounds(self, expr: Rounds) -> str:
        """Calls for some samples after the others; rounds of columns are a loop, which is no expression."""
        if expr.of_columns:
            return f"{expr.size} columns, {expr.width} at a time"
        args = ", ".join(self._cut(each, axis, expr.width) for each, axis in expr.args)
        over = "range(N)" if expr.body.several else f"range(0, N, {expr.width})"
        over = f"{FOLLOWED}({over})" if expr.followed else over
        calls = f"{self.functions[expr.body]}({args}) for i in {over}"
        if expr.body.several:
            return f"added({calls})"
        if expr.joins == (Join.SUM,):
            return f"sum({calls})"
        return f"torch.cat([{calls}]{f', {expr.axis}' if expr.axis else ''})"

    def _cut(self, each: Expr, axis: int | None, chunk: int) -> str:
        code = self.text(each, ATOM)
        return code if axis is None else f"{code}[{':, ' * axis}i : i + {chunk}]"


def literal(value: Any, text: Callable[[Any], str]) -> str:
    """A plain argument as Python."""
    match value:
        case Word():
            return value.text
        case tuple():
            return f"({', '.join(map(text, value))}{',' if len(value) == 1 else ''})"
        case list():
            return f"[{', '.join(map(text, value))}]"
        case dict():
            return "{" + ", ".join(f"{key!r}: {text(each)}" for key, each in value.items()) + "}"
        case sympy.Basic():
            return size_text(value)
        case float() if value in (float("inf"), float("-inf")) or value != value:
            return f"float('{value}')"
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(value)
    return repr(value)


@lru_cache(2**12)
def size_text(size: Size) -> str:
    """A size as it stands in the source."""
    return str(size) if isinstance(size, int) else str(sympy.sstr(size)).replace(" ", "")
