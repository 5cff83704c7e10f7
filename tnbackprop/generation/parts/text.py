"""Source text of files: statements of plain data, heads of functions, docstrings, comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...compiler.emit import printer
from ...compiler.emit.layout import Doc, Group, laid
from ...compiler.emit.naming import escaped, string
from ...compiler.emit.source import Comment

WIDTH = 120


def statement(before: str, doc: Doc, after: str = "") -> list[str]:
    """A statement in the lines that it takes."""
    return laid(before, doc, after, WIDTH).split("\n")


def call(name: str, arguments: Iterable[Doc]) -> Doc:
    """The call of a function."""
    return Group(f"{name}(", tuple(arguments), ")")


def assigned(name: str, value: Any) -> list[str]:
    """name = plain data."""
    return statement(f"{name} = ", printer.data(value))


def definition(name: str, arguments: Iterable[str], body: Sequence[str], indent: str = "") -> list[str]:
    """The first line of a function, with what ruff is told where it has many statements."""
    statements = sum(not isinstance(line, Comment) for line in body)
    first, *rest = statement(f"{indent}def ", call(name, arguments), ":")
    return [first + ("  # noqa: PLR0915" if statements > 60 else ""), *rest]


def rows(body: Iterable[str]) -> list[str]:
    """The lines of statements."""
    return [row for each in body for row in each.split("\n")]


def docstring(lines: Iterable[str], indent: str = "    ") -> list[str]:
    """Lines as a docstring; the first is the summary."""
    first, *rest = (row for line in lines for row in (prose(escaped(line), indent) or [""]))
    if not rest:
        return [f'{indent}"""{first}"""']
    body = [f"{indent}{row}".rstrip() for row in ("", *rest)]
    return [f'{indent}"""{first}', *body, f'{indent}"""']


def prose(line: str, indent: str = "") -> list[str]:
    """A line of text in several; what follows is indented as the line is, and by four more."""
    own = " " * (len(line) - len(line.lstrip()))
    width = WIDTH - len(indent) - 4
    return textwrap.wrap(line, width, subsequent_indent=f"{own}    ", break_long_words=False, break_on_hyphens=False)


def table(name: str, entries: Mapping[str, Doc]) -> list[str]:
    """A dictionary, one entry on each line; keys are code."""
    lines = [row for key, entry in entries.items() for row in statement(f"    {key}: ", entry, ",")]
    return [f"{name} = {{", *lines, "}"] if entries else [f"{name} = {{}}"]


def data(name: str, value: Mapping[Any, Any]) -> list[str]:
    """The same of plain data."""
    return table(name, {literal(key): printer.data(entry) for key, entry in value.items()})


def literal(key: Any) -> str:
    """A key as code."""
    return string(key) if isinstance(key, str) else f"({', '.join(map(string, key))})"


def sizes(shape: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
