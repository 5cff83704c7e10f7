"""What derive hands on: cotangents and results as diagrams, in an order in which they can be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor

from ...diagram.canonical import key
from ...diagram.core import COLUMN, Diagram, Leg, Size, hint_of
from ...diagram.reading import Reading
from ...notation.bind import BoundRule
from ...notation.code import Native as Vjp
from ...quantities import Handed
from ...quantities.factors import Factors
from ..translate.graph import Call
from ..translate.graph import Value as Made
from .roots import LossRoot


@dataclass(frozen=True)
class Native:
    """A native VJP; it reads runtime values and the cotangent."""

    code: Vjp
    cotangent: str
    of: str  # the value whose cotangent that is
    formula: Diagram | None = None  # the same as a diagram, where the rule selects


@dataclass(frozen=True)
class Joint:
    """A kernel that gives the gradient of a parameter, and with it what is propagated to an operand with samples."""

    gradient: Native
    read: str  # what the parameter's gradient is a sum of without it
    alone: bool = False  # it is all there is, and what is propagated is from it anyway
    operand: str = ""
    since: int = 0  # the number of the first of the operand's terms in whose place that is
    pulled: Native | None = None


@dataclass(frozen=True)
class Backward:
    """The cotangent of `value`, called `name`, is the sum of the terms."""

    name: str
    value: str
    terms: tuple[Diagram | Native, ...]
    note: str
    condensed: Diagram | None = None  # the only term, from the cotangent before a selection
    matrix_of: str = ""  # the value whose averaged matrix it is; it is no cotangent then


@dataclass(frozen=True)
class Individual:
    """The cotangent of a value made of parameters, one per sample, by native code: [N, *value]."""

    name: str
    of: str
    native: Native


@dataclass(frozen=True)
class Result:
    """What is computed of a parameter for a quantity: its value, factor k of it, or the mean of that factor's input."""

    quantity: str
    factor: int | None = None
    mean: bool = False

    def __str__(self) -> str:
        return self.quantity if self.factor is None else f"{self.quantity}#{'mean' * self.mean}{self.factor}"


@dataclass(frozen=True)
class Extraction:
    """All quantities of one parameter."""

    parameter: str  # value name
    diagrams: Mapping[Result, Diagram]
    factors: Mapping[str, Factors] = field(default_factory=dict)  # quantities whose values have several factors
    condensed: Mapping[Result, Diagram] = field(default_factory=dict)  # the same from cotangents before a selection
    groups: Mapping[str, str] = field(default_factory=dict)  # of quantities that are summed over parameters, its group
    streams: Mapping[str, Any] = field(default_factory=dict)  # torch code on slices of a quantity's diagram
    level: int = 0  # the phase in which it is extracted
    own: frozenset[Leg] = frozenset()  # legs of operands that are no axes of the parameter
    carriers: frozenset[str] = frozenset()  # the values that carry what is propagated
    native: Native | None = None  # where all of them are its gradient: from the kernel that pulls back to the input

    @property
    def quantities(self) -> tuple[str, ...]:
        """The quantities, each once."""
        return tuple(dict.fromkeys(result.quantity for result in self.diagrams))


Schedule = tuple[Backward | Individual | Extraction, ...]


def by_level(schedule: Schedule, levels: Mapping[str, int]) -> Schedule:
    """The schedule, with what is extracted in other phases (by quantity) as extractions of their own."""
    found: list[Backward | Individual | Extraction] = []
    for item in schedule:
        if isinstance(item, Extraction) and any(levels.get(q, 0) or q in item.streams for q in item.quantities):
            kinds = sorted({(levels.get(q, 0), q in item.streams) for q in item.quantities})
            found += [_of_level(item, level, stream, levels) for level, stream in kinds]
        else:
            found.append(item)
    return tuple(found)


def _of_level(item: Extraction, level: int, stream: bool, levels: Mapping[str, int]) -> Extraction:
    def mine(by: Mapping[Result, Diagram]) -> dict[Result, Diagram]:
        own = (level, stream)
        return {q: d for q, d in by.items() if (levels.get(q.quantity, 0), q.quantity in item.streams) == own}

    streams = {q: each for q, each in item.streams.items() if stream and levels.get(q, 0) == level}
    factors = {q: each for q, each in item.factors.items() if levels.get(q, 0) == level and not stream}
    return replace(
        item, diagrams=mine(item.diagrams), factors=factors, condensed=mine(item.condensed), level=level,
        streams=streams, native=None if level or stream else item.native,
    )


@dataclass(frozen=True)
class Noise:
    """A random input of uniform numbers in [0, 1), with these legs."""

    name: str
    legs: tuple[Leg, ...]


@dataclass(frozen=True)
class PerSample:
    """Sweeps of at least so many columns go sample by sample, each filled up to a multiple of `even`."""

    least: int
    even: int


@dataclass(frozen=True)
class Columns:
    """A sweep that runs once for every `width` columns, with `variable` for them at the value where they start.

    A single column has no leg of its own; several are the leg `lead`, in front of all others.
    """

    number: int  # of the sweep
    variable: str
    start: LossRoot | Basis | Given | Formula
    samples: int  # 0: the exact columns
    legs: tuple[Leg, ...]  # of the variable
    schedule: Schedule
    width: Size = 1
    made: int = 0  # so many are made of them where they start (1: without a leg), and carried; 0: they are themselves
    until: str = ""  # the value where they go on together with later ones
    per_sample: bool = False  # all those of a sample together, one sample after the other
    joint: int = 0  # after so many items of its sweep the gradient may be propagated with them
    noises: tuple[Noise, ...] = ()  # what its start draws

    def __str__(self) -> str:
        ways = ((self.per_sample, ", sample by sample"), (self.joint, ", jointly with the gradient"))
        return self._what + "".join(text for chosen, text in ways if chosen)

    @property
    def _what(self) -> str:
        if isinstance(self.start, Given):
            return f"{hint_of(self.variable)}, handed in at {self.start.value}"
        if isinstance(self.start, Formula):
            return f"what is propagated from {self.start.value}"
        if isinstance(self.start, Basis):
            weighted = "" if self.start.weight is None else ", weighted"
            others = f", and {self.start.columns - self.start.own} that arrive there" if self.start.arriving else ""
            return f"the {self.start.own} one-hot columns at {self.start.value}{weighted}{others}"
        if isinstance(self.start, LossRoot) and self.start.labels is not None:
            return f"the gradients of {self.samples} labels at {self.start.value}, drawn by {self.start.labels.by}"
        which = f"{self.samples} sampled" if self.samples else "all"
        return f"the root at {self.start.value}, {which}"

    @property
    def count(self) -> Size:
        """How many columns there are."""
        return self.samples or self.start.columns

    @property
    def looped(self) -> bool:
        """Whether they are propagated in several rounds."""
        return bool(self.width != self.count) or self.per_sample

    @property
    def rounds(self) -> int:
        """How many; the last one may be filled up."""
        return -(-int(self.count) // int(self.width))

    @property
    def lead(self) -> tuple[Leg, ...]:
        return column_leg(self.width)

    @property
    def carried(self) -> tuple[Leg, ...]:
        """The leg of columns that the sweep's cotangents have."""
        return column_leg(self.made) if self.made else self.lead

    @property
    def noise(self) -> str:
        """The random input that its columns are drawn from."""
        return f"noise:{self.number}"

    @property
    def draw(self) -> str:
        """The noise of one round."""
        return f"draw:{self.number}"

    @property
    def weighted(self) -> bool:
        """Whether each column has a weight for each sample."""
        match self.start:
            case LossRoot(signed=signed):
                return signed
            case Basis(weight=weight):
                return weight is not None
        return False

    @property
    def weight(self) -> str:
        """The variable of the columns' weights."""
        if isinstance(self.start, Given):
            return self.start.handed.values[1] if self.start.handed.weights else ""
        return f"weight:{self.number}"


@dataclass(frozen=True)
class Given:
    """Columns (as many as the caller has) or a matrix at the output of a layer on its own: the program's input."""

    value: str
    handed: Handed
    shape: tuple[Size, ...]  # of what is handed in

    @property
    def columns(self) -> Size:
        return self.handed.count


@dataclass(frozen=True)
class Formula:
    """No columns: what is propagated is made of the model's output alone, of the gradient there, or of noise."""

    value: str
    columns: int = 1


@dataclass(frozen=True)
class Arriving:
    """Columns that an earlier sweep has brought to a value, where a later one goes on with them."""

    cotangent: str  # the value that has them
    columns: int
    weight: str  # the variable of their weights; "" for 1


@dataclass(frozen=True)
class Basis:
    """One-hot columns at a value, the same for every sample, and the weight of each of them (None: 1)."""

    value: str
    legs: tuple[Leg, ...]  # of the value, without the batch
    weight: Diagram | None = None  # [*legs, n]
    arriving: tuple[Arriving, ...] = ()  # what goes on together with them: all are written out for every sample then

    @property
    def own(self) -> int:
        """How many of the columns are one-hot."""
        return prod(int(leg.size) for leg in self.legs)

    @property
    def columns(self) -> int:
        return self.own + sum(columns.columns for columns in self.arriving)


def column_leg(width: Size) -> tuple[Leg, ...]:
    """The leg of several columns that are propagated together."""
    return (Leg(COLUMN, width),) if width != 1 else ()


@dataclass(frozen=True)
class Streamed:
    """Torch code on some samples: from the value `given` by calls to `made`; `rows`: a row for each sample."""

    quantity: str
    given: Made
    calls: tuple[Call, ...]
    made: Made
    constants: Mapping[str, Tensor]
    rows: bool


@dataclass(frozen=True)
class Phase:
    """What a quantity has computed between two phases: calls on values of their own.

    totals     value -> what it is the sum of, and the group of parameters
    outcome    the operands that it makes: by their name in diagrams, the value
    constants  tensors that the calls read
    """

    quantity: str
    totals: Mapping[str, tuple[Result, str]]
    calls: tuple[Call, ...]
    outcome: Mapping[str, str]
    constants: Mapping[str, Tensor]
    dtype: torch.dtype  # of the totals
    level: int = 1


@dataclass(frozen=True)
class Derived:
    """Everything to compute, in an order in which it can be computed."""

    bound: tuple[tuple[Call, BoundRule], ...]
    schedule: Schedule
    scale: sympy.Expr
    columns: tuple[Columns, ...] = ()
    readings: Mapping[str, Reading] = field(default_factory=dict)  # what quantities read besides, by value
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # quantity -> input -> its cotangent
    phases: tuple[Phase, ...] = ()  # what is computed in between, in order
    traced: tuple[Streamed, ...] = ()  # the torch code of streams

    @property
    def hidden(self) -> frozenset[str]:
        """The quantities that others need, and nobody asked for."""
        return frozenset(result.quantity for phase in self.phases for result, _ in phase.totals.values())

    @property
    def handed(self) -> dict[str, Reading]:
        """What is handed in when the program is called, by value."""
        return {name: reading for name, reading in self.readings.items() if not reading.of}

    @property
    def divisors(self) -> tuple[str, ...]:
        """The values that losses are divided by besides N: means over what is kept."""
        return tuple(rule.divisor for _, rule in self.bound if rule.divisor)

    @property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that the torch code of quantities reads."""
        found = {name: tensor for phase in self.phases for name, tensor in phase.constants.items()}
        found |= {name: tensor for each in self.traced for name, tensor in each.constants.items()}
        labels = (each.start.labels for each in self.columns if isinstance(each.start, LossRoot))
        return found | {name: tensor for each in labels if each for name, tensor in each.constants.items()}

    @property
    def last(self) -> int:
        """The last phase."""
        return max((item.level for item in self.items if isinstance(item, Extraction)), default=0)

    def at(self, level: int) -> Derived:
        """What is extracted in one phase; in a later one without the sweeps that nothing of it is extracted from."""
        def kept(schedule: Schedule) -> Schedule:
            return tuple(item for item in schedule if not isinstance(item, Extraction) or item.level == level)

        columns = (replace(each, schedule=kept(each.schedule)) for each in self.columns)
        wanted = (each for each in columns if not level or any(isinstance(i, Extraction) for i in each.schedule))
        return replace(self, schedule=kept(self.schedule), columns=tuple(wanted))

    @property
    def sweeps(self) -> tuple[Schedule, ...]:
        """The schedule of the gradient and of each kind of column."""
        return (self.schedule, *(c.schedule for c in self.columns))

    @property
    def swept(self) -> dict[str, str]:
        """The value of every cotangent."""
        return {item.name: item.value for item in self.items if isinstance(item, Backward)}

    @property
    def items(self) -> Iterator[Backward | Individual | Extraction]:
        """Every item of every sweep."""
        return chain.from_iterable(self.sweeps)


def joined_with(factors: Mapping[str, Factors]) -> dict[str, str]:
    """Weight -> bias in its block: its only factor is the weight's with the cotangent. No bias joins two weights."""
    alone = {name: key(f.diagrams[0]) for name, f in factors.items() if f.means == (None,)}
    found: dict[str, str] = {}
    for name, f in factors.items():
        loss = [key(diagram) for diagram, mean in zip(f.diagrams, f.means, strict=False) if mean is None]
        if len(f.means) == 2 and len(loss) == 1 and not f.blocks and not any(f.diagonal):
            free = [bias for bias, form in alone.items() if form == loss[0] and bias not in found.values()]
            if free:
                found[name] = free[0]
    return found
