"""Memory: the most that a plan holds at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..diagram import Size
from .cost import Kernel, bytes_of, number
from .loops import Loop
from .store import Step

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class Piece:
    """Steps without a loop that lead to some values, as a part of a plan."""

    steps: tuple[Step, ...]
    values: tuple[str, ...]
    shapes: Mapping[str, tuple[Size, ...]]
    batch: int
    itemsize: int
    loops: tuple[Loop, ...] = ()

    @property
    def timed(self) -> Iterator[tuple[Step, int]]:
        """Every step with the number of times that it runs."""
        yield from ((step, 1) for step in self.steps)

    @property
    def kept(self) -> set[str]:
        """The values that it is for."""
        return set(self.values)


def peak_bytes(plan: Plan | Piece) -> float:
    """The peak when every step frees what nobody reads any more, results included, inputs and parameters not.

    A view keeps its base alive and takes nothing; a call takes its own values for as long as it runs.
    """
    steps = [step for step, _ in plan.timed]
    base = {step.name: _base(step, plan) for step in steps}
    last = _last_uses(plan, steps, base)
    totals = {loop.steps[0].name: _totals(loop, plan) for loop in plan.loops if loop.steps}
    held: dict[str, float] = {}
    peak = 0.0
    for k, step in enumerate(steps):
        if step.name in totals:
            held[f"totals of {step.name}"] = totals[step.name]
        if base[step.name] is None:
            held[step.name] = _bytes(step.name, plan)
        inside = plan.itemsize * number(step.work.inside, plan.batch)
        peak = max(peak, sum(held.values()) + inside)
        for name in [name for name in held if last.get(name, len(steps)) == k]:
            del held[name]
    return max(peak, sum(held.values()) + _copied(plan))


def _copied(plan: Plan | Piece) -> float:
    """What the results are that are one value, but for the first: each has memory of its own in the end."""
    results = () if isinstance(plan, Piece) else plan.results.values()
    times = Counter(code for by in results for code in by.values())
    return sum((count - 1) * _bytes(code, plan) for code, count in times.items() if count > 1)


def _last_uses(plan: Plan | Piece, steps: list[Step], base: dict[str, str | None]) -> dict[str, int]:
    """After which step a value is free. What a loop reads from outside lives until its last turn ends."""
    last: dict[str, int] = {}
    for k, step in enumerate(steps):
        for name in (*step.inputs, step.name):
            last[_owner(base, name)] = k
    end = len(plan.steps)
    for loop in plan.loops:
        end += len(loop.steps)
        for name in loop.reads:
            last[_owner(base, name)] = max(end - 1, last.get(_owner(base, name), 0))
        end += len(loop.after)
    return last | {_owner(base, name): len(steps) for name in plan.kept}


def _totals(loop: Loop, plan: Plan | Piece) -> float:
    """What a loop gathers."""
    return sum(_bytes(total, plan) for _, total in loop.outputs)


def _base(step: Step, plan: Plan | Piece) -> str | None:
    """The value whose memory a view reads; None for a value of its own."""
    if step.kernel is not Kernel.VIEW or not step.inputs:
        return None
    return step.inputs[0]


def _owner(base: dict[str, str | None], name: str) -> str:
    while (below := base.get(name)) is not None:
        name = below
    return name


def _bytes(name: str, plan: Plan | Piece) -> float:
    return bytes_of(plan.shapes[name], plan.batch, plan.itemsize)
