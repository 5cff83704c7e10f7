"""Memory: the most that a plan holds at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cost import Kernel, number, size_at
from .store import Step

if TYPE_CHECKING:
    from .plan import Plan


def peak_bytes(plan: Plan) -> float:
    """The peak when every step frees what nobody reads any more, results included, inputs and parameters not.

    A view keeps its base alive and takes nothing; a slice takes its own values for as long as it runs.
    """
    base = {step.name: _base(step, plan) for step in plan.steps}
    kept = {code for by in plan.results.values() for code in by.values()} | set(plan.output.values()) | {plan.loss}
    last: dict[str, int] = {}
    for k, step in enumerate(plan.steps):
        for name in (*step.inputs, step.name):
            last[_owner(base, name)] = k
    for result in kept:
        if result is not None:
            last[_owner(base, result)] = len(plan.steps)
    held: dict[str, float] = {}
    peak = 0.0
    for k, step in enumerate(plan.steps):
        if base[step.name] is None:
            held[step.name] = _bytes(step, plan)
        inside = plan.itemsize * number(step.work.fresh, plan.batch) if step.kernel is Kernel.SLICED else 0.0
        peak = max(peak, sum(held.values()) + inside)
        for name in [name for name in held if last[name] == k]:
            del held[name]
    return peak


def _base(step: Step, plan: Plan) -> str | None:
    """The value whose memory a view reads; None for a value of its own."""
    if step.kernel is not Kernel.VIEW or not step.inputs:
        return None
    return step.inputs[0]


def _owner(base: dict[str, str | None], name: str) -> str:
    while (below := base.get(name)) is not None:
        name = below
    return name


def _bytes(step: Step, plan: Plan) -> float:
    total = float(plan.itemsize)
    for size in plan.shapes[step.name]:
        total *= size_at(size, plan.batch)
    return total
