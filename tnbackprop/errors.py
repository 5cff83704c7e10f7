"""The errors of tnbackprop: each says what, where, and what to do next."""

from __future__ import annotations

from enum import Enum


class TnError(Exception):
    """Base class of every error that tnbackprop raises on purpose."""


class RuleError(TnError):
    """A rule's text is wrong; the message shows the text with a caret under the place.

    ``text`` is one line of the rule, ``column`` the 0-based place in it (None: no caret).
    """

    def __init__(self, what: str, text: str = "", column: int | None = None, hint: str = "") -> None:
        lines = [what]
        if text:
            lines.append("  " + text)
            if column is not None:
                lines.append("  " + " " * column + "^")
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))
        self.what, self.text, self.column, self.hint = what, text, column, hint


class UnsupportedError(TnError):
    """The model or the quantity needs something that has no rule, or that cannot be right."""


class FormulaError(UnsupportedError):
    """A quantity needs the formula of a call of which only VJPs are known."""


class InputError(TnError):
    """The values handed to a program do not fit what it was compiled for."""


class InvariantError(TnError):
    """A stage produced data that breaks its own contract: a bug in tnbackprop or in an extension."""


class VerificationError(TnError):
    """A rule or a program does not compute what the module does; the message names the first wrong entry."""


def check_member(option: str, value: object, kind: type[Enum]) -> None:
    """An option is a member of its enum, not its text. Raises `InputError`."""
    if not isinstance(value, kind):
        raise InputError(f"{option}={value!r}: give one of {', '.join(f'tn.{member}' for member in kind)}")
