"""Explain: every stage as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .arrange import merged
from .cost import number, polynomial, size_at
from .derive import Backward, Native
from .store import Step

if TYPE_CHECKING:
    from . import Compiled


def explain(compiled: Compiled) -> str:
    """The graph, every formula, every diagram, and the plan with its costs."""
    plan = compiled.plan
    sections = [
        ("Graph", [str(compiled.graph)]),
        ("Formulas", _formulas(compiled)),
        ("Diagrams", _diagrams(compiled)),
        ("Choices", _choices(compiled)),
        (f"Plan (N = {plan.batch})", [_table(compiled)]),
        ("Totals", _totals(compiled)),
    ]
    return "\n\n".join(f"{title}\n{'=' * len(title)}\n" + "\n".join(lines) for title, lines in sections)


def _formulas(compiled: Compiled) -> list[str]:
    lines = []
    for call, rule in compiled.derived.bound:
        lines.append(call.where)
        for equation in rule.equations:
            if equation.diagram is not None:
                lines.append(f"  {equation.name}{equation.diagram}")
            lines += [f"  d {equation.name} / d {name}: {j.diagram}" for name, j in equation.jacobians.items()]
        lines += [f"  at a kink: {rule.kinks}"] if rule.kinks else []
    return lines


def _diagrams(compiled: Compiled) -> list[str]:
    lines = []
    for item in compiled.derived.schedule:
        if isinstance(item, Backward):
            for term in item.terms:
                shown = f" by {term.code}" if isinstance(term, Native) else str(term)
                lines.append(f"g_{item.value}{shown}")
        else:
            dotted = compiled.graph.parameters[item.parameter][0]
            lines += [f"{quantity} of {dotted}{diagram}" for quantity, diagram in item.diagrams.items()]
    return lines


def _choices(compiled: Compiled) -> list[str]:
    """For each parameter what was predicted for building the individual gradients or multiplying them out."""
    lines = []
    for choice in compiled.plan.choices:
        options = ", ".join(f"{name}: {1e3 * seconds:.3g} ms" for name, seconds in choice.options)
        lines.append(f"{choice.parameter}: {choice.chosen}  ({options})")
    return lines


def _table(compiled: Compiled) -> str:
    rows = [("value", "kernel", "FLOPs", "bytes", "FLOPs polynomial", "code")]
    plan = compiled.plan
    for step in plan.steps:
        flops, moved = number(step.work.flops, plan.batch), plan.itemsize * number(step.work.moved, plan.batch)
        shown = step.code if len(step.code) < 100 else step.code[:97] + "…"
        formula = str(polynomial(step.work.flops))
        rows.append((step.name, step.kernel.value, f"{flops:.3g}", f"{moved:.3g}", formula, shown))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in rows
    )


def _totals(compiled: Compiled) -> list[str]:
    plan = compiled.plan
    flops = sum(number(s.work.flops, plan.batch) for s in plan.steps)
    moved = plan.itemsize * sum(number(s.work.moved, plan.batch) for s in plan.steps)
    seconds = sum(plan.rates.seconds(s.kernel, s.work, plan.batch, plan.itemsize) for s in plan.steps)
    return [
        f"FLOPs {flops:.4g}, bytes {moved:.4g}, predicted {1e3 * seconds:.3g} ms on {plan.rates.name}",
        f"peak {peak_bytes(compiled):.4g} bytes beside parameters and inputs",
    ]


def peak_bytes(compiled: Compiled) -> float:
    """The most that is alive at once when every step frees what nobody reads any more; views are free."""
    plan = compiled.plan
    last = {name: k for k, step in enumerate(plan.steps) for name in step.inputs}
    results = {code for by in plan.results.values() for code in by.values()}
    alive: dict[str, float] = {}
    peak = 0.0
    for k, step in enumerate(plan.steps):
        alive[step.name] = _bytes(compiled, step)
        peak = max(peak, sum(alive.values()))
        for name in step.inputs:
            if last[name] == k and name not in results:
                alive.pop(name, None)
    return peak


def _bytes(compiled: Compiled, step: Step) -> float:
    shape = compiled.plan.shapes[step.name]
    if step.kernel.value == "view":
        return 0.0
    count = 1
    for size in shape:
        count *= size_at(size, compiled.plan.batch)
    return float(count * compiled.plan.itemsize)


__all__ = ["explain", "merged", "peak_bytes"]
