"""The syntax tree of a rule's text: frozen nodes with the place that an error points at."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import sympy

from ..errors import RuleError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the text and a 0-based column in it, for the caret."""

    line: str = ""
    column: int | None = None

    def error(self, what: str, hint: str = "") -> RuleError:
        return RuleError(what, self.line, self.column, hint)


@dataclass(frozen=True, slots=True)
class Star:
    """``*s``: any number of axes."""

    name: str
    place: Place = field(compare=False, default=Place())

    def __str__(self) -> str:
        return "*" + self.name


@dataclass(frozen=True, slots=True)
class Factors:
    """``i`` or ``g.o``: the row-major factors of one axis."""

    names: tuple[str, ...]
    place: Place = field(compare=False, default=Place())

    def __str__(self) -> str:
        return ".".join(self.names)


@dataclass(frozen=True, slots=True)
class Index:
    """``2*h + k - 1``: an affine index into one axis."""

    expr: Node
    text: str = ""
    place: Place = field(compare=False, default=Place())

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Rest:
    """``...``: all elements in row-major order."""

    place: Place = field(compare=False, default=Place())

    def __str__(self) -> str:
        return "..."


Item = Star | Factors | Index | Rest


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number."""

    value: sympy.Rational
    place: Place = field(compare=False, default=Place())


@dataclass(frozen=True, slots=True)
class Name:
    """A bare name: a constant of the rule or the size of a leg."""

    name: str
    place: Place = field(compare=False, default=Place())


@dataclass(frozen=True, slots=True)
class Access:
    """``tensor[items]``; the tensor `delta` is the Kronecker delta."""

    tensor: str
    items: tuple[Item, ...]
    place: Place = field(compare=False, default=Place())

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.items))}]"


@dataclass(frozen=True, slots=True)
class Select:
    """``select(index[items], y, x)``: one-hot of the index over the row-major positions of (y, x).

    ``select(index[h], y=2*h + k)`` says in addition where the choice lies, for some k.
    """

    index: Access
    choice: tuple[Item, ...]
    near: tuple[Index, ...] = ()
    place: Place = field(compare=False, default=Place())


@dataclass(frozen=True, slots=True)
class Apply:
    """An operator or function: + - * / ** neg, < <= > >= == !=, and or not, if, or one of FUNCTIONS."""

    op: str
    args: tuple[Node, ...]
    place: Place = field(compare=False, default=Place())


Node = Number | Name | Access | Select | Apply


@dataclass(frozen=True, slots=True)
class Line:
    """``name[items] = right``."""

    left: Access
    right: Node


def mixing(where: str, what: str) -> UnsupportedError:
    """The error of a formula in which a sample reads another."""
    remedy = "Derivatives never cross the batch: sum over the legs of one sample only."
    return UnsupportedError(f"{where} mixes samples: {what}.\n  {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known name, or lists the known ones."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else ""


def accesses(node: Node) -> Iterator[Access]:
    """Every access in the expression, deltas included, from left to right."""
    match node:
        case Access():
            yield node
        case Select():
            yield node.index
        case Apply():
            for arg in node.args:
                yield from accesses(arg)


def selects(node: Node) -> Iterator[Select]:
    """Every select in the expression."""
    match node:
        case Select():
            yield node
        case Apply():
            for arg in node.args:
                yield from selects(arg)
