"""What derive hands on: cotangents and results as diagrams, in an order in which they can be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import sympy

from ..approximate import Factors
from ..bind import BoundRule
from ..diagram import Diagram
from .graph import Call
from .roots import LossRoot


@dataclass(frozen=True)
class Native:
    """A VJP in torch code; placeholders are {runtime value name} and {cotangent}."""

    code: str
    cotangent: str
    of: str  # the value whose cotangent that is


@dataclass(frozen=True)
class Backward:
    """The cotangent of `value`, called `name`, is the sum of the terms."""

    name: str
    value: str
    terms: tuple[Diagram | Native, ...]
    note: str


@dataclass(frozen=True)
class Individual:
    """The cotangent of a value made of parameters, one per sample, by native code: [N, *value]."""

    name: str
    of: str
    native: Native


@dataclass(frozen=True)
class Extraction:
    """All quantities of one parameter."""

    parameter: str  # value name
    diagrams: Mapping[str, Diagram]  # by quantity name; factor k of a quantity is "name#k"
    factors: Mapping[str, Factors] = field(default_factory=dict)  # quantities whose values have several factors


Schedule = tuple[Backward | Individual | Extraction, ...]


@dataclass(frozen=True)
class Columns:
    """A sweep that runs once for every column of a root, with `variable` for the column at the model's output."""

    variable: str
    root: LossRoot
    samples: int  # 0: the exact columns
    schedule: Schedule


@dataclass(frozen=True)
class Derived:
    """Everything to compute, in an order in which it can be computed."""

    bound: tuple[tuple[Call, BoundRule], ...]
    schedule: Schedule
    scale: sympy.Expr
    columns: tuple[Columns, ...] = ()

    @property
    def sweeps(self) -> tuple[Schedule, ...]:
        """The schedule of the gradient and of each kind of column."""
        return (self.schedule, *(c.schedule for c in self.columns))

    @property
    def items(self) -> Iterator[Backward | Individual | Extraction]:
        """Every item of every sweep."""
        return chain.from_iterable(self.sweeps)


