"""Long tables: some of their rows in every run, all of them in the slow one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(rows: Iterable[Any], step: int = 2, start: int = 0) -> list[Any]:
    """The rows; all but every `step`-th, from `start` on, are slow."""
    return [row if k % step == start else _slow(row) for k, row in enumerate(rows)]


def _slow(row: Any) -> Any:
    return pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
