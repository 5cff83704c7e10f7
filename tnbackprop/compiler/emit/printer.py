"""The torch text of expressions: the one place where they become source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch

from ...diagram.core import Size
from ...notation.code import Called, Code, Function, Operators
from ..program.expr import Body, Call, Expr, Filled, Join, Lambda, Of, Pointwise, Rounds, Slice, Value, Word, reads
from ..program.functions import Form
from ..program.numbers import Number
from .layout import LONG, Chain, Doc, Group, Row, flat, laid
from .naming import string
from .printing import number_code, plain_code, torch_doc

ATOM = 100
STRENGTH = {"*": 50, "/": 50, "//": 50, "+": 40, "-": 40, "&": 30, "|": 20, "<": 10, ">=": 10, "==": 10}
"""How strongly operators bind."""
FOLLOWED = "progress"
NONE: frozenset[Value] = frozenset()


class Printer:
    """Text of expressions with these names of values, and of the functions next to the program.

    width  statements that are longer are broken; None: none is
    bound  what a loop gives anew in every round: a function inside takes it along
    """

    def __init__(
        self,
        names: Callable[[Value], str],
        functions: Mapping[Body, str],
        width: int | None = None,
        bound: frozenset[Value] = frozenset(),
    ) -> None:
        self.names, self.functions, self.width, self.bound = names, functions, width, bound

    def inside(self, values: Iterable[Value]) -> Printer:
        """The printer of a loop that gives these values in every round."""
        return Printer(self.names, self.functions, self.width, self.bound | frozenset(values) if self.width else NONE)

    def statement(self, before: str, expr: Any, after: str = "") -> str:
        """`before`, the expression, `after`; in several lines where that is too long."""
        return self.line(before, self.doc(expr), after)

    def line(self, before: str, doc: Doc, after: str = "") -> str:
        """The same of code."""
        return before + flat(doc) + after if self.width is None else laid(before, doc, after, self.width)

    def text(self, expr: Any, outside: int = 0) -> str:
        """The expression; in parentheses where what is around it binds more strongly."""
        return flat(self.doc(expr, outside))

    def doc(self, expr: Any, outside: int = 0) -> Doc:
        """The same in pieces."""
        doc, strength = self._shown(expr)
        return Group("(", (doc,), ")", comma=False) if strength < outside else doc

    def _shown(self, expr: Any) -> tuple[Doc, int]:
        match expr:
            case Value():
                return self.names(expr), ATOM
            case Call():
                return self._call(expr)
            case Pointwise():
                return torch_doc(expr.expr, {s: self.text(each, ATOM) for s, each in expr.args}), 0
            case Filled():
                return self._filled(expr)
            case Lambda():
                own = [self.names(value) for value in reads(expr) if value in self.bound]
                params = [*map(self.names, expr.params), *(f"{name}={name}" for name in own)]
                return Row((f"lambda {', '.join(params)}: ", self.doc(expr.body))), 0
            case Rounds():
                return self._rounds(expr), ATOM
            case Of():
                return Group(f"{self.functions[expr.body]}(", tuple(map(self.doc, expr.args)), ")"), ATOM
            case Number():
                return number_code(expr.value), _strength(expr.value)
        return literal(expr, self.doc), ATOM

    def _call(self, call: Call) -> tuple[Doc, int]:
        name, form = call.fn.name, call.fn.form
        match form:
            case Form.OPERATOR:
                strength = STRENGTH[name]
                first, *rest = call.args
                others = ((name, self.doc(each, strength + 1)) for each in rest)
                return Chain((("", self.doc(first, strength)), *others)), strength
            case Form.PROPERTY:
                return Row((self.doc(call.args[0], ATOM), f".{name}")), ATOM
            case Form.ITEM:
                return Row((self.doc(call.args[0], ATOM), f"[{self._places(call.args[1])}]")), ATOM
        args = call.args
        on: Doc | None = None
        if form is Form.METHOD or not name:
            args, name, on = args[1:], f".{name}" if name else "", self.doc(args[0], ATOM)
        options = (Row((f"{key}=", self.doc(value))) for key, value in call.options)
        called = Group(f"{name}(", (*map(self.doc, args), *options), ")")
        return (called if on is None else Row((on, called))), ATOM

    def _places(self, places: Any) -> str:
        every = places if isinstance(places, tuple) else (places,)
        return ", ".join(self._slice(each) if isinstance(each, Slice) else self.text(each) for each in every)

    def _slice(self, piece: Slice) -> str:
        ends = ["" if each is None else self.text(each) for each in (piece.start, piece.stop)]
        colon = " : " if any(" " in each for each in ends) else ":"
        return colon.join(ends).strip() + (f":{piece.step}" if piece.step is not None else "")

    def _filled(self, expr: Filled) -> tuple[Doc, int]:
        holes = {name: self.text(each, ATOM) for name, each in expr.holes}
        code = expr.code if self.width is None else expr.code.plain
        return _code(code, holes), ATOM if expr.code.call.whole else 0

    def _rounds(self, expr: Rounds) -> Doc:
        """Calls for some samples after the others; rounds of columns are a loop, which is no expression."""
        if expr.of_columns:
            return f"{expr.size} columns, {expr.width} at a time"
        args = tuple(self._cut(each, axis, expr.width) for each, axis in expr.args)
        over = "range(N)" if expr.body.several else f"range(0, N, {expr.width})"
        over = f"{FOLLOWED}({over})" if expr.followed else over
        calls = Row((Group(f"{self.functions[expr.body]}(", args, ")"), f" for i in {over}"))
        if expr.body.several:
            return Group("added(", (calls,), ")", comma=False)
        if expr.joins == (Join.SUM,):
            return Group("sum(", (calls,), ")", comma=False)
        axis = (str(expr.axis),) if expr.axis else ()
        return Group("torch.cat(", (Group("[", (calls,), "]", comma=False), *axis), ")")

    def _cut(self, each: Expr, axis: int | None, chunk: int) -> str:
        code = self.text(each, ATOM)
        return code if axis is None else f"{code}[{':, ' * axis}i : i + {chunk}]"


def _strength(number: sympy.Expr) -> int:
    """How strongly the text of a number binds."""
    return ATOM if number.is_number or number.is_Symbol else STRENGTH["+" if number.is_Add else "*"]


def _code(code: Code, holes: Mapping[str, str]) -> Doc:
    """Code that a rule gives; broken at its calls."""
    text = code.filled(holes.__getitem__)
    match code.broken if len(text) > LONG else None:
        case Called() as call:
            arguments = tuple(Row((head, _code(each, holes))) for head, each in call.arguments)
            own = Group(f"{call.name}(", arguments, ")", comma=call.several)
            return Row((_operand(call.on, holes, call.inside), own)) if call.on else own
        case Operators() as operators:
            return Chain(tuple((sign, _operand(each, holes, inside)) for sign, each, inside in operators.terms))
        case Function() as function:
            return Row((function.head, _code(function.body, holes)))
    return text


def _operand(code: Code, holes: Mapping[str, str], inside: bool) -> Doc:
    doc = _code(code, holes)
    return Group("(", (doc,), ")", comma=False) if inside else doc


def literal(value: Any, doc: Callable[[Any], Doc]) -> Doc:
    """A plain argument as Python."""
    match value:
        case Word():
            return value.text
        case tuple():
            return Group("(", tuple(map(doc, value)), ")", end="," * (len(value) == 1))
        case list():
            return Group("[", tuple(map(doc, value)), "]")
        case Mapping():
            return Group("{", tuple(Row((doc(key), ": ", doc(each))) for key, each in value.items()), "}")
        case sympy.Basic():
            return size_text(value)
        case float() if value in (float("inf"), float("-inf")) or value != value:
            return f'float("{value}")'
        case torch.dtype() | torch.layout() | torch.memory_format():
            return str(value)
        case str():
            return string(value)
    return repr(value)


def data(value: Any) -> Doc:
    """Plain data as Python."""
    return literal(value, data)


@lru_cache(2**12)
def size_text(size: Size) -> str:
    """A size as it stands in the source."""
    return str(size) if isinstance(size, int) else plain_code(size)
