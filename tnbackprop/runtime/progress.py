"""Progress of long work: a bar for the rounds of a loop over columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import InputError

try:
    from rich.progress import track
except ImportError:  # an extra
    track = None  # type: ignore[assignment]


def bar(rows: Iterable[Any]) -> Iterable[Any]:
    """The rows one by one, with a bar. Raises `InputError` where rich is not installed."""
    if track is None:
        raise InputError("progress=True draws its bar with rich: pip install rich, or leave it out")
    rows = list(rows)
    return track(rows, description="columns", total=len(rows), transient=True)
