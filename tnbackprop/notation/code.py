"""Torch code that a rule gives: an expression of Python with holes for tensors. It is parsed once, here."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from ..errors import RuleError

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
    """

    name: str = ""
    on: str = ""
    first: str = ""
    whole: bool = False


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
    """Pieces of text, and holes between them."""

    parts: tuple[str | Hole, ...] = ()

    @classmethod
    def of(cls, *parts: str | Hole | Code) -> Code:
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
        return "".join(text(part.name) if isinstance(part, Hole) else part for part in self.parts)

    def with_holes(self, to: Mapping[str, Hole | Code | str]) -> Code:
        """With other holes, code or text in some of the holes."""
        return Code.of(*(to.get(part.name, part) if isinstance(part, Hole) else part for part in self.parts))

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
    numbers = {holes[n.id] for n in nodes if isinstance(n, ast.Name) and n.id in holes and id(n) not in forms}
    called = {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
    return frozenset(words - set(holes)), nested, _first_call(tree, holes), frozenset(numbers), frozenset(called)


SCOPES = (ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
FORMS = frozenset({"dtype", "device", "shape", "numel"})
"""Attributes that do not vary with the numbers of a tensor."""


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
            return Call(ast.unparse(function), "", argument, found is tree)


@lru_cache(maxsize=4096)
def check(text: str, operands: frozenset[str]) -> None:
    """Torch code is an expression of Python that reads torch and what stands in braces.

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
        if isinstance(node, ast.Name) and node.id not in own | {"torch", "N"} and not hasattr(builtins, node.id):
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
    return eval(compiled, {**words, **names})
