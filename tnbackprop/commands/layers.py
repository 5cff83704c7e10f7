"""What a program does, layer by layer, as blocks of a document. The text is that of `program.explain()`."""

from __future__ import annotations

from collections.abc import Iterator

import tnbackprop as tn

from ..approximate import Factors
from ..bind import BoundRule
from ..compiler import Compiled
from ..compiler.derived import Extraction
from ..compiler.explain import (
    STEP_HEADER,
    algebra_lines,
    choice_lines,
    choice_of,
    declaration_lines,
    jacobian_lines,
    kept_rows,
    peak_text,
    step_row,
    total_rows,
)
from ..compiler.explain_text import diagram_text
from ..compiler.graph import Call, op_text
from ..compiler.polynomials import Symbols
from ..compiler.store import Step
from ..drawing import quantity
from .document import Block, Formulas, Grid, Heading, Picture, Words

LARGEST = 40
"""Operands of a picture: with more of them nobody sees anything."""


def document(program: tn.Program, title: str) -> Iterator[Block]:
    """The model, every layer, what is kept, and the totals."""
    compiled = program.compiled
    graph, batch = compiled.graph, compiled.plan.batch
    yield Heading(title)
    yield Words(f"{', '.join(program.quantities) or 'no quantity'} at N = {batch}; {len(graph.calls)} calls.")
    yield Picture(program, "the captured model")
    paths = dict.fromkeys(call.path for call, _ in compiled.derived.bound)
    told: set[str] = set()
    for path in paths:
        yield from _layer(program, path, told)
    others = [(step, times) for step, times in compiled.plan.timed if step.name not in told]
    if others:
        yield Heading("Elsewhere", 2)
        yield from _steps(compiled, others)
    rows, together = kept_rows(compiled)
    yield Heading("Kept from the forward", 2)
    yield Grid(("value", "shape", "bytes", "read for"), tuple(rows), frozenset({2}))
    yield Words(f"Together {together}.")
    header, *rows = total_rows(compiled)
    yield Heading(f"Totals (N = {batch})", 2)
    yield Grid(header, tuple(rows), frozenset({1, 2, 3, 4}))
    yield Words(f"Memory: {peak_text(compiled)}.")


def _layer(program: tn.Program, path: str, told: set[str]) -> Iterator[Block]:
    compiled = program.compiled
    calls = [(call, rule) for call, rule in compiled.derived.bound if call.path == path]
    kinds = ", ".join(dict.fromkeys(call.module_type or op_text(call.target) for call, _ in calls))
    yield Heading(f"{path or 'the model'}: {kinds}", 2)
    for call, rule in calls:
        yield from _formula(compiled, call, rule)
    mine = {value.name for call, _ in calls for value in call.tensors.values()} & set(compiled.graph.parameters)
    dotted = [compiled.graph.parameters[name][0] for name in compiled.graph.parameters if name in mine]
    for name in dotted:
        yield from _parameter(program, name)
    steps = [(step, times) for step, times in compiled.plan.timed if step.name not in told and _of(step, calls, dotted)]
    told.update(step.name for step, _ in steps)
    if steps:
        yield Heading("Path", 3)
        yield from _steps(compiled, steps)


def _formula(compiled: Compiled, call: Call, rule: BoundRule) -> Iterator[Block]:
    wanted = {equation.name for equation in rule.equations}
    wanted |= {name for name, value in compiled.graph.values.items() if value.differentiable}
    lines = [op_text(call.target)]
    for equation in rule.equations:
        if equation.diagram is not None:
            lines.append(diagram_text(equation.name, equation.diagram, {}))
        lines += jacobian_lines(equation, wanted)
    lines += declaration_lines(rule, wanted)
    yield Formulas(tuple(lines))
    drawn = {e.name: e.diagram for e in rule.equations if e.diagram is not None}
    if drawn and sum(len(p.operands) for diagram in drawn.values() for p in diagram.products) <= LARGEST:
        yield Picture(drawn, f"the formula of {op_text(call.target)}")


def _parameter(program: tn.Program, dotted: str) -> Iterator[Block]:
    """For each quantity of a parameter: diagram, assumption, the ways to compute it with polynomials and conditions."""
    compiled = program.compiled
    for item in compiled.derived.items:
        if not isinstance(item, Extraction) or compiled.graph.parameters[item.parameter][0] != dotted:
            continue
        names = dict.fromkeys(key.partition("#")[0] for key in item.diagrams)
        choice = choice_of(compiled, item)
        yield Heading(f"{', '.join(names)} of {dotted} {compiled.graph.values[item.parameter].axes_text}", 3)
        yield Formulas(tuple(algebra_lines(item.diagrams, choice)))
        for name in names:
            found = quantity(program, name, dotted)
            if isinstance(found, Factors):
                yield Words(f"Assumption: {found.assumption}.")
            yield Picture(found, f"{name} of {dotted}")
        yield Formulas(tuple(choice_lines(compiled, item.diagrams, choice)))


def _of(step: Step, calls: list[tuple[Call, BoundRule]], dotted: list[str]) -> bool:
    """Whether a step belongs to a layer: its forward, the cotangents that pass it, the quantities of its parameters."""
    names = {call.output.name for call, _ in calls} | {saved.name for _, rule in calls for saved in rule.saved}
    about = any(call.where in step.note for call, _ in calls)
    return step.name in names or about or step.note.rpartition(" of ")[2] in dotted


def _steps(compiled: Compiled, steps: list[tuple[Step, int]]) -> Iterator[Block]:
    symbols = Symbols()
    rows = []
    for step, times in steps:
        note = step.note if times == 1 else f"{times} × {step.note}"
        rows.append((note.partition(", ")[0], *step_row(compiled, symbols, step)))
    yield Words(f"N = {compiled.plan.batch}; {symbols.legend()}".rstrip("; "))
    yield Grid(("operation", *STEP_HEADER), tuple(rows), frozenset({3, 4, 5}))
