"""Sizes: the stages after bind for one batch size, and the plans of a program for a range of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Generic, TypeVar

from ..errors import InvariantError, UnsupportedError
from ..notation.bind import BoundRule
from ..quantities import Quantity
from .emit.compiled import Compiled
from .emit.source import Writer
from .invariants.stage import Stage
from .invariants.table import Context, check
from .lower.candidate import Lowering
from .search import Device, searched
from .sweep.derived import Derived
from .translate.graph import Call, Graph

T = TypeVar("T")

FAR = 4
"""A plan is for batches of less than so many times the samples that it was made for, and more than one so-manieth:
within that range plans for other sizes are faster by a few percent at most."""
PLANNING = 1e-3
"""Seconds that planning takes for each step of the plan, within a factor of a few."""
COMPILING = 4 * PLANNING
"""The same of all of compiling."""
KEPT = 8
"""Plans of a program, the example's among them."""


@dataclass(frozen=True)
class Front:
    """What the stages up to bind have made, and what those after it are told: enough to plan for any batch size."""

    graph: Graph
    bound: tuple[tuple[Call, BoundRule], ...]
    quantities: Sequence[Quantity]
    device: Device
    memory_limit: int | None
    lowerings: Sequence[Lowering]
    title: str
    context: Context

    def planned(self, batch: int, known: Derived | None = None) -> Compiled:
        """Derived, planned and written for a batch size; `known`: what was derived for another one.

        Raises `UnsupportedError` where that does not fit.
        """
        graph = replace(self.graph, example_batch=batch)
        derived, planned = searched(
            graph, self.bound, self.quantities, self.device, self.memory_limit, self.lowerings, known
        )
        check(Stage.DERIVE, derived, self.context)
        check(Stage.PLAN, planned, self.context)
        writer = Writer(graph, planned)
        check(Stage.PROGRAM, writer.program, self.context)
        source = check(Stage.EMIT, writer.source(self.title), self.context)
        again = partial(self.planned, known=known or derived)
        return Compiled(graph, derived, planned, source, again, self.memory_limit)


class Sized(Generic[T]):
    """A plan, and what runs it.

    batch    the size that it was made for
    proved   whether its results are known to be right
    note     why a size has no plan of its own
    """

    def __init__(self, batch: int, compiled: Compiled, loaded: T, proved: bool, note: str = "") -> None:
        self.batch, self.compiled, self.loaded, self.proved, self.note = batch, compiled, loaded, proved, note
        self._within, self._beyond = 0, math.inf  # batches that are known to stay within the memory limit, or not to

    def is_far(self, batch: int) -> bool:
        """Whether another plan may be clearly faster."""
        return not self.batch < FAR * batch < FAR**2 * self.batch

    def fits(self, batch: int) -> bool:
        """Whether so many samples stay within the memory limit."""
        limit = self.compiled.memory_limit
        if limit is None or batch <= self._within:
            return True
        if batch >= self._beyond:
            return False
        within = replace(self.compiled.plan, batch=batch).peak_bytes <= limit
        if within:
            self._within = batch
        else:
            self._beyond = batch
        return within


class Sizes(Generic[T]):
    """The plans of one program. A batch is run by the nearest one that keeps within the memory limit.

    Where that is far away, another plan is made once the batches of about this size are predicted to have taken as long
    as planning takes, at the second one at the earliest: so it never costs more than as much again.
    """

    def __init__(self, compiled: Compiled, load: Callable[[Compiled], T], check: bool) -> None:
        """`check`: what another plan gives is to be compared before it is used."""
        self._load, self._check = load, check
        self._every: tuple[Sized[T], ...] = (Sized(compiled.plan.batch, compiled, load(compiled), True),)
        self._spent: dict[int, tuple[int, float]] = {}  # power of FAR -> how many batches, their predicted seconds
        self._seconds: dict[int, float] = {}  # batch -> what one is predicted to take; a few
        self._lock = Lock()

    def detached(self, compiled: Compiled, loaded: T) -> Sizes[T]:
        """The example's plan alone, with less of what was compiled, and what runs it."""
        return Sizes(compiled, lambda _: loaded, False)

    def suits(self, batch: int) -> bool:
        """Whether there is no need of another program for such batches. Counts this one."""
        near = self._nearest(batch)
        return near is not None and not (near.is_far(batch) and self._is_due(near, batch, COMPILING))

    @property
    def example(self) -> Sized[T]:
        """The plan for the example's batch size."""
        return self._every[0]

    def at(self, batch: int, now: bool = False) -> Sized[T]:
        """The plan for a batch size; `now`: another one is made at once where the nearest is far away.

        Raises `UnsupportedError` where no plan keeps within the memory limit.
        """
        again = self.example.compiled.again
        if again is None:
            return self.example
        near = self._nearest(batch)
        if near is not None and not near.is_far(batch):
            return near
        with self._lock:
            near = self._nearest(batch)  # another thread may have made it meanwhile
            if near is not None and (not near.is_far(batch) or not (now or self._is_due(near, batch, PLANNING))):
                return near
            return self._made(again, near, batch)

    def settle(self, sized: Sized[T], note: str) -> Sized[T]:
        """A plan is used from now on; with a note on why not, the example's takes its place."""
        if not note:
            sized.proved = True
            return sized
        first = self.example
        other = Sized(sized.batch, first.compiled, first.loaded, True, note)
        with self._lock:
            self._every = tuple(other if each is sized else each for each in self._every)
        return other

    def lines(self, replan: bool) -> Iterator[str]:
        """Which sizes have plans of their own, for people."""
        yield f"N = {self.example.batch}, the example's"
        for number, each in enumerate(self._every[1:], start=1):
            others = [other for other in self._every[:number] if other.compiled is each.compiled]
            if each.note:
                yield f"N = {each.batch}: {each.note}"
            elif others:
                yield f"N = {each.batch}: the plan for N = {others[0].batch}"
            else:
                yield f"N = {each.batch}: a plan of its own, {self._gain(each)}"
        if not replan:
            yield "no other plans: replan=False"

    def _gain(self, sized: Sized[T]) -> str:
        there, here = (replace(e.compiled.plan, batch=sized.batch).seconds for e in (self.example, sized))
        return f"{1e3 * here:.3g} ms where that of the example takes {1e3 * there:.3g}, as predicted"

    def _nearest(self, batch: int) -> Sized[T] | None:
        """The plan for the nearest size, of those that keep within the memory limit."""
        found = [each for each in self._every if each.fits(batch)]
        return min(found, key=lambda each: abs(math.log(batch / each.batch)), default=None)

    def _is_due(self, near: Sized[T], batch: int, price: float) -> bool:
        """Whether batches of about this size take long enough for a plan of their own. Counts this one."""
        if batch not in self._seconds:
            if len(self._seconds) >= KEPT:
                self._seconds.clear()
            self._seconds[batch] = replace(near.compiled.plan, batch=batch).seconds
        power = round(math.log(batch / self.example.batch, FAR))
        earlier, spent = self._spent.get(power, (0, 0.0))
        spent += self._seconds[batch]
        self._spent[power] = earlier + 1, spent
        return earlier > 0 and spent > price * sum(1 for _ in near.compiled.plan.timed)

    def _made(self, again: Callable[[int], Compiled], near: Sized[T] | None, batch: int) -> Sized[T]:
        """Another plan; the nearest one in its place where there is none, or it is the same."""
        try:
            sized = self._of(again(batch), batch)
        except (UnsupportedError, InvariantError) as error:  # what compiled goes on running
            if near is None and isinstance(error, UnsupportedError):
                raise _refused(error, batch) from error
            if near is None:
                raise
            sized = Sized(batch, near.compiled, near.loaded, near.proved, str(error).splitlines()[0])
        first, *others = self._every
        self._every = (first, *others[-(KEPT - 2) :], sized)
        return sized

    def _of(self, compiled: Compiled, batch: int) -> Sized[T]:
        for each in self._every:
            if each.compiled.source == compiled.source:
                return Sized(batch, each.compiled, each.loaded, each.proved)
        first = self.example.compiled.plan
        if {k: v.shape for k, v in first.noises.items()} != {k: v.shape for k, v in compiled.plan.noises.items()}:
            raise UnsupportedError("a plan of its own would draw other random numbers")
        return Sized(batch, compiled, self._load(compiled), not self._check)


def _refused(error: UnsupportedError, batch: int) -> UnsupportedError:
    """What is said where no plan keeps within the memory limit."""
    reason = str(error).splitlines()[0]
    return UnsupportedError(
        f"for a batch of {batch} samples {reason}\n  Give fewer samples at a time, or compile with a higher "
        "memory_limit; with replan=False it holds for the example's batch size alone."
    )
