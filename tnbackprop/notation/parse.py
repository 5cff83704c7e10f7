"""The text of a rule, parsed once into a frozen syntax tree. Names and sizes are bound in `bind`.

    program   = line { newline line }                  the last line defines `output`
    line      = name "[" items "]" "=" expression      a line may go on inside open brackets
    item      = leg | "*" star | leg "." leg … | affine index | "..."
    factor    = number | constant | SIZE | name "[" items "]" | delta[a, b] | select(index[items], leg, …)
                | select(index[items], leg=position, …)
    operators = + - * / **, unary -, comparisons, and/or/not, `a if condition else b`, the FUNCTIONS below

The grammar is Python's own, so `ast` reads it; what is not listed here is a `RuleError` with a caret.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import sympy

from ..diagram.functions import erfc, expm1, log1p, logsigmoid, sigmoid, softplus
from ..errors import RuleError
from .hints import LOOKALIKES, function_hint, line_hint, slice_hint
from .syntax import (
    Access,
    Apply,
    Factors,
    Index,
    Item,
    Line,
    Name,
    Node,
    Number,
    Place,
    Rest,
    Select,
    Star,
    accesses,
    nearest,
)


def _branch(condition: sympy.Basic, yes: sympy.Expr, no: sympy.Expr) -> sympy.Expr:
    return sympy.Piecewise((yes, condition), (no, True))


FUNCTIONS: Mapping[str, tuple[int, Callable[..., sympy.Expr]]] = MappingProxyType(
    {
        "exp": (1, sympy.exp),
        "log": (1, sympy.log),
        "sqrt": (1, sympy.sqrt),
        "sin": (1, sympy.sin),
        "cos": (1, sympy.cos),
        "tan": (1, sympy.tan),
        "atan": (1, sympy.atan),
        "sinh": (1, sympy.sinh),
        "cosh": (1, sympy.cosh),
        "tanh": (1, sympy.tanh),
        "erf": (1, sympy.erf),
        "abs": (1, sympy.Abs),
        "sign": (1, sympy.sign),
        "lgamma": (1, sympy.loggamma),
        "digamma": (1, sympy.digamma),
        **{f.__name__: (1, f) for f in (expm1, log1p, erfc, sigmoid, logsigmoid, softplus)},
        # at a tie the derivative is that of the first argument
        "maximum": (2, lambda a, b: _branch(a >= b, a, b)),
        "minimum": (2, lambda a, b: _branch(a <= b, a, b)),
    }
)
"""Functions of a formula: name -> (number of arguments, sympy expression)."""

RESERVED = frozenset(FUNCTIONS) | {"delta", "select", "pi", "inf"}
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_NOTATION = "it has name[legs], numbers, + - * / **, comparisons, a if b else c, and functions like exp(…)"
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_UNARY = {ast.USub: "neg", ast.Not: "not"}


@lru_cache(maxsize=4096)
def parse_program(text: str) -> tuple[Line, ...]:
    """The lines of a formula; checks the order of definitions, the last being `output`."""
    statements = _statements(text)
    if not statements:
        raise RuleError("the formula is empty", hint='write "output[legs] = expression"')
    lines = tuple(_line(source) for source in statements)
    defined: dict[str, Access] = {}
    used: set[str] = set()
    names = {line.left.tensor for line in lines}
    for line in lines:
        for access in accesses(line.right):
            used.add(access.tensor)
            if access.tensor in names and access.tensor not in defined:
                raise access.place.error(f"'{access.tensor}' is used before the line that defines it")
        if line.left.tensor in defined:
            raise line.left.place.error(f"'{line.left.tensor}' is defined twice")
        defined[line.left.tensor] = line.left
    last = lines[-1].left
    if last.tensor != "output":
        raise last.place.error(f"the last line defines '{last.tensor}'; it must define 'output'")
    for name, left in defined.items():
        if name not in used and name != "output":
            raise left.place.error(f"'{name}' is defined but not used")
    return lines


@lru_cache(maxsize=4096)
def parse_expression(text: str) -> Node:
    """One expression, as in a declared Jacobian."""
    source = _one(text)
    return _node(source.expression(), source)


@lru_cache(maxsize=4096)
def parse_access(text: str) -> Access:
    """``name[items]``, as in the key of a saved tensor."""
    source = _one(text)
    return _access(source.expression(), source)


@lru_cache(maxsize=4096)
def parse_legs(name: str, text: str) -> Access:
    """The access ``name[text]`` for declared legs ``"n, k"``."""
    return parse_access(f"{name}[{text.strip()}]")


@dataclass(frozen=True)
class _Source:
    """One statement: its physical lines, stripped."""

    lines: tuple[str, ...]

    def parse(self) -> list[ast.stmt]:
        try:
            return ast.parse("\n".join(map(_padded, self.lines))).body
        except SyntaxError as err:
            place = self._at(err.lineno or 1, max((err.offset or 1) - 1, 0))
            raise place.error(f"not a formula: {err.msg}", line_hint(place.line, place.column or 0)) from None
        except (RecursionError, MemoryError):
            raise RuleError("not a formula: too many brackets inside each other", hint="write several lines") from None

    def expression(self) -> ast.expr:
        statement = self.parse()[0]
        if not isinstance(statement, ast.Expr):
            raise self.place(statement).error("an expression is needed here, without '='")
        return statement.value

    def left(self) -> ast.expr | None:
        """What the line defines; None: it is an expression."""
        statement = self.parse()[0]
        return statement.targets[0] if isinstance(statement, ast.Assign) else None

    def place(self, node: ast.expr | ast.stmt) -> Place:
        return self._at(node.lineno, node.col_offset)

    def _at(self, row: int, column: int) -> Place:
        line = self.lines[min(row, len(self.lines)) - 1]
        columns = (c for c in range(len(line) + 1) if len(_padded(line[:c])) >= column)
        return Place(line, next(columns, len(line)))


def _padded(line: str) -> str:
    """Python has no empty subscript: x[] is read as x[()]."""
    return line.replace("[]", "[()]")


def _statements(text: str) -> list[_Source]:
    """The statements of the text; a line goes on while a bracket is open."""
    found: list[_Source] = []
    pending: list[str] = []
    depth = 0
    for raw in text.split("\n"):
        line = re.sub(r"\s", " ", raw.split("#")[0]).strip()
        for column, char in enumerate(line):
            if char == "^":
                raise Place(line, column).error("'^' is no power", f"write {line.replace('^', '**')}")
            if not " " <= char <= "~":
                hint = f"write {LOOKALIKES[char]}" if char in LOOKALIKES else "names and operators are ASCII"
                raise Place(line, column).error(f"the character {char!r} is not ASCII", hint)
        depth += sum(line.count(c) for c in "([{") - sum(line.count(c) for c in ")]}")
        if line:
            pending.append(line)
        if pending and depth <= 0:
            found.append(_Source(tuple(pending)))
            pending, depth = [], 0
    if pending:
        found.append(_Source(tuple(pending)))
    return found


def _one(text: str) -> _Source:
    statements = _statements(text)
    if len(statements) != 1:
        raise RuleError("one expression is needed here", statements[1].lines[0] if statements else "")
    return statements[0]


def _line(source: _Source) -> Line:
    body = source.parse()
    statement = body[0]
    if len(body) != 1 or not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        hint = "write a line for each" if len(body) > 1 else ""
        raise source.place(statement).error("a line has the form name[legs] = expression", hint)
    left = _access(statement.targets[0], source)
    if left.tensor in RESERVED:
        raise left.place.error(f"'{left.tensor}' is a reserved name")
    seen: set[str] = set()
    for item in left.items:
        if isinstance(item, Index):
            hint = f"write delta[leg, {item}] as a factor on the right"
            raise item.place.error("an index on the left must be a leg", hint)
        names = item.names if isinstance(item, Factors) else () if isinstance(item, Rest) else ("*" + item.name,)
        for name in names:
            if name in seen:
                raise item.place.error(f"leg '{name}' is repeated on the left")
            seen.add(name)
    return Line(left, _node(statement.value, source))


def _access(node: ast.expr, source: _Source) -> Access:
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        raise source.place(node).error("expected name[legs]", "a name with its legs: input[n, i]; name[] has none")
    elements = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    items = tuple(_item(element, source) for element in elements)
    rest = [item for item in items if isinstance(item, Rest)]
    if rest and len(items) > 1:
        raise rest[0].place.error("'...' stands alone in its brackets")
    return Access(node.value.id, items, source.place(node))


def _item(node: ast.expr, source: _Source) -> Item:
    place = source.place(node)
    match node:
        case ast.Starred(value=ast.Name(id=name)):
            return Star(_leg(name, place), place)
        case ast.Constant(value=value) if value is ...:
            return Rest(place)
        case ast.Name(id=name):
            return Factors((_leg(name, place),), place)
        case ast.Attribute():
            return Factors(tuple(_dotted(node, source)), place)
        case ast.Constant() | ast.BinOp() | ast.UnaryOp():
            expr = _node(node, source)
            inner = next(accesses(expr), None)
            if inner is not None:
                raise inner.place.error("an index cannot read a tensor", "use select(index[legs], leg)")
            return Index(expr, ast.unparse(node), place)
        case ast.Slice():
            raise place.error("a slice is no leg", slice_hint(node, place.line))
        case _:
            raise place.error("expected a leg, *legs, g.o, an affine index or '...'")


def _dotted(node: ast.expr, source: _Source) -> Iterator[str]:
    match node:
        case ast.Name(id=name):
            yield _leg(name, source.place(node))
        case ast.Attribute(value=value, attr=attr):
            yield from _dotted(value, source)
            yield _leg(attr, source.place(node))
        case _:
            raise source.place(node).error("a grouped axis has the form g.o")


def _leg(name: str, place: Place) -> str:
    if name == name.upper():
        raise place.error(f"'{name}' is not a leg: capitals are sizes", f"write '{name.lower()}'")
    return name


def _node(node: ast.expr, source: _Source) -> Node:
    place = source.place(node)

    def of(*nodes: ast.expr) -> tuple[Node, ...]:
        return tuple(_node(n, source) for n in nodes)

    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if value - value != 0:
                raise place.error("the number is not finite")
            return Number(sympy.Rational(repr(value)), place)
        case ast.Name(id=name):
            return Name(name, place)
        case ast.Subscript():
            return _access(node, source)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return Apply(_OPERATORS[type(op)], of(left, right), place)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _node(operand, source)
        case ast.UnaryOp(op=ast.USub() | ast.Not() as op, operand=operand):
            return Apply(_UNARY[type(op)], of(operand), place)
        case ast.BoolOp(op=op, values=values):
            return Apply("and" if isinstance(op, ast.And) else "or", of(*values), place)
        case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in _COMPARISONS for op in ops):
            sides = of(left, *right)
            tests = tuple(Apply(_COMPARISONS[type(op)], sides[k : k + 2], place) for k, op in enumerate(ops))
            return tests[0] if len(tests) == 1 else Apply("and", tests, place)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return Apply("if", of(test, body, orelse), place)
        case ast.Call(func=ast.Name(id="select"), args=[index, *choice], keywords=[]) if choice:
            return Select(_access(index, source), tuple(_item(c, source) for c in choice), (), place)
        case ast.Call(func=ast.Name(id="select"), args=[index], keywords=[*near]) if near:
            return Select(_access(index, source), *_near(near, source), place)
        case ast.Call():
            return _call(node, source)
        case ast.BinOp(left=left, op=ast.MatMult(), right=right):
            product = f"{ast.unparse(left)} * {ast.unparse(right)}"
            raise place.error("'@' is not part of the notation", f"write {product}: a leg not on the left is summed")
        case _:
            raise place.error("this is not part of the notation", _NOTATION)


def _near(keywords: list[ast.keyword], source: _Source) -> tuple[tuple[Item, ...], tuple[Index, ...]]:
    """The legs of a choice, and the position that each of them has for some value of a leg of its own."""
    choice, near = [], []
    for leg in keywords:
        place, position = source.place(leg.value), _item(leg.value, source)
        if leg.arg is None or not isinstance(position, Index):
            raise place.error("a choice lies at a position, as in select(index[h], y=2*h + k)")
        choice.append(Factors((_leg(leg.arg, place),), place))
        near.append(position)
    return tuple(choice), tuple(near)


def _call(node: ast.Call, source: _Source) -> Apply:
    place = source.place(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name == "select":
        raise place.error("select has the form select(index[legs], leg, …)")
    if name not in FUNCTIONS:
        hint = function_hint(node, source.left()) or nearest(name, FUNCTIONS)
        raise place.error(f"unknown function '{name}'", hint)
    if len(node.args) != FUNCTIONS[name][0] or node.keywords:
        raise place.error(f"'{name}' takes {FUNCTIONS[name][0]} argument(s), {len(node.args)} given")
    return Apply(name, tuple(_node(arg, source) for arg in node.args), place)
