"""What every stage has made of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ..plan.plan import Plan
from ..program.expr import Value
from ..running.drawing_calls import draws
from ..sweep.derived import Derived
from ..translate.graph import Graph
from .source import Writer


@dataclass(frozen=True)
class Compiled:
    """What every stage produced."""

    graph: Graph
    derived: Derived
    plan: Plan
    source: str
    again: Callable[[int], Compiled] | None = None  # the same for another batch size
    memory_limit: int | None = None
    captured: Graph | None = None  # before anything was asked of it

    @cached_property
    def draws(self) -> bool:
        """Whether a layer draws random numbers: the same samples may then give something else at each call."""
        return any(draws(call.target, call.arguments) for call in self.graph.calls)

    @cached_property
    def texts(self) -> dict[Value, tuple[str, str]]:
        """The name and the expression of every step, for people."""
        return self.writer.texts()

    @cached_property
    def writer(self) -> Writer:
        """What writes its source."""
        return Writer(self.graph, self.plan)
