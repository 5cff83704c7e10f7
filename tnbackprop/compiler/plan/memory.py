"""Memory: the most that a plan holds at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..program.cost import Kernel, bytes_of, number
from ..program.expr import Value
from .loops import Loop

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class Piece:
    """Steps without a loop that lead to some values, as a part of a plan."""

    steps: tuple[Value, ...]
    values: tuple[Value, ...]
    batch: int
    itemsize: int
    loops: tuple[Loop, ...] = ()

    @property
    def timed(self) -> Iterator[tuple[Value, int]]:
        """Every step with the number of times that it runs."""
        yield from ((step, 1) for step in self.steps)

    @property
    def kept(self) -> set[Value]:
        """The values that it is for."""
        return set(self.values)


def peak_bytes(plan: Plan | Piece) -> float:
    """The peak when every step frees what nobody reads any more, results included, inputs and parameters not.

    A view keeps its base alive and takes nothing; a call takes its own values for as long as it runs.
    """
    steps = [step for step, _ in plan.timed]
    last = _last_uses(plan, steps)
    totals = {loop.steps[0]: loop for loop in plan.loops if loop.steps}
    held: dict[Value, float] = {}
    peak = 0.0
    for k, step in enumerate(steps):
        if step in totals:
            held |= {total: _bytes(total, plan) for _, total in totals[step].outputs}
        if _base(step) is None:
            held[step] = _bytes(step, plan)
        inside = plan.itemsize * number(step.work.inside, plan.batch)
        peak = max(peak, sum(held.values()) + inside)
        for value in [value for value in held if last.get(value, len(steps)) == k]:
            del held[value]
    return max(peak, sum(held.values()) + _copied(plan))


def _copied(plan: Plan | Piece) -> float:
    """What the results are that are one value, but for the first: each has memory of its own in the end."""
    results = () if isinstance(plan, Piece) else plan.results.values()
    times = Counter(value for by in results for value in by.values())
    return sum((count - 1) * _bytes(value, plan) for value, count in times.items() if count > 1)


def _last_uses(plan: Plan | Piece, steps: list[Value]) -> dict[Value, int]:
    """After which step a value is free. What a loop reads from outside lives until its last turn ends."""
    last: dict[Value, int] = {}
    for k, step in enumerate(steps):
        for value in (*step.inputs, step):
            last[_owner(value)] = k
    end = len(plan.steps)
    for loop in plan.loops:
        end += len(loop.steps)
        for value in loop.reads:
            last[_owner(value)] = max(end - 1, last.get(_owner(value), 0))
        end += len(loop.after)
    return last | {_owner(value): len(steps) for value in plan.kept}


def _base(value: Value) -> Value | None:
    """The value whose memory a view reads; None for a value of its own."""
    return value.inputs[0] if value.kernel is Kernel.VIEW and value.inputs else None


def _owner(value: Value) -> Value:
    while (below := _base(value)) is not None:
        value = below
    return value


def _bytes(value: Value, plan: Plan | Piece) -> float:
    return bytes_of(value.shape, plan.batch, plan.itemsize)
