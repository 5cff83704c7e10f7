"""Naming: the one owner of names in a source. A value has a hint; its name is given here, and clashes with none."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable, Sequence

from ..program.expr import Value

LONGEST = 60
"""A hint is cut after so many characters."""
TAKEN = frozenset({*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "torch", "N", "V", "i", "total"})
"""Words that a source has for itself wherever it is read."""


class Scope:
    """The names inside of one function: those that are taken outside of it are not given again."""

    def __init__(self, taken: Iterable[str], plain: str = "t", names: dict[Value, str] | None = None) -> None:
        self._taken = set(taken)
        self._plain, self._count = plain, 0
        self._names: dict[Value, str] = dict(names or {})

    def __call__(self, value: Value, hint: str | None = None) -> str:
        """The name of a value; a new one for a value that has none yet, like its hint or another one."""
        if value not in self._names:
            self._names[value] = self.fresh(value.hint if hint is None else hint)
        return self._names[value]

    def __contains__(self, value: Value) -> bool:
        return value in self._names

    def fresh(self, hint: str) -> str:
        """An identifier that is like the hint, with a number behind it where that is taken."""
        name = identifier(hint) if hint else self._numbered()
        base, _, number = name.rpartition("_")
        base, count = (base, int(number)) if base and number.isdigit() and int(number) > 1 else (name, 1)
        while name in self._taken:
            count += 1
            name = f"{base}_{count}" if hint else self._numbered()
        self._taken.add(name)
        return name

    def _numbered(self) -> str:
        self._count += 1
        return f"{self._plain}{self._count - 1}"


def identifier(hint: str) -> str:
    """A hint as an identifier of ASCII letters."""
    name = re.sub(r"\W", "_", hint, flags=re.ASCII).strip("_")[:LONGEST] or "value"
    return f"value_{name}" if name[0].isdigit() else name


def common(texts: Sequence[str], other: str) -> str:
    """What texts have in common, piece by piece, with `other` for what differs; "" where they are made otherwise."""
    pieces = [re.split(r"(\W|_)", text) for text in texts]
    if len({len(each) for each in pieces}) > 1:
        return ""
    found = "".join(column[0] if len(set(column)) == 1 else other for column in zip(*pieces, strict=True))
    return found if other else re.sub("__+", "_", found).strip("_")


def string(text: str) -> str:
    """Any text as a literal, in double quotes where nothing in it has to be escaped for them."""
    shown = repr(text)
    plain = shown[0] == "'" and not {'"', "\\"} & set(shown)
    return f'"{text}"' if plain else shown


def comment(text: str) -> str:
    """Text in one line, in which nothing ends a comment or a docstring."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped(text: str) -> str:
    """Text in one line of a docstring."""
    return comment(text.replace("\\", "\\\\")).replace('""', '\\"\\"')


def docstring(text: str) -> str:
    """Text as the docstring of a source."""
    shown = escaped(text)
    return f'"""{shown[:-1]}\\""""' if shown.endswith('"') else f'"""{shown}"""'
