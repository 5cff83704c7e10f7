"""Layout: code as nested pieces, in one line, or in several where it is too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

LONG = 80
"""Code of so many characters may have to be broken."""


@dataclass(frozen=True, slots=True)
class Row:
    """Pieces one after the other: a call, and a method of what it gives."""

    parts: tuple[Doc, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Items in brackets: `open`a, b`close`, or each on a line of its own, then with a comma after the last.

    end  what follows the last item in one line: "," in a tuple of one
    """

    open: str
    items: tuple[Doc, ...]
    close: str
    comma: bool = True
    end: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """(operator, operand), …: the first operator is "" or a sign."""

    items: tuple[tuple[str, Doc], ...]


Doc: TypeAlias = str | Row | Group | Chain


def flat(doc: Doc) -> str:
    """In one line."""
    if isinstance(doc, str):
        return doc
    if isinstance(doc, Group):
        return f"{doc.open}{', '.join(map(flat, doc.items))}{doc.end}{doc.close}"
    if isinstance(doc, Row):
        return "".join(map(flat, doc.parts))
    return " ".join(part for operator, operand in doc.items for part in (operator, flat(operand)) if part)


def laid(before: str, doc: Doc, after: str, width: int) -> str:
    """A statement: what stands before the piece with its indent, the piece, what follows it.

    Where it is broken in another way than formatters do, they are told to leave it.
    """
    indent = len(before) - len(before.lstrip(" "))
    line = before + flat(doc) + after
    if len(line) <= width:
        return line
    whole: Doc = Group("(", (doc,), ")", comma=False) if isinstance(doc, Chain) else doc
    lines = list(_lines(before, whole, after, indent, width))
    return "\n".join(lines) + ("  # fmt: skip" if _odd(doc) else "")


def _lines(before: str, doc: Doc, after: str, indent: int, width: int) -> Iterator[str]:
    line = before + flat(doc) + after
    if len(line) <= width:
        yield line
        return
    inner = " " * (indent + 4)
    match doc:
        case Group() if doc.items:
            yield before + doc.open
            for item in doc.items:
                yield from _lines(inner, item, "," * doc.comma, indent + 4, width)
            yield " " * indent + doc.close + after
        case Chain():
            *rest, (operator, last) = doc.items
            for k, (sign, operand) in enumerate(rest):
                head = before if k == 0 else " " * indent
                yield from _lines(head + _sign(sign, k), operand, "", indent, width)
            yield from _lines(" " * indent + _sign(operator, len(rest)), last, after, indent, width)
        case Row():
            k = max(range(len(doc.parts)), key=lambda k: _inside(doc.parts[k]))
            first, last = (flat(Row(parts)) for parts in (doc.parts[:k], doc.parts[k + 1 :]))
            yield from _lines(before + first, doc.parts[k], last + after, indent, width)
        case _:
            yield f"{line}  # noqa: E501"


def _sign(operator: str, position: int) -> str:
    return f"{operator} " if operator and position else operator


def _inside(doc: Doc) -> int:
    """How much can be put on other lines."""
    match doc:
        case Group():
            return sum(len(flat(item)) + 2 for item in doc.items)
        case Row():
            return max(map(_inside, doc.parts), default=0)
        case Chain():
            return len(flat(doc))
    return 0


def _calls(doc: Doc) -> int:
    return sum(map(_calls, doc.parts)) if isinstance(doc, Row) else int(isinstance(doc, Group))


def _odd(doc: Doc) -> bool:
    """Whether there are operators, or methods of what calls give, in what is too long: about those tastes differ."""
    if len(flat(doc)) <= LONG:
        return False
    inside: Iterable[Doc] = ()
    match doc:
        case Chain():
            return True
        case Row():
            return _calls(doc) > 1 or any(_odd(part) for part in doc.parts)
        case Group():
            inside = doc.items
    return any(_odd(each) for each in inside)
