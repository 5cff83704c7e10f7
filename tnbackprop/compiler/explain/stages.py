"""Explain: every stage as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import sympy

from ...diagram.core import BATCH, COLUMN, Diagram, Leg, Part, Product, Tensor, hint_of
from ...diagram.derivatives import differentiate
from ...diagram.simplify import simplify
from ...notation.bind import COTANGENT, BoundRule, Equation
from ..emit.compiled import Compiled
from ..emit.naming import comment
from ..invariants.stage import Stage
from ..plan.choose import Choice
from ..plan.plan import Plan
from ..program.cost import Kernel, bytes_of, number
from ..program.expr import Rounds, Value
from ..program.passes import PASSES
from ..sweep.derived import Backward, Extraction, Formula, Individual, Native, Result, Schedule
from .alternatives import Alternative, Way, alternatives, conditions, part_names, seconds, work_numbers
from .factors import factor_lines
from .phases import hessian_lines, operand_lines, phase_lines
from .polynomials import Symbols, in_batch_text, number_text
from .program import opaque, pass_lines, program_lines
from .text import body_text, diagram_text, legs_text, milliseconds, shortened, size_text, table

CODE_WIDTH = 72
STEP_HEADER = ("value", "kernel", "FLOPs", "bytes", "ms", "FLOPs =", "bytes =", "code")
SMALL = 0.01
"""A parameter whose results take a smaller share of the predicted time gets one line for each."""


def explain(compiled: Compiled, stage: Stage | None = None) -> str:
    """Every stage but the source as text, or one stage. A name of the model is escaped where it would end a line."""
    shown = (stage,) if stage is not None else (Stage.CAPTURE, Stage.BIND, Stage.DERIVE, Stage.PLAN)
    sections = [section for key in shown for section in SECTIONS[key]]
    texts = [
        (title.format(N=compiled.plan.batch), "\n".join(map(comment, lines(compiled)))) for title, lines in sections
    ]
    return "\n\n".join(f"{title}\n{'=' * len(title)}\n{text}" for title, text in texts if text)


def _graph(compiled: Compiled) -> Iterator[str]:
    yield from compiled.graph.rows()


def _formulas(compiled: Compiled) -> Iterator[str]:
    """For each call the formula and the Jacobians with respect to what depends on a parameter."""
    graph = compiled.graph
    for call, rule in compiled.derived.bound:
        yield call.where
        inner = {equation.name for equation in rule.equations}
        wanted = inner | {name for name, value in graph.values.items() if value.differentiable}
        for equation in rule.equations:
            if equation.diagram is not None:
                yield f"  {diagram_text(equation.name, equation.diagram, {})}"
            yield from jacobian_lines(equation, wanted)
        yield from declaration_lines(rule, wanted)


def jacobian_lines(equation: Equation, wanted: set[str]) -> Iterator[str]:
    for name in sorted(wanted):
        jacobian = equation.jacobians.get(name)
        how = "declared"
        if jacobian is None and equation.diagram is not None:
            jacobian, how = differentiate(equation.diagram, name), "derived"
        if jacobian is not None:
            left = f"∂{hint_of(equation.name)}[{legs_text(jacobian.out)}]/∂{hint_of(name)}[{legs_text(jacobian.into)}]"
            yield f"    {left} = {body_text(jacobian.diagram, {})}" + ("" if how == "derived" else f"  ({how})")


def declaration_lines(rule: BoundRule, wanted: set[str]) -> Iterator[str]:
    if rule.fallback and not rule.forward:
        yield "    no rule: VJPs by torch.func"
    elif rule.fallback:
        yield f"    no formula: {shortened(rule.forward.filled(hint_of), 2 * CODE_WIDTH)}"
    for name in sorted(rule.looped & wanted):
        yield f"    in a loop for {name}: torch.func.vmap gives other numbers, or knows no such derivative"
    for saved in rule.saved:
        yield f"    saved {hint_of(saved.name)} = {saved.code.filled(hint_of)}"
    for name, code in rule.vjp.items() if rule.forward or not rule.fallback else ():
        if name in wanted:
            yield f"    native VJP to {name}: {shortened(code.filled(hint_of), 2 * CODE_WIDTH)}"
    for code in [*rule.backward.values()][:1]:
        names = ", ".join(map(hint_of, rule.backward))
        yield f"    one kernel for {names}: {shortened(code.filled(hint_of), 2 * CODE_WIDTH)}"
    if rule.kinks:
        yield f"    at a kink: {rule.kinks}"


def _schedules(compiled: Compiled) -> Iterator[tuple[str, Schedule]]:
    """Every sweep, with what is said above it."""
    yield "", compiled.derived.schedule
    for columns in compiled.derived.columns:
        each = "" if isinstance(columns.start, Formula) else f"for each column {hint_of(columns.variable)} of "
        yield f"{each}{columns}:", columns.schedule


def choice_of(compiled: Compiled, item: Extraction) -> Choice:
    """The choice that was made for this extraction."""
    return next(choice for choice in compiled.plan.choices if choice.item is item)


def _diagrams(compiled: Compiled) -> Iterator[str]:
    """The cotangents in the order of the sweep, and each quantity as its algebra gave it."""
    yield from operand_lines(compiled)
    for title, schedule in _schedules(compiled):
        yield from (title,) if title else ()
        yield from hessian_lines(compiled, schedule)
        for item in schedule:
            match item:
                case Backward():
                    yield from _cotangents(item)
                case Individual():
                    yield _cotangent(item.name, item.native)
                case Extraction():
                    dotted = compiled.graph.parameters[item.parameter][0]
                    yield f"{dotted} {compiled.graph.values[item.parameter].axes_text}"
                    yield from (f"  {line}" for line in algebra_lines(compiled, item))
                    yield from (f"  {_cotangent('gradient', each)}" for each in [item.native] if each)
                    yield from (f"  Assumption of {name}: {f.assumption}" for name, f in item.factors.items())
    yield from phase_lines(compiled)


def cotangent_lines(compiled: Compiled, values: set[str]) -> Iterator[str]:
    """The cotangents of some values, in every sweep."""
    for item in compiled.derived.items:
        if isinstance(item, Backward) and item.value in values:
            yield from _cotangents(item)


def _cotangents(item: Backward) -> Iterator[str]:
    """One line for each reader of the value."""
    for k, term in enumerate(item.terms):
        yield _cotangent(item.name, term, "+=" if k else "=")
    if item.condensed is not None:  # the same, where the planner finds that cheaper
        yield f"  → {body_text(item.condensed, {})}"


def _cotangent(name: str, term: Diagram | Native, equals: str = "=") -> str:
    if isinstance(term, Native):
        code = term.code.filled(lambda hole: hint_of(term.cotangent if hole == COTANGENT else hole))
        return f"{hint_of(name)} {equals} {shortened(code, 2 * CODE_WIDTH)}  (native)"
    return f"{hint_of(name)}[{legs_text(term.legs)}] {equals} {body_text(term, {})}"


def pulled_back(compiled: Compiled, item: Extraction) -> Iterator[Diagram]:
    """Jᵀ g of each use of the parameter as the Jacobian gives it, before anything is simplified."""
    swept = [(compiled.derived.schedule, ()), *((c.schedule, c.carried) for c in compiled.derived.columns)]
    schedule, lead = next((s, legs) for s, legs in swept if any(item is each for each in s))
    names = {each.value: each.name for each in schedule if isinstance(each, Backward)}
    for _, rule in compiled.derived.bound:
        for equation in rule.equations:
            jacobian = equation.jacobians.get(item.parameter)
            if jacobian is None and equation.diagram is not None:
                jacobian = differentiate(equation.diagram, item.parameter)
            if jacobian is not None and equation.name in names:
                g = Tensor(names[equation.name], (*lead, *jacobian.out))
                terms = tuple(Product(p.scale, (*p.operands, g)) for p in jacobian.diagram.products)
                yield Diagram((*lead, BATCH, *jacobian.into), terms)


def block(compiled: Compiled, item: Extraction) -> Diagram | None:
    """What factors approximate, (Jᵀ s)(Jᵀ s)ᵀ with the legs of the parameter twice; None where it has several uses."""
    uses = [simplify(each) for each in pulled_back(compiled, item)]
    if len(uses) != 1:
        return None
    (half,) = uses
    taken = {leg.name for product in half.products for leg in product.legs}
    plain = {leg: Leg(leg.name.rstrip("'"), leg.size) for leg in half.legs if leg.name.rstrip("'") not in taken}
    half = half.rename(plain)
    own = [leg for leg in half.legs if leg != BATCH and leg.name != COLUMN]
    copies = {leg: Leg(f"{leg.name}'", leg.size) for leg in own}
    halves = Part(half, half.legs), Part(half, tuple(copies.get(leg, leg) for leg in half.legs))
    return Diagram((*own, *copies.values()), (Product(sympy.Integer(1), halves),))


def rewritten(compiled: Compiled, item: Extraction) -> dict[Result, tuple[Alternative, ...]]:
    """For each quantity the ways that are other diagrams than its own: multiplied out, or what was chosen."""
    found = {} if item.streams else alternatives(item.diagrams, choice_of(compiled, item))
    return {
        q: tuple(w for w in ways if w.diagram != item.diagrams[q] and (w.chosen or w.way is not Way.EXPLICIT))
        for q, ways in found.items()
    }


def algebra_lines(compiled: Compiled, item: Extraction) -> Iterator[str]:
    """What the quantities are: Jᵀ g, the parts, each quantity, and what it becomes where it is multiplied out."""
    if item.streams:
        yield from (diagram_text(f"{q}, a few samples at a time", d, {}) for q, d in item.diagrams.items())
        return
    choice = choice_of(compiled, item)
    names, shown = part_names(item.diagrams, choice), set[str]()
    yield from (diagram_text("Jᵀg", diagram, {}) for diagram in pulled_back(compiled, item))
    for part, name in names.items():
        if name not in shown:
            shown.add(name)
            yield diagram_text(name, part, {k: v for k, v in names.items() if v != name})
    for quantity, ways in rewritten(compiled, item).items():
        yield diagram_text(str(quantity), item.diagrams[quantity], names)
        for way in ways:
            label = f"{way.way.value}{', chosen' * way.chosen}"
            yield f"  → {body_text(way.diagram, names)}  ({label})"


def _choices(compiled: Compiled) -> Iterator[str]:
    """For each parameter and quantity: what it was computed from, and what the alternatives would have cost."""
    yield "ms and FLOPs are those of the quantity alone; what is built once serves all quantities of the parameter."
    for title, schedule in _schedules(compiled):
        yield from ("", title) if title else ()
        for item in schedule:
            if isinstance(item, Extraction):
                yield ""
                yield from choice_lines(compiled, item)


IN_SLICES = "torch code on slices of it, a few samples at a time"
ONE_KERNEL = "from the kernel that pulls back to the input"


def choice_lines(compiled: Compiled, item: Extraction) -> Iterator[str]:
    """The ways to compute the quantities of a parameter, with what they cost."""
    if item.streams or item.native:
        dotted, how = compiled.graph.parameters[item.parameter][0], ONE_KERNEL if item.native else IN_SLICES
        yield from (f"{dotted}   {q}: {how}" for q in item.quantities)
        return
    diagrams, choice = item.diagrams, choice_of(compiled, item)
    plan, names, symbols = compiled.plan, part_names(diagrams, choice), Symbols()
    whole = seconds(tuple(step for step, _ in plan.timed), plan.rates, plan.batch, plan.itemsize)
    small = max(option.seconds for option in choice.options) < SMALL * whole
    blocks = []
    for quantity, ways in alternatives(diagrams, choice).items():
        if not ways[0].steps:
            blocks.append(f"  {quantity}: computed already, for another result")
            continue
        if small:
            blocks.append(f"  {quantity}: " + "; ".join("  ".join(_way_row(compiled, symbols, way)) for way in ways))
            continue
        blocks.append(
            f"  {quantity}: {ways[0].way.value}" + (f", reads {', '.join(ways[0].reads)}" if ways[0].reads else "")
        )
        blocks.append(f"    {diagram_text(str(quantity), ways[0].diagram, names)}")
        if len({work_numbers(way, plan) for way in ways}) == 1:
            ways = ways[:1]
        blocks += table([_way_row(compiled, symbols, way) for way in ways], "    ", frozenset({1, 2}))
        blocks += [f"    {text}" for text in conditions(plan, symbols, ways)]
    built = [names[part] for part in choice.found if part in choice.chosen.kept]
    yield f"{choice.parameter}   N={plan.batch} {symbols.legend()}"
    if len(choice.options) > 1:
        yield f"  all quantities together: {_together(choice, names)}; built: {', '.join(built) or 'nothing'}"
    yield from blocks


def _together(choice: Choice, names: Mapping[Diagram, str]) -> str:
    shown = []
    for option in (o for o in choice.options if o.free):
        what = " and ".join(names[part] for part in choice.found if part in option.kept)
        shown.append(f"{'build ' + what if what else 'build nothing'} {milliseconds(option.seconds)}")
    return ", ".join(shown)


def _way_row(compiled: Compiled, symbols: Symbols, way: Alternative) -> tuple[str, ...]:
    plan = compiled.plan
    time, flops = work_numbers(way, plan)
    label = f"{way.way.value}{' of ' + ', '.join(way.reads) if way.reads else ''}{' (chosen)' if way.chosen else ''}"
    formula = symbols.text(symbols.polynomial(way.flops), plan.batch)
    return label, milliseconds(time), f"{number_text(flops)} FLOPs", f"= {formula}"


def _path(compiled: Compiled) -> Iterator[str]:
    """Every step, grouped by what it is for."""
    groups: list[tuple[str, list[Value]]] = []
    for step, note in _noted(compiled.plan):
        if not groups or groups[-1][0] != note:
            groups.append((note, []))
        groups[-1][1].append(step)
    rows: list[tuple[str, ...]] = [STEP_HEADER]
    heads = {}
    for note, steps in groups:
        symbols = Symbols()
        own = [step_row(compiled, symbols, step) for step in steps]
        heads[len(rows)] = f"{note}   {symbols.legend()}".rstrip()
        rows += own
    for k, line in enumerate(table(rows, "  ", frozenset({2, 3, 4}))):
        if k in heads:
            yield heads[k]
        yield line


def _noted(plan: Plan) -> Iterator[tuple[Value, str]]:
    """Every step and what it is for; after a call for each sample the steps of that, with the work of all samples."""
    for step, times in plan.timed:
        yield step, step.note if times == 1 else f"{times} × {step.note}"
        if step.kernel is Kernel.PER_SAMPLE and isinstance(step.expr, Rounds):
            yield from ((inner, f"N × {inner.note}") for inner in step.expr.body.steps)


def step_row(compiled: Compiled, symbols: Symbols, step: Value) -> tuple[str, ...]:
    plan = compiled.plan
    flops, moved = number(step.work.flops, plan.batch), plan.itemsize * number(step.work.moved, plan.batch)
    time = 1e3 * plan.rates.seconds(step.kernel, step.work, plan.batch, plan.itemsize)
    shown = [
        symbols.text(scale * symbols.polynomial(terms), plan.batch)
        for scale, terms in ((1, step.work.flops), (plan.itemsize, step.work.moved))
    ]
    numbers = (number_text(flops), number_text(moved), f"{time:.3f}")
    name, code = compiled.texts[step]
    return name, step.kernel.value, *numbers, *shown, shortened(code, CODE_WIDTH)


def _kept(compiled: Compiled) -> Iterator[str]:
    rows, together = kept_rows(compiled)
    yield from table(rows, "  ", frozenset({2}))
    yield f"  together {together}"


def kept_rows(compiled: Compiled) -> tuple[list[tuple[str, ...]], str]:
    """The forward values that a later step reads: derived from the diagrams, not declared. And their bytes together."""
    plan = compiled.plan
    forward = {value: name for name, value in reversed(list(plan.forward.items()))}
    readers: dict[str, list[str]] = {}
    for step, _ in plan.timed:
        for value in step.inputs if step not in forward else ():
            if value in forward and step.note not in readers.setdefault(forward[value], []):
                readers[forward[value]].append(step.note)
    unknown = opaque(compiled)
    taken = {name: _bytes(compiled, name) for name in readers if name not in unknown}
    rows: list[tuple[str, ...]] = []
    for name, notes in readers.items():
        shape, size = "[" + ", ".join(map(str, plan.forward[name].shape)) + "]", size_text(taken.get(name, 0.0))
        shape, size = ("?", "?") if name in unknown else (shape, size)
        more = f" and {len(notes) - 2} more" if len(notes) > 2 else ""
        rows.append((hint_of(name), shape, size, "for " + ", ".join(n.split(", ")[0] for n in notes[:2]) + more))
    count = len(readers) - len(taken)
    return rows, size_text(sum(taken.values())) + f", and {count} of unknown shape" * bool(count)


def _bytes(compiled: Compiled, name: str) -> float:
    """At the item size of the value where the graph knows it, else of the parameters."""
    value = compiled.graph.values.get(name)
    itemsize = value.dtype.itemsize if value is not None else compiled.plan.itemsize
    return bytes_of(compiled.plan.forward[name].shape, compiled.plan.batch, itemsize)


def _totals(compiled: Compiled) -> Iterator[str]:
    yield from table(total_rows(compiled), "  ", frozenset({1, 2, 3, 4}))
    yield f"  {peak_text(compiled)}"


def peak_text(compiled: Compiled) -> str:
    plan = compiled.plan
    return f"peak {size_text(plan.peak_bytes)} without parameters and inputs; predictions for {plan.rates.name}"


def total_rows(compiled: Compiled) -> list[tuple[str, ...]]:
    """Forward, backward and quantities; their sums are `program.flops` and `program.bytes`."""
    plan, forward = compiled.plan, set(compiled.plan.forward.values())
    groups: dict[str, list[Value]] = {"forward": [], "backward": [], "quantities": []}
    for step in (step for step, times in plan.timed for _ in range(times)):
        backward = "backward" if step.note.startswith("cotangent of") else "quantities"
        groups["forward" if step in forward else backward].append(step)
    rows: list[tuple[str, ...]] = [("", "steps", "FLOPs", "bytes", "predicted", "in N")]
    groups["together"] = [step for some in groups.values() for step in some]
    for name, steps in groups.items():
        flops = tuple(term for step in steps for term in step.work.flops)
        moved = tuple(term for step in steps for term in step.work.moved)
        numbers = (f"{number(flops, plan.batch):.4g}", f"{plan.itemsize * number(moved, plan.batch):.4g}")
        time = milliseconds(seconds(tuple(steps), plan.rates, plan.batch, plan.itemsize))
        polynomials = f"{in_batch_text(flops)} FLOPs; {in_batch_text(moved, plan.itemsize)} bytes"
        rows.append((name, str(len(steps)), *numbers, time, polynomials))
    return rows


def _source(compiled: Compiled) -> Iterator[str]:
    yield from compiled.source.split("\n")


Section = tuple[str, Callable[["Compiled"], Iterator[str]]]

SECTIONS: Mapping[Stage, tuple[Section, ...]] = {
    Stage.CAPTURE: (("Graph", _graph),),
    Stage.BIND: (("Formulas and Jacobians", _formulas),),
    Stage.DERIVE: (("Diagrams", _diagrams), ("Kronecker factors", factor_lines)),
    Stage.PLAN: (
        ("Choices", _choices),
        ("Path (N = {N})", _path),
        ("Kept from the forward", _kept),
        ("Totals (N = {N})", _totals),
    ),
    Stage.PROGRAM: (
        ("Program", program_lines),
        *((f"Pass: {each.name}", partial(pass_lines, each)) for each in PASSES),
    ),
    Stage.EMIT: (("Source", _source),),
}
"""What is shown of each stage."""
