"""Code from outside that the compiler calls: the rows of rules and the algebra of quantities."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import TnError

MISTAKES = (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)
PACKAGE = str(Path(__file__).parents[2])


@contextmanager
def foreign(what: str, kind: type[TnError]) -> Iterator[None]:
    """What it raises is told as an error of `kind`, with its line."""
    try:
        yield
    except MISTAKES as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(PACKAGE)]
        place = f"\n  {frames[0].filename}, line {frames[0].lineno}: {frames[0].line}" if frames else ""
        raise kind(f"{what} raises {type(error).__name__}: {error}{place}") from error
