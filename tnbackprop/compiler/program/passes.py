"""Passes: named rows, in order. Each takes the lines of a program and gives lines of the same values.

In tests each is run in the reference interpreter before and after, on small integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from . import functions as f
from .expr import Body, Call, Expr, Rounds, Value
from .joined import joined
from .lines import Lines, handed, in_place
from .rounds import block_of


@dataclass(frozen=True)
class Program:
    """What the emitted function does.

    given      what the lines read from outside; `noises` are the names of what of it is random, `operands` of what
               quantities are handed
    kept       what is read later
    functions  the lines of the functions that they call
    """

    lines: Lines
    given: frozenset[Value]
    kept: frozenset[Value]
    functions: Mapping[Body, Lines]
    noises: frozenset[str] = frozenset()
    operands: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Context:
    """What a pass may know, other than the lines.

    kept     values that are read later: nothing is written over them, and they are not let go of
    large    whether the system would give a value's memory page by page
    memory   the memory that is there already for such a value
    like     a value of the program's dtype, on its device
    varying  values that the lines are given in every round
    """

    kept: frozenset[Value]
    large: Callable[[Value], bool]
    memory: Callable[[Value], Expr]
    like: Value
    varying: frozenset[Value] = frozenset()


@dataclass(frozen=True)
class Pass:
    """One row: its name, what it does in words, and the function that does it."""

    name: str
    says: str
    apply: Callable[[Lines, Context], Lines]


def _rounds(lines: Lines, context: Context) -> Lines:
    """Every loop over columns with its lines; what it leaves is there, and not taken out of a tuple."""
    items: dict[Value, dict[int, Value]] = {}
    for line in lines:
        if isinstance(line.expr, Call) and line.expr.fn is f.ITEM and isinstance(line.expr.args[0], Value):
            items.setdefault(line.expr.args[0], {})[line.expr.args[1]] = line.value

    def memory(value: Value) -> Expr | None:
        return context.memory(value) if context.large(value) else None

    def inside(lines: Lines, kept: frozenset[Value], varying: frozenset[Value]) -> Lines:
        return passed(lines, replace(context, kept=kept, varying=varying))

    return tuple(
        replace(line, block=block_of(line.expr, items.get(line.value, {}), context.like, memory, inside))
        if isinstance(line.expr, Rounds) and line.expr.of_columns
        else line
        for line in lines
    )


def _handed(lines: Lines, context: Context) -> Lines:
    return handed(lines, context.large, context.memory)


def _in_place(lines: Lines, context: Context) -> Lines:
    return in_place(lines, context.kept, context.varying)


def _let_go(lines: Lines, context: Context) -> Lines:
    last = {value: k for k, line in enumerate(lines) for value in line.inputs}
    own = ({line.value for line in lines} | context.varying) - context.kept
    return tuple(
        replace(line, frees=tuple(value for value in line.inputs if value in own and last[value] == k))
        for k, line in enumerate(lines)
    )


def _joined(lines: Lines, _: Context) -> Lines:
    return joined(lines)


PASSES = (
    Pass("joined", "both gradients of a convolution are one call", _joined),
    Pass("rounds", "what rounds of columns give is added up in place, or written where it is wanted", _rounds),
    Pass("out", "large products and matmuls are written where there is memory already", _handed),
    Pass("in place", "a value is written over an operand that nothing reads any more", _in_place),
    Pass("liveness", "values are let go of after the last line that reads them", _let_go),
)


def passed(lines: Lines, context: Context) -> Lines:
    """The lines after all passes."""
    for each in PASSES:
        lines = each.apply(lines, context)
    return lines
