"""The built-in rules: one table per family, merged into `RULES`. A target in two tables is an error."""

from __future__ import annotations

from ..table import Table
from . import (
    activation,
    arithmetic,
    composite,
    convolution,
    declared,
    einsum,
    embedding,
    linear,
    loss,
    moves,
    normalization,
    pooling,
    recurrent,
    resize,
    shape,
    special,
)
from .composites import differences, norms
from .recurrent import ctc

TABLES = (
    linear, convolution, activation, special, pooling, shape, moves, resize, arithmetic, einsum, normalization,
    embedding, loss, composite, norms, differences, recurrent, ctc, declared,
)  # fmt: skip


def merge(tables: tuple[Table, ...]) -> Table:
    """One table of all rows."""
    merged = Table()
    for table in tables:
        for target, row in table.items():
            merged.rule(target)(row)
    return merged


RULES = merge(tuple(family.TABLE for family in TABLES))
