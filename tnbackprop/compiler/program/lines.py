"""Lines: what is computed in order, and the passes that write a value over another one or where memory is already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import sympy

from .expr import Call, Expr, Value, captured
from .facts import written_over
from .functions import Memory, function
from .numbers import Number


@dataclass(frozen=True)
class Line:
    """value = expr, where a pass may have found another expression than the value's own.

    own     the value may be written over, and its operands for it
    inputs  what the value is made from
    frees   what nothing reads after it
    note    what it is for
    block   of rounds of columns: the loop
    over    the operand whose memory it has
    """

    value: Value
    expr: Expr
    own: bool
    inputs: tuple[Value, ...]
    frees: tuple[Value, ...] = ()
    note: str = ""
    block: Block | None = None
    over: Value | None = None


Lines = tuple[Line, ...]


@dataclass(frozen=True)
class Block:
    """A loop: `begin`, then `lines` with each variable of `rows` at the next `width` rows of a value, then `end`.

    totals  what it leaves, by the number of the result
    size    how many rows there are, without those that fill up the last round
    """

    begin: Lines
    rows: tuple[tuple[Value, Expr], ...]
    width: int
    lines: Lines
    end: Lines
    totals: Mapping[int, Value]
    size: int

    @property
    def every(self) -> Lines:
        """All its lines."""
        return (*self.begin, *self.lines, *self.end)


def alive(steps: Iterable[Value], wanted: set[Value]) -> tuple[Value, ...]:
    """The steps that some wanted value needs."""
    kept, needed = [], set(wanted)
    for step in reversed(tuple(steps)):
        if step in needed:
            kept.append(step)
            needed |= set(step.inputs)
    return tuple(reversed(kept))


def lines_of(steps: Iterable[Value], functional: bool = False) -> tuple[Line, ...]:
    """A line for each; `functional`: that write over nothing, for what autograd or vmap is to see through."""
    own = ((step, step.expr) for step in steps)
    return tuple(
        Line(s, expr, s.own and not functional, s.inputs, note=s.note) for s, expr in own if expr is not None
    )


def captured_by(lines: Iterable[Line]) -> set[Value]:
    """The values that functions and comprehensions inside the lines read."""
    return {value for line in lines for value in captured(line.expr)}


def in_place(lines: Lines, kept: Iterable[Value], varying: Iterable[Value] = ()) -> Lines:
    """Each line writes over an operand where nothing after it can see the operand's memory.

    Not where it is in memory that is given in every round (`varying`).
    """
    rows = {value: frozenset({value}) for value in varying}
    seen = _memory(lines, rows)
    last = {memory: k for k, line in enumerate(lines) for value in line.inputs for memory in seen.get(value, ())}
    busy = {memory for value in kept for memory in seen.get(value, ())} | set(rows)
    found = []
    for k, line in enumerate(lines):
        if line.own:
            for operand, expr in written_over(line.value.expr):
                free = seen.get(operand, frozenset())
                if operand.whole and free and not free & busy and all(last[memory] == k for memory in free):
                    whole = sympy.Mul(*operand.shape) == sympy.Mul(*line.value.shape)  # no sum of what is written
                    line = replace(line, expr=expr, over=operand if whole else None)
                    break
        found.append(line)
    return tuple(found)


def _memory(lines: Lines, rows: Mapping[Value, frozenset[Value]]) -> dict[Value, frozenset[Value]]:
    """For each value those whose memory it may be: its own, or that of everything it was made from."""
    seen = dict(rows)
    for line in lines:
        inherited = frozenset().union(*(seen.get(value, frozenset()) for value in line.inputs))
        seen[line.value] = frozenset({line.value}) if line.own else inherited
    return seen


def with_out(expr: Expr, out: Expr) -> Expr | None:
    """The same product or matmul with out=; None for another expression."""
    if not isinstance(expr, Call) or not expr.fn.into or len(expr.args) > 2:
        return None
    args = tuple(sorted(expr.args, key=lambda each: isinstance(each, Number)))  # a number cannot come first
    into = expr.fn if expr.fn.source else function(expr.fn.into)
    return Call(replace(into, memory=Memory.WHOLE), args, (("out", out),))


def handed(lines: Iterable[Line], large: Callable[[Value], bool], memory: Callable[[Value], Expr]) -> tuple[Line, ...]:
    """The lines; those of products and matmuls that are large go where `memory` says."""
    return tuple(_handed(line, memory) if line.own and large(line.value) else line for line in lines)


def _handed(line: Line, memory: Callable[[Value], Expr]) -> Line:
    expr = with_out(line.expr, memory(line.value))
    return line if expr is None else replace(line, expr=expr)
