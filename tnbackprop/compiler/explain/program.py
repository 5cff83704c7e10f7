"""The typed program as text, and what each pass changes."""

from __future__ import annotations

from collections.abc import Iterator

from ..emit.compiled import Compiled
from ..program.cost import Kernel
from ..program.lines import Block, Line, lines_of
from ..program.passes import PASSES, Pass
from .text import shortened, table

CODE_WIDTH = 72


def program_lines(compiled: Compiled) -> Iterator[str]:
    """Every value: its name, its shape, what makes it, whose memory it has."""
    rows = [("value", "shape", "memory", "made by")]
    for step, _ in compiled.plan.timed:
        name, code = compiled.texts[step]
        base = step.inputs[0] if step.kernel is Kernel.VIEW and step.inputs else None
        seen = f"of {compiled.texts[base][0] if base in compiled.texts else base}" if base is not None else ""
        memory = "own" if step.own else seen or "as it is made"
        rows.append((name, "[" + ", ".join(map(str, step.shape)) + "]", memory, shortened(code, CODE_WIDTH)))
    yield from table(rows, "  ")


def pass_lines(row: Pass, compiled: Compiled) -> Iterator[str]:
    """What a pass changes: each line before it and after it."""
    yield f"  {row.says}"
    writer = compiled.writer
    lines, context = lines_of(compiled.plan.steps), writer.context(writer.wanted)
    for each in PASSES[: PASSES.index(row)]:
        lines = each.apply(lines, context)
    text, names = writer.printer.text, writer.names
    for before, after in zip(lines, row.apply(lines, context), strict=True):
        if after.block is not None and before.block is None:
            yield f"  {names(after.value)}: {text(before.expr)}"
            yield from (f"    {names(line.value)} = {text(line.expr)}" for line in _own(after.block))
        if after.expr is not before.expr:
            yield f"  {names(after.value)} = {text(before.expr)}  →  {text(after.expr)}"
        if after.frees:
            yield f"  after {names(after.value)}: {', '.join(map(names, after.frees))}"


def _own(block: Block) -> Iterator[Line]:
    """The lines of a loop that are no line of its steps."""
    return (line for line in block.every if line.expr is not line.value.expr)
