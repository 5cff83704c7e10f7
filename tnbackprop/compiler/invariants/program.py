"""Invariants of the program, line by line: with all loops, and all functions next to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..program.expr import Call, Filled, Value, children, reads
from ..program.lines import Lines
from ..program.passes import Program

Flaws = Iterator[tuple[str, str]]

SYNCHRONISING = frozenset({"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique"})
"""Functions that wait for the device, or whose result has a shape that depends on the data."""


def living(program: Program, context: object) -> Flaws:
    """What is read was computed, and was not let go of."""
    alive = set(program.given)
    yield from _living(program.lines, alive)
    for value in program.kept - alive:
        yield str(value), "it is read later, but not there at the end"
    for body, lines in program.functions.items():
        own = set(body.params)
        yield from _living(lines, own)
        for value in {*reads(body.results)} - own:
            yield str(value), f"{body.hint} returns it, but it is not there"


def _living(lines: Lines, alive: set[Value]) -> Flaws:
    for line in lines:
        for value in reads(line.expr):
            if value not in alive:
                yield str(line.value), f"it reads {value}, which is not there (any more): {line.expr}"
        if line.block is not None:
            block, inner = line.block, {*alive, *line.block.totals.values()}
            yield from _living(block.begin, inner)
            yield from _living(block.lines, inner | {variable for variable, _ in block.rows})
            yield from _living(block.end, inner)
        alive |= {line.value}
        alive -= set(line.frees)


def synchronous(program: Program, context: object) -> Flaws:
    """No line waits for the device."""
    for lines in (program.lines, *program.functions.values()):
        for line in _every(lines):
            for name in _called(line.expr):
                if name.rpartition(".")[2] in SYNCHRONISING:
                    yield str(line.value), f".{name} waits for the device: {line.expr}"


def _every(lines: Lines) -> Lines:
    return tuple(each for line in lines for each in (line, *(line.block.every if line.block is not None else ())))


def _called(expr: object) -> Iterable[str]:
    """The names of what an expression calls."""
    if isinstance(expr, Call):
        yield expr.fn.name
    if isinstance(expr, Filled):
        yield from expr.code.called
    for child in children(expr) if not isinstance(expr, Value) else ():
        yield from _called(child)
