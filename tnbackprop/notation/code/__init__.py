"""Torch code that a rule gives: an expression of Python with holes for tensors. It is parsed once, here."""

from __future__ import annotations

import ast
import builtins
import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

from ...errors import RuleError
from .helper import Helper

_HOLE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Hole:
    """The place of a tensor."""

    name: str


@dataclass(frozen=True)
class Call:
    """What an expression calls first: `torch.f(…)` in `torch.f(…).sum()`.

    name   of the function, dotted; of a method its name alone
    on     the hole whose method it is; "" for a function
    first  the hole that is the whole first argument; "" for anything else
    whole  the expression is this call and nothing else
    aten   the overload of ATen that it is: "relu", "slice.Tensor"; "" for anything else
    """

    name: str = ""
    on: str = ""
    first: str = ""
    whole: bool = False
    aten: str = ""


@dataclass(frozen=True)
class Called:
    """A call: of a function, or of a method `on` other code.

    arguments  ("key=" or "", the argument)
    several    a comma may follow the last of them
    inside     the other code stands in parentheses
    """

    name: str
    on: Code | None
    arguments: tuple[tuple[str, Code], ...]
    several: bool
    inside: bool = False


@dataclass(frozen=True)
class Operators:
    """(sign, operand, whether it stands in parentheses), …: the first sign is ""."""

    terms: tuple[tuple[str, Code, bool], ...]


@dataclass(frozen=True)
class Function:
    """A lambda."""

    head: str
    body: Code


class Native(Protocol):
    """What computes a VJP natively: code, or anything else that says what it reads."""

    @property
    def holes(self) -> tuple[str, ...]:
        """What it reads, each once."""

    @property
    def call(self) -> Call:
        """What it calls first."""

    def filled(self, text: Callable[[str], str]) -> str:
        """It as text, with that of what it reads."""


@dataclass(frozen=True)
class Code:
    """Pieces of text, holes between them, and functions that are called."""

    parts: tuple[str | Hole | Helper, ...] = ()

    @classmethod
    def of(cls, *parts: str | Hole | Helper | Code) -> Code:
        """The parts one after the other."""
        flat = (piece for part in parts for piece in (part.parts if isinstance(part, Code) else (part,)))
        return cls(tuple(piece for piece in flat if piece != ""))

    @classmethod
    def parsed(cls, text: str) -> Code:
        """The code that a person wrote, with holes in braces."""
        pieces = _HOLE.split(text)
        return cls.of(*(Hole(piece) if k % 2 else piece for k, piece in enumerate(pieces)))

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def holes(self) -> tuple[str, ...]:
        """The names of its holes, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Hole)))

    @property
    def words(self) -> frozenset[str]:
        """Every identifier outside of the holes."""
        return _facts(self)[0]

    @property
    def nested(self) -> bool:
        """Whether it has a function or a comprehension inside."""
        return _facts(self)[1]

    @property
    def call(self) -> Call:
        """What it calls first."""
        return _facts(self)[2]

    @property
    def called(self) -> frozenset[str]:
        """The last words of everything that it calls."""
        return _facts(self)[4]

    @property
    def numbers(self) -> frozenset[str]:
        """The holes whose numbers it reads, not only their dtype, device or shape."""
        return _facts(self)[3]

    def filled(self, text: Callable[[str], str]) -> str:
        """The text, with that of each hole."""
        return "".join(text(part.name) if isinstance(part, Hole) else _text(part) for part in self.parts)

    @property
    def helpers(self) -> tuple[Helper, ...]:
        """The functions that it calls, each once."""
        return tuple(dict.fromkeys(part for part in self.parts if isinstance(part, Helper)))

    def calling(self, helpers: Iterable[Helper]) -> Code:
        """With functions for the words that are their names."""
        known = {helper.name: helper for helper in helpers}
        if not known:
            return self
        names = re.compile(rf"\b({'|'.join(known)})\b")
        pieces = (names.split(part) if isinstance(part, str) else [part] for part in self.parts)
        every = (piece for each in pieces for piece in each)
        return Code.of(*(known.get(piece, piece) if isinstance(piece, str) else piece for piece in every))

    def with_holes(self, to: Mapping[str, Hole | Code | str]) -> Code:
        """With other holes, code or text in some of the holes."""
        return Code.of(*(to.get(part.name, part) if isinstance(part, Hole) else part for part in self.parts))

    @property
    def plain(self) -> Code:
        """The same, with the spaces, quotes and parentheses that formatters give."""
        return _piece(self.holes, _tree(self))

    @property
    def broken(self) -> Called | Operators | Function | None:
        """What it is made of; None: it is not to be taken apart."""
        return _broken(self)

    def tree(self) -> ast.expr:
        """The syntax tree; hole k is the name of `_name(k)`."""
        return _tree(self)

    def written(self, function: str, keyword: str, hole: str) -> Code:
        """The same call of another function, with a keyword argument more; of code that is one call."""
        head, last = self.parts[0], self.parts[-1]
        assert isinstance(head, str) and isinstance(last, str) and self.call.whole
        pieces = (function + head.strip().removeprefix(self.call.name), *self.parts[1:-1])
        return Code.of(*pieces, f"{last.rstrip()[:-1]}, {keyword}=", Hole(hole), ")")

    def __str__(self) -> str:
        return self.filled(lambda name: name)


def _text(part: str | Helper) -> str:
    return part.name if isinstance(part, Helper) else part


@dataclass(frozen=True)
class Nth:
    """One result of code that gives several: a kernel with a cotangent for each operand."""

    code: Native
    place: int

    @property
    def holes(self) -> tuple[str, ...]:
        return self.code.holes

    @property
    def call(self) -> Call:
        return self.code.call

    def filled(self, text: Callable[[str], str]) -> str:
        return f"{self.code.filled(text)}[{self.place}]"


def _name(position: int) -> str:
    """The k-th hole while it is parsed; it is as long in every code, and no one else's name."""
    return f"hole{position:04d}"


@lru_cache(4096)
def _tree(code: Code) -> ast.expr:
    names = {name: _name(k) for k, name in enumerate(code.holes)}
    return ast.parse(code.filled(names.__getitem__).strip(), mode="eval").body


@lru_cache(4096)
def _facts(code: Code) -> tuple[frozenset[str], bool, Call, frozenset[str], frozenset[str]]:
    if not code:
        return frozenset(), False, Call(), frozenset(), frozenset()
    holes = {_name(k): name for k, name in enumerate(code.holes)}
    tree = _tree(code)
    nodes = list(ast.walk(tree))
    words = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    nested = any(isinstance(n, SCOPES) for n in nodes)
    forms = {id(n.value) for n in nodes if isinstance(n, ast.Attribute) and n.attr in FORMS}
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.args]
    forms |= {id(n.args[0]) for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr in LIKE}
    numbers = {holes[n.id] for n in nodes if isinstance(n, ast.Name) and n.id in holes and id(n) not in forms}
    called = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    return frozenset(words - set(holes)), nested, _first_call(tree, holes), frozenset(numbers), frozenset(called)


@lru_cache(4096)
def _broken(code: Code) -> Called | Operators | Function | None:
    node, piece = _tree(code), partial(_piece, tuple(code.holes))
    match node:
        case ast.Call(func=function, args=args, keywords=keywords):
            keys = [("*", each.value) if isinstance(each, ast.Starred) else ("", each) for each in args]
            keys += [(f"{each.arg}=" if each.arg else "**", each.value) for each in keywords]
            several = not isinstance(keys[0][1], ast.GeneratorExp) if keys else False
            arguments = tuple((key, piece(each)) for key, each in keys)
            if isinstance(function, ast.Attribute) and piece(function.value).holes:
                inside = not isinstance(function.value, _ATOMS)
                return Called(f".{function.attr}", piece(function.value), arguments, several, inside)
            return Called(ast.unparse(function), None, arguments, several)
        case ast.BinOp(op=op) if type(op) in SIGNS:
            terms = _terms(node, next(signs for signs in ALIKE if type(op) in signs))
            return Operators(tuple((sign, piece(each), _inside(each, op)) for sign, each in terms))
        case ast.Lambda(args=parameters, body=body):
            return Function(f"lambda {ast.unparse(parameters)}: ", piece(body))
    return None


SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
ALIKE = ((ast.Add, ast.Sub), (ast.Mult, ast.Div))
_ATOMS = (ast.Call, ast.Name, ast.Attribute, ast.Subscript, ast.Constant)


def _terms(node: ast.expr, alike: tuple[type[ast.operator], ...]) -> list[tuple[str, ast.expr]]:
    """a + b - c as ("", a), ("+", b), ("-", c)."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, alike):
        return [*_terms(node.left, alike), (SIGNS[type(node.op)], node.right)]
    return [("", node)]


def _inside(node: ast.expr, around: ast.operator) -> bool:
    """Whether an operand stands in parentheses."""
    product = isinstance(node, ast.BinOp) and isinstance(node.op, ALIKE[1])
    return not isinstance(node, _ATOMS) and not (product and isinstance(around, ALIKE[0]))


def _piece(holes: tuple[str, ...], node: ast.expr) -> Code:
    """A part of a tree as code."""
    texts: list[str] = []
    parts = _NAMED.split(ast.unparse(_Texts(texts).visit(copy.deepcopy(node))))
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    pieces = ((Hole(holes[int(k)]) if kind == "hole" else texts[int(k)], after) for kind, k, after in found)
    return Code.of(parts[0], *(each for pair in pieces for each in pair))


class _Texts(ast.NodeTransformer):
    """Text in a tree is taken out, to stand in double quotes."""

    def __init__(self, found: list[str]) -> None:
        self.found = found

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, str) or {'"', "\\", "\n"} & set(node.value):
            return node
        self.found.append(f'"{node.value}"')
        return ast.Name(f"text{len(self.found) - 1:04d}")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.expr:
        return node


_NAMED = re.compile(r"\b(hole|text)(\d{4})\b")
SCOPES = (ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
FORMS = frozenset("dtype device shape numel new_zeros new_ones new_full new_empty".split())
"""Attributes that do not vary with the numbers of a tensor."""
LIKE = frozenset("zeros_like ones_like full_like empty_like".split())
"""Functions that read no numbers of their first operand."""


def _first_call(tree: ast.expr, holes: Mapping[str, str]) -> Call:
    node, found = tree, None
    while True:
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Call() as inner)):
                found, node = node, inner
            case ast.Call():
                found = node
                break
            case ast.Attribute(value=inner) | ast.Subscript(value=inner):
                node = inner
            case _:
                return Call()
    first = found.args[0] if found.args else None
    argument = holes.get(first.id, "") if isinstance(first, ast.Name) else ""
    match found.func:
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in holes:
            return Call(attribute, holes[name], argument, found is tree)
        case function:
            return Call(ast.unparse(function), "", argument, found is tree, ".".join(_words(function)[3:]))


def _words(function: ast.expr) -> list[str]:
    """torch.ops.aten.relu as its words; none where it is no operator of ATen."""
    words: list[str] = []
    node = function
    while isinstance(node, ast.Attribute):
        words.insert(0, node.attr)
        node = node.value
    words.insert(0, node.id if isinstance(node, ast.Name) else "")
    return words if words[:3] == ["torch", "ops", "aten"] else []


@lru_cache(maxsize=4096)
def check(text: str, operands: frozenset[str], functions: frozenset[str] = frozenset()) -> None:
    """Torch code is an expression of Python that reads torch and what stands in braces, and calls functions by name.

    Raises `RuleError` where it is anything else.
    """
    if not text:
        return
    plain = _HOLE.sub(lambda match: f"({'0' * len(match[1])})", text)
    try:
        nodes = list(ast.walk(ast.parse(plain, mode="eval")))
    except SyntaxError as error:
        line = text.split("\n")[(error.lineno or 1) - 1]
        raise RuleError(f"the code is no expression of Python: {error.msg}", line, (error.offset or 1) - 1) from None
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if (
            isinstance(node, ast.Name)
            and node.id not in own | functions | {"torch", "N"}
            and not hasattr(builtins, node.id)
        ):
            hint = f"write {{{node.id}}}" if node.id in operands else "it reads torch, and operands in braces: {input}"
            line = text.split("\n")[node.lineno - 1]
            raise RuleError(f"unknown name '{node.id}' in the code", line, node.col_offset, hint)


def holes_of(text: str) -> list[tuple[str, int]]:
    """The holes in what a person wrote, with their places."""
    return [(match[1], match.start(1)) for match in _HOLE.finditer(text)]


def evaluated(code: Code, values: Mapping[str, Any], words: Mapping[str, Any]) -> Any:
    """What the code computes, with these values in its holes and these words outside of them."""
    names = {_name(k): values[name] for k, name in enumerate(code.holes)}
    compiled = compile(ast.Expression(_tree(code)), "<code>", "eval")
    functions = dict(words)
    for helper in code.helpers:
        exec(helper.source, functions)
    return eval(compiled, {**functions, **names})
