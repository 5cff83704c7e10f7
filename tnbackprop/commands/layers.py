"""What a program does, layer by layer, as blocks of a document. The text is that of `program.explain()`."""

from __future__ import annotations

from collections.abc import Iterator

import tnbackprop as tn

from ..compiler import Compiled
from ..compiler.emit.naming import comment
from ..compiler.explain.phases import operand_lines, phase_lines
from ..compiler.explain.polynomials import Symbols
from ..compiler.explain.stages import (
    STEP_HEADER,
    algebra_lines,
    block,
    choice_lines,
    cotangent_lines,
    declaration_lines,
    jacobian_lines,
    kept_rows,
    peak_text,
    rewritten,
    step_row,
    total_rows,
)
from ..compiler.explain.text import diagram_text
from ..compiler.program.expr import Value
from ..compiler.sweep.derived import Extraction, Result
from ..compiler.translate.graph import Call, op_text
from ..diagram.algebra import inline
from ..diagram.core import Diagram
from ..notation.bind import BoundRule
from .document import Block, Formulas, Grid, Heading, Picture, Words

MOST, LARGEST = 5, 16
"""Operands of a product, and of all together, in a picture: with more of them nobody sees anything."""


def document(program: tn.Program, title: str) -> Iterator[Block]:
    """The model, every layer, what is kept, and the totals."""
    compiled = program.compiled
    graph, batch = compiled.graph, compiled.plan.batch
    yield Heading(title)
    yield Words(f"{', '.join(program.quantities) or 'no quantity'} at N = {batch}; {len(graph.calls)} calls.")
    yield from _model(program)
    told: set[Value] = set()
    for path in dict.fromkeys(call.path for call, _ in compiled.derived.bound):
        yield from _layer(program, path, told)
    yield from _besides(compiled)
    others = [(step, times) for step, times in compiled.plan.timed if step not in told]
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
    yield Heading("Check", 2)
    yield Formulas(tuple(map(comment, program.checked.split("\n"))))


def _model(program: tn.Program) -> Iterator[Block]:
    """The captured calls as a table and as a picture, and what is propagated back through them."""
    compiled = program.compiled
    rows = tuple(
        (
            call.path,
            op_text(call.target),
            call.output.name,
            call.output.axes_text,
            ", ".join(v.name for v in call.tensors.values()),
        )
        for call in compiled.graph.calls
    )
    yield Grid(("module", "operation", "value", "shape", "reads"), rows)
    yield Picture(program, "the captured model")
    if compiled.derived.columns:
        swept = tuple((f"s{columns.number}_…", str(columns)) for columns in compiled.derived.columns)
        yield Grid(("cotangents", "columns of"), (("g_…", "the gradient"), *swept))


def _besides(compiled: Compiled) -> Iterator[Block]:
    """What quantities read besides the model: operands, and what is computed between phases."""
    operands, phases = tuple(operand_lines(compiled)), tuple(phase_lines(compiled))
    if operands:
        yield Heading("Handed in at the call", 2)
        yield Formulas(operands)
    if phases:
        yield Heading("Between phases", 2)
        yield Formulas(phases)


def _layer(program: tn.Program, path: str, told: set[Value]) -> Iterator[Block]:
    compiled = program.compiled
    calls = [(call, rule) for call, rule in compiled.derived.bound if call.path == path]
    kinds = ", ".join(dict.fromkeys(call.module_type or op_text(call.target) for call, _ in calls))
    yield Heading(f"{path or 'the model'}: {kinds}", 2)
    for call, rule in calls:
        yield from _formula(compiled, call, rule)
    cotangents = tuple(cotangent_lines(compiled, {e.name for _, rule in calls for e in rule.equations}))
    if cotangents:
        yield Formulas(cotangents)
    mine = {value.name for call, _ in calls for value in call.tensors.values()} & set(compiled.graph.parameters)
    dotted = [compiled.graph.parameters[name][0] for name in compiled.graph.parameters if name in mine]
    for name in dotted:
        yield from _parameter(program, name)
    left = [(step, times) for step, times in compiled.plan.timed if step not in told]
    steps = [(step, times) for step, times in left if _of(compiled, step, calls, dotted)]
    told.update(step for step, _ in steps)
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
    drawn = {e.name: e.diagram for e in rule.equations if e.diagram is not None and _drawable(e.diagram)}
    if drawn:
        yield Picture(drawn, f"the formula of {op_text(call.target)}")


def _parameter(program: tn.Program, dotted: str) -> Iterator[Block]:
    """For each quantity of a parameter: diagram, assumption, the ways to compute it with polynomials and conditions."""
    compiled = program.compiled
    swept = [(compiled.derived.schedule, ""), *((c.schedule, f"For {c}.") for c in compiled.derived.columns)]
    for item, sweep in ((item, sweep) for schedule, sweep in swept for item in schedule):
        if not isinstance(item, Extraction) or compiled.graph.parameters[item.parameter][0] != dotted:
            continue
        names = item.quantities
        yield Heading(f"{', '.join(names)} of {dotted} {compiled.graph.values[item.parameter].axes_text}", 3)
        if sweep:
            yield Words(sweep)
        yield Formulas(tuple(algebra_lines(compiled, item)))
        for name in names:
            yield from _rewritten(compiled, item, name, dotted)
        yield Formulas(tuple(choice_lines(compiled, item)))


def _rewritten(compiled: Compiled, item: Extraction, name: str, dotted: str) -> Iterator[Block]:
    """A quantity before and after: multiplied out, or cut into factors."""
    if name in item.factors:
        factors = item.factors[name]
        yield Words(f"Assumption of {name}: {factors.assumption}.")
        whole = block(compiled, item)
        before = (whole,) if whole is not None and _drawable(whole) else ()
        yield Picture((*before, factors), f"{name} of {dotted}" + ": the block, and its factors" * len(before))
    elif _drawable(whole := item.diagrams[Result(name)]):
        after = tuple(way.diagram for way in rewritten(compiled, item)[Result(name)] if _drawable(way.diagram))
        yield Picture((whole, *after), f"{name} of {dotted}" + ", multiplied out" * bool(after))


def _drawable(diagram: Diagram) -> bool:
    """Whether a person would see anything: not too much in one piece, and not too many pieces."""
    sizes = [len(product.operands) for product in diagram.products]
    inner = sum(len(product.operands) for product in inline(diagram).products)
    return max(sizes, default=0) <= MOST and inner <= LARGEST


def _of(compiled: Compiled, step: Value, calls: list[tuple[Call, BoundRule]], dotted: list[str]) -> bool:
    """Whether a step belongs to a layer: its forward, the cotangents that pass it, the quantities of its parameters."""
    names = {call.output.name for call, _ in calls} | {saved.name for _, rule in calls for saved in rule.saved}
    forward = {compiled.plan.forward[name] for name in names}
    about = any(call.where in step.note for call, _ in calls)
    return step in forward or about or step.note.rpartition(" of ")[2] in dotted


def _steps(compiled: Compiled, steps: list[tuple[Value, int]]) -> Iterator[Block]:
    symbols = Symbols()
    rows = []
    for step, times in steps:
        note = step.note if times == 1 else f"{times} × {step.note}"
        rows.append((note.partition(", ")[0], *step_row(compiled, symbols, step)))
    yield Words(f"N = {compiled.plan.batch}; {symbols.legend()}".rstrip("; "))
    yield Grid(("operation", *STEP_HEADER), tuple(rows), frozenset({3, 4, 5}))
