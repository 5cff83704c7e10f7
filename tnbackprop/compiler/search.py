"""Search: over how many columns go at a time, and what goes with them; planning is tried, and the fastest is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..notation.bind import BoundRule
from ..quantities import Quantity
from .between import with_phases
from .derive.derive import derive
from .limits import check_memory, machine_bytes
from .lower.candidate import Lowering
from .lower.table import LOWERINGS
from .plan.plan import Plan, plan
from .plan.samples import separable
from .processor import of_processor
from .program.cost import RATES, Rates
from .program.expr import Rounds
from .sweep.derived import Derived, Extraction, PerSample
from .sweep.roots import LossRoot
from .translate.graph import Call, Graph

WIDER = (4, 8)
CLEARLY = 0.95
"""As many columns are propagated together as the device likes, half as many where that looks faster (they may come out
even), or one of `WIDER` times as many where that looks clearly faster: those take more memory. The gradient joins them
where that looks clearly faster, too: views are not free."""
EVEN = 0.02
"""A share of the time in which columns that are none may take part."""
MANY = 2
"""A sample that has this many times the columns that the device likes may have them all at once."""
WORTH = 1e-3
"""Seconds that a program must take for another way to be tried: planning takes longer."""
SMALL = 2e-2
"""Up to so many seconds the gradient may join the columns: what takes longer has matrices that are large anyway."""


Made = tuple[Derived, Plan]


@dataclass(frozen=True)
class Device:
    """Where a program runs: what it does how fast, the bytes of its floating numbers, and its memory.

    accumulate  the dtype of squares and factors, where that is not the model's
    """

    rates: Rates
    itemsize: int
    machine: int
    accumulate: torch.dtype | None = None

    @classmethod
    def of(cls, model: torch.nn.Module, here: bool = True, accumulate: torch.dtype | None = None) -> Device:
        """That of a model's parameters; `here` where the source runs on this machine: by what this one has."""
        first = next(model.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        itemsize = 4 if first is None else first.dtype.itemsize
        rates = RATES.get(device.type, RATES["cpu"])
        if here and rates.name == "cpu" and itemsize == 4:
            rates = of_processor(rates)
        other = None if first is not None and accumulate == first.dtype else accumulate
        return cls(rates, itemsize, machine_bytes(device), other)


def searched(
    graph: Graph,
    bound: tuple[tuple[Call, BoundRule], ...],
    quantities: Sequence[Quantity],
    device: Device,
    memory_limit: int | None,
    lowerings: Sequence[Lowering] = (),
    known: Derived | None = None,
) -> Made:
    """What is derived and planned for these quantities; `lowerings` are tried with those of the table.

    known   the same for another batch size: what comes between phases is not captured again

    Raises `UnsupportedError` where not even one sample at a time fits the memory.
    """
    rates, itemsize, every = device.rates, device.itemsize, (*LOWERINGS, *lowerings)
    width, *others = _widths(rates, graph.example_batch)
    derived = with_phases(graph, derive(graph, bound, quantities, width), quantities, known)
    check_memory(graph, derived, itemsize, memory_limit or device.machine)

    def derived_for(columns: int, per_sample: PerSample | None = None, joint: bool = False) -> Derived:
        other = derive(graph, bound, quantities, columns, per_sample, joint and not derived.last)
        return with_phases(graph, other, quantities, derived)

    def attempt(columns: int, per_sample: PerSample | None = None, joint: bool = False) -> Made | None:
        plain = columns == width and per_sample is None and not joint
        if joint and not _leaves_room(derived, width):
            return None
        again = derived if plain else derived_for(columns, per_sample, joint)
        possible = separable(again) and joint == any(each.joint for each in again.columns)
        made = plan(graph, again, rates, itemsize, None, every, device.accumulate) if possible else None
        return (again, made) if made is not None else None

    derived, planned = _fastest(width, others, PerSample(MANY * rates.rows, rates.odd), attempt)
    if memory_limit is not None and planned.peak_bytes > memory_limit:
        derived = derived_for(1)
        planned = plan(graph, derived, rates, itemsize, memory_limit, every, device.accumulate)
    return derived, planned


def _leaves_room(derived: Derived, width: int) -> bool:
    """Whether the gradient may go with the columns of a root: it has results, and one more than they are go at once."""
    roots = [each for each in derived.columns if isinstance(each.start, LossRoot)]
    extracted = any(isinstance(item, Extraction) for item in derived.schedule)
    return extracted and any(each.width == each.count < width for each in roots)


def _fewer_may_do(planned: Plan) -> bool:
    """Whether fewer columns at a time may be faster: many of the last round's are none, or a value is large.

    Elsewhere more rounds do the same, and more often.
    """
    loops = [(step, step.expr) for step in planned.steps if isinstance(step.expr, Rounds) and step.expr.of_columns]
    if any(planned.is_large(value) for _, rounds in loops for value in rounds.body.steps):
        return True
    nothing = [
        planned.rates.seconds(step.kernel, step.work, planned.batch, planned.itemsize)
        * (1 - int(rounds.size) / (rounds.count * rounds.width))
        for step, rounds in loops
    ]
    return sum(nothing) > EVEN * planned.seconds


def _widths(rates: Rates, batch: int) -> tuple[int, ...]:
    """How many columns may be propagated together: what the device likes, and what else to try."""
    likes = max(1, rates.rows // batch)
    tried = (likes, max(1, rates.rows // (2 * batch)), *(max(1, times * rates.rows // batch) for times in WIDER))
    return tuple(dict.fromkeys(tried))


def _fastest(width: int, others: Sequence[int], per_sample: PerSample, attempt: Callable[..., Made | None]) -> Made:
    """What is derived and planned for as many columns at a time as looks best, or for one sample after the other."""
    best = attempt(width)
    assert best is not None
    first, likes = best[1], best[1].seconds
    if likes < WORTH:
        return best
    together = attempt(width, joint=True) if likes < SMALL else None
    best = together if together is not None and together[1].seconds < CLEARLY * likes else best
    if not best[1].loops:
        return best
    many = any(int(loop.size) >= per_sample.least for loop in best[1].loops)
    by_sample = attempt(max((width, *others)), per_sample) if many else None
    if by_sample is not None and by_sample[1].seconds < CLEARLY * likes:
        best = by_sample
    for tried in others:
        if tried < width and not _fewer_may_do(first):
            continue
        made = attempt(tried)
        assert made is not None
        better = made[1].seconds < (likes if tried < width else min(CLEARLY * likes, best[1].seconds))
        best = made if better and made[1].seconds < best[1].seconds else best
        if better == (tried < width) or not made[1].loops:  # fewer do, these are too many, or all of them
            break
    return best
