"""Progress of long work: a bar for the rounds of a loop over columns, or for the slices of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from ..errors import InputError

try:
    from rich.progress import track
except ImportError:  # an extra
    track = None  # type: ignore[assignment]


def counted(rows: Iterable[Any], what: str) -> Iterator[Any]:
    """Rows one by one, with a bar; none is read ahead. Raises `InputError` where rich is not installed."""
    if track is None:
        raise InputError("progress=True draws its bar with rich: pip install rich, or leave it out")
    try:
        total = len(rows) if isinstance(rows, Sized) else None
    except TypeError:  # a DataLoader of an iterable data set
        total = None
    return iter(track(rows, description=what, total=total, transient=True))


def bars() -> Callable[[Iterable[Any]], Iterator[Any]]:
    """What hands out rows one by one, with a bar; slices inside a loop over columns have none of their own.

    Raises `InputError` where rich is not installed.
    """
    if track is None:
        raise InputError("progress=True draws its bar with rich: pip install rich, or leave it out")
    shown = False

    def bar(rows: Iterable[Any]) -> Iterator[Any]:
        nonlocal shown
        if shown:
            yield from rows
            return
        shown, what = True, "slices of the batch" if isinstance(rows, range) else "columns"
        rows = list(rows)
        yield from track(rows, description=what, total=len(rows), transient=True)
        shown = False

    return bar
