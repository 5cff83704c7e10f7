"""Functions that a rule's torch code calls: their source goes with the program."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import RuleError


@dataclass(frozen=True)
class Helper:
    """A function that code calls, with its source."""

    name: str
    source: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Helper:
        """Of a Python function. Raises `RuleError` where its source is not to be had."""
        free = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if free or getattr(function, "__name__", "").startswith("<"):
            what = f"reads {', '.join(free)} from around it" if free else "has no name"
            raise RuleError(f"a function of a rule {what}", hint="write it with def, of its arguments and torch alone")
        try:
            return cls(function.__name__, textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError) as error:
            name = getattr(function, "__name__", function)
            raise RuleError(f"the source of {name} is not to be had ({error})", hint="define it in a file") from None
