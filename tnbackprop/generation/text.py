"""Source text: long lines broken at brackets, docstrings, comments, plain data."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..compiler.emit.naming import escaped

WIDTH = 120
_OPEN, _CLOSE = "([{", ")]}"


def wrapped(line: str, width: int = WIDTH) -> list[str]:
    """A line of Python in several where it is too long: one item of its outermost brackets on each."""
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    if line.lstrip().startswith("#"):
        hash_ = f"{indent}# "
        return textwrap.wrap(line.strip()[1:].strip(), width, initial_indent=hash_, subsequent_indent=hash_)
    if re.match(r"\s*\w+ = ", line) and len(_terms(line.partition(" = ")[2])) > 1:
        return _at_operators(line, indent, width)
    start, end = _longest_brackets(line)
    if end - start <= 2:
        return [f"{line}  # noqa: E501"]
    first, *loops = _split(line[start + 1 : end], " for ")
    if loops or first.startswith("lambda "):
        items = [first, *(f"for {loop}" for loop in loops)]
    else:
        items = _split(first, ",")
    comma = "," if len(items) > 1 and not loops else ""
    lines = [line[: start + 1]]
    for item in items:
        if item.strip():
            lines += _item(f"{indent}    {item.strip()}{comma}", width)
    return [*lines, *wrapped(indent + line[end:], width)]


def _item(line: str, width: int) -> list[str]:
    """One item of brackets: inside them, operators are places to break as well."""
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    terms = _terms(line.strip())
    return wrapped(line, width) if len(terms) == 1 else [row for term in terms for row in wrapped(indent + term, width)]


def _at_operators(line: str, indent: str, width: int) -> list[str]:
    """name = (a, then + b, each on a line of its own)."""
    left, _, right = line.partition(" = ")
    rows = (row for term in _terms(right) for row in wrapped(f"{indent}    {term}", width))
    return [f"{left} = (", *rows, f"{indent})"]


def _terms(code: str) -> list[str]:
    """a + b * c as ["a", "+ b * c"]; without sums, a * b as ["a", "* b"]."""
    for operators in ("+-", "*/"):
        parts = [code]
        for operator in operators:
            pieces = [_split(part, f" {operator} ") for part in parts]
            parts = [row for first, *rest in pieces for row in (first, *(f"{operator} {part}" for part in rest))]
        if len(parts) > 1:
            return parts
    return [code]


def _split(code: str, separator: str) -> list[str]:
    """At every separator outside of brackets and strings."""
    found, depth, quote, begin, k = [], 0, "", 0, 0
    while k < len(code):
        char = code[k]
        if quote:
            k += char == "\\"  # what follows is no end of the string
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        elif depth == 0 and code.startswith(separator, k):
            found.append(code[begin:k])
            k += len(separator)
            begin = k
            continue
        k += 1
    return [*found, code[begin:]]


def _longest_brackets(line: str) -> tuple[int, int]:
    """The place of the outermost brackets with most between them."""
    best, depth, begin = (0, 0), 0, 0
    inside = [range(*match.span()) for match in _STRING.finditer(line)]
    for k, char in enumerate(line):
        if any(k in span for span in inside):
            continue
        if char in _OPEN:
            begin = k if depth == 0 else begin
            depth += 1
        elif char in _CLOSE:
            depth -= 1
            if depth == 0 and k - begin > best[1] - best[0]:
                best = (begin, k)
    return best


def statement(line: str) -> list[str]:
    """A statement with the spaces and quotes that formatters give it, in several lines where it is long."""
    indent = " " * (len(line) - len(line.lstrip()))
    code = line.strip()
    code, gap, comment = code.partition("  # ")
    if not code or code.startswith("#") or code.endswith(":"):
        return wrapped(line)
    plain = re.sub(r"\b(\w+) \*\* (\w+)\b", r"\1**\2", ast.unparse(ast.parse(code)))
    return _kept(wrapped(indent + quoted(plain) + gap + comment))


def _kept(rows: list[str]) -> list[str]:
    """A statement that is broken at operators, as it is: formatters do not agree on where."""
    broken = any(re.match(r"\s*([-+*/]|==) ", row) for row in rows)
    return [*rows[:-1], f"{rows[-1]}  # fmt: skip"] if broken else rows


def quoted(code: str) -> str:
    """Double quotes for plain strings."""
    return _STRING.sub(lambda match: _double(match[0]), code)


_STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")


def string(text: str) -> str:
    """Any text as a literal."""
    return quoted(repr(text))


def strings(texts: Iterable[str]) -> str:
    """A tuple of literals."""
    return quoted(repr(tuple(texts)))


def _double(literal: str) -> str:
    inside = literal[1:-1]
    return f'"{inside}"' if literal[0] == "'" and not set(inside) & {'"', "\\"} else literal


def definition(head: str, body: Sequence[str]) -> list[str]:
    """The first line of a function, with what ruff is told where it has many lines."""
    statements = sum(not line.lstrip().startswith("#") for line in body)
    first, *rest = wrapped(head)
    return [first + ("  # noqa: PLR0915" if statements > 60 else ""), *rest]


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


def data(name: str, value: Mapping[Any, Any]) -> list[str]:
    """A dictionary of plain data, one entry on each line."""
    rows = [row for key, entry in value.items() for row in wrapped(quoted(f"    {key!r}: {entry!r},"))]
    return [f"{name} = {{", *rows, "}"] if value else [f"{name} = {{}}"]


def sizes(shape: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
