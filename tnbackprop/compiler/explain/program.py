"""The typed program as text, and what each pass changes."""

from __future__ import annotations

from collections.abc import Iterator

from ...diagram.core import operand_tensors
from ..emit.compiled import Compiled
from ..program.cost import Kernel
from ..program.expr import Body, Call, Join, Rounds, Value, bodies
from ..program.lines import Block, Line, lines_of
from ..program.passes import PASSES, Pass
from .text import shortened, table

CODE_WIDTH = 72
INDENT = "  "
Row = tuple[str, str, str, str]


def program_lines(compiled: Compiled) -> Iterator[str]:
    """Every value, by what it is for: its name, its shape, whose memory it has, what makes it.

    What is done part by part is further in; after rounds of columns comes what they leave.
    """
    rows: list[Row] = [("value", "shape", "memory", "made by")]
    heads: dict[int, str] = {}
    note = ""
    for step, depth, row in _rows(compiled, compiled.plan.steps, 0, set()):
        leaves = step.kernel is Kernel.ROUNDS and not isinstance(step.expr, Rounds)
        about = f"left by {compiled.writer.names(step.inputs[0])}" if leaves else step.note
        if about and about != note:
            note = about
            heads[len(rows)] = f"{INDENT * depth}{note}"
        rows.append((INDENT * depth + row[0], *row[1:]))
    for k, line in enumerate(table(rows, "  ")):
        if k in heads:
            yield heads[k]
        yield line


def _rows(
    compiled: Compiled, steps: tuple[Value, ...], depth: int, shown: set[Body]
) -> Iterator[tuple[Value, int, Row]]:
    """The rows of some steps and of all rounds in them; a function that several call stands below the first."""
    names, text = compiled.writer.names, compiled.writer.printer.text
    for step in steps:
        rounds = step.expr
        if isinstance(rounds, Rounds) and rounds.of_columns:
            taken = ", ".join(f"{names(variable)} of {text(whole)}" for variable, whole in rounds.rows)
            yield step, depth, (names(step), "", "", f"{text(rounds)}: {taken}")
            yield from _rows(compiled, rounds.body.steps, depth + 1, shown)
            continue
        if step.kernel is Kernel.ROUNDS:
            yield step, depth, (names(step), _shape(compiled, step), "own", _left(compiled, step))
            continue
        name, code = compiled.texts[step]
        base = step.inputs[0] if step.kernel is Kernel.VIEW and step.inputs else None
        seen = f"of {compiled.texts[base][0] if base in compiled.texts else base}" if base is not None else ""
        memory = "own" if step.own else seen or "as it is made"
        yield step, depth, (name, _shape(compiled, step), memory, shortened(code, CODE_WIDTH))
        for body in bodies(step.expr):
            if body not in shown:
                shown.add(body)
                given = ", ".join(compiled.texts[value][0] for value in body.values if value in compiled.texts)
                name = compiled.writer.functions[body]
                yield step, depth, (name, "", "", f"a function of some samples, that gives {given}")
                yield from _rows(compiled, body.steps, depth + 1, shown)


def _left(compiled: Compiled, step: Value) -> str:
    """How what rounds of columns leave is made of a value inside them."""
    assert isinstance(step.expr, Call)
    made, number = step.expr.args
    rounds = made.expr
    inner = compiled.writer.names(rounds.body.values[number])
    if rounds.joins[number] is Join.CAT:
        return f"{inner} of all rounds, one after the other"
    begin = rounds.begin[number]
    start = f"{compiled.writer.printer.text(begin)} + " if begin is not None else ""
    return f"{start}the sum of {inner} over all rounds"


def _shape(compiled: Compiled, step: Value) -> str:
    forward = compiled.plan.forward
    if isinstance(step.expr, Rounds) and step.expr.body.several:
        return ""  # a tuple
    if any(forward.get(name) is step for name in opaque(compiled)):
        return "?"
    return "[" + ", ".join(map(str, step.shape)) + "]"


def opaque(compiled: Compiled) -> set[str]:
    """Values of a rule that only its code reads: nothing says their shape."""
    rules = [rule for _, rule in compiled.derived.bound]
    equations = [equation for rule in rules for equation in rule.equations]
    diagrams = [d for e in equations for d in (e.diagram, *(j.diagram for j in e.jacobians.values())) if d is not None]
    read = {t.name for d in diagrams for product in d.products for op in product.operands for t in operand_tensors(op)}
    return {saved.name for rule in rules for saved in rule.saved if not saved.legs} - read


def pass_lines(row: Pass, compiled: Compiled) -> Iterator[str]:
    """What a pass changes: each line before it and after it, and new ones."""
    yield f"  {row.says}"
    writer = compiled.writer
    lines, context = lines_of(compiled.plan.steps), writer.context(writer.wanted)
    for each in PASSES[: PASSES.index(row)]:
        lines = each.apply(lines, context)
    text, names, known = writer.printer.text, writer.names, {line.value: line for line in lines}
    for after in row.apply(lines, context):
        before = known.get(after.value)
        if before is None:
            yield f"  {names(after.value)} = {text(after.expr)}"
            continue
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
