"""Share: every computed value once. Values are keyed by the code that computes them, so equal steps are one step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import sympy

from ..canonical import Key
from ..diagram import Diagram, Leg, N, Size
from ..errors import InvariantError
from .cost import Kernel, Rates, Work

NO_WORK = Work()
T = TypeVar("T")
Saved = Callable[["Store", int, "Ref"], float]
"""(a fork, its first step, a value) -> seconds of those predicted that it does not take."""
_NAMES = re.compile(r"(?<![\w.])[A-Za-z_]\w*")


@dataclass(frozen=True)
class Step:
    """One line of the program: ``name = code``.

    own      the value is a new tensor of the program's floating dtype, in memory that no earlier value has
    into     (operand, code) pairs: the same written over an operand, for when nobody reads that any more
    linear   an input in which the value is linear, where the code does not show it
    """

    name: str
    code: str
    inputs: tuple[str, ...]
    kernel: Kernel
    work: Work
    note: str = ""
    own: bool = False
    into: tuple[tuple[str, str], ...] = ()
    linear: str = ""


def is_rearranged(code: str, base: str) -> bool:
    """Whether code only sees a value in another shape."""
    return bool(_REARRANGED.fullmatch(code.removeprefix(base)))


_REARRANGED = re.compile(r"(\.(reshape|unsqueeze|squeeze|expand|contiguous)\([^()]*\))+")


@dataclass(frozen=True)
class Ref:
    """A value seen with named legs: `stored` factorises its memory row-major, `order` is how it is read now."""

    name: str
    stored: tuple[Leg, ...]
    order: tuple[Leg, ...]

    def reordered(self, order: tuple[Leg, ...]) -> Ref:
        return replace(self, order=order)

    def renamed(self, legs: tuple[Leg, ...]) -> Ref:
        """The same value with its current legs called differently."""
        to = dict(zip(self.order, legs, strict=True))
        return Ref(self.name, tuple(to[leg] for leg in self.stored), legs)


@dataclass
class Store:
    """The steps so far, the shape of every value, and what has already been built."""

    rates: Rates
    batch: int
    itemsize: int
    steps: list[Step] = field(default_factory=list)
    shapes: dict[str, tuple[Size, ...]] = field(default_factory=dict)
    strided: set[str] = field(default_factory=set)  # values whose memory is not row-major: merging legs copies
    views: dict[str, Ref] = field(default_factory=dict)  # permuted views: the value that they are views of
    near: dict[str, dict[int, int]] = field(default_factory=dict)  # strided values: axis -> stride, of short strides
    expanded: dict[str, Ref] = field(default_factory=dict)  # constant along some legs: the value without them
    sums: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)  # a summand in the same order, one with fewer legs
    by_code: dict[str, str] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)
    built: dict[Key, Ref] = field(default_factory=dict)
    definitions: dict[str, Diagram] = field(default_factory=dict)  # values that are built when first read
    suppliers: dict[str, Callable[[Store], None]] = field(default_factory=dict)  # the same, for native code
    works: dict[str, tuple[Kernel, Work]] = field(default_factory=dict)  # of the calls of the forward, for their VJPs
    functions: dict[str, str] = field(default_factory=dict)  # slices: name -> source
    floating: set[str] = field(default_factory=set)  # values of the one floating dtype; empty where there are several
    whole: set[str] = field(default_factory=set)  # values that are all of a step's own memory, or views of all of it
    rounds: int = 1  # of the loop over columns whose steps are being entered
    varying: set[str] = field(default_factory=set)  # what is another value in each of them
    note: str = ""
    prefix: str = "t"
    alone: bool = False  # there is one sample

    def fork(self) -> Store:
        """An independent copy, to try a plan on."""
        return replace(
            self,
            steps=list(self.steps),
            shapes=dict(self.shapes),
            strided=set(self.strided),
            views=dict(self.views),
            near=dict(self.near),
            expanded=dict(self.expanded),
            sums=dict(self.sums),
            by_code=dict(self.by_code),
            alias=dict(self.alias),
            built=dict(self.built),
            functions=dict(self.functions),
            floating=set(self.floating),
            whole=set(self.whole),
            varying=set(self.varying),
        )

    def adopt(self, other: Store) -> None:
        """Take over what a fork has built."""
        known = ("by_code", "alias", "built", "functions", "floating", "whole", "varying")
        for name in ("steps", "shapes", "strided", "views", "near", "expanded", "sums", *known):
            setattr(self, name, getattr(other, name))

    def add(
        self,
        code: str,
        shape: tuple[Size, ...],
        kernel: Kernel,
        work: Work = NO_WORK,
        name: str | None = None,
        strided: bool = False,
        alone: bool = False,
        own: bool = False,
        into: tuple[tuple[str, str], ...] = (),
        linear: str = "",
    ) -> str:
        """Enter a step, unless the same code was entered before (`alone`: even then); returns the value's name."""
        if code in self.by_code and not alone:
            known = self.by_code[code]
            if name is not None and name != known:
                self.alias[name] = known
            return known
        name = name or f"{self.prefix}{len(self.steps)}"
        if name in self.shapes:
            raise InvariantError(f"value {name} is computed twice: {code}")
        inputs = self.names_in(code)
        floating = any(read in self.floating for read in inputs)
        own = own and floating
        into = tuple((operand, other) for operand, other in into if own and operand in self.whole)
        self.steps.append(Step(name, code, inputs, kernel, work, self.note, own, into, linear))
        if not self.varying.isdisjoint(inputs):
            self.varying.add(name)
        if own or (floating and kernel in (Kernel.VIEW, Kernel.COPY)):
            self.floating.add(name)
        if own or (kernel is Kernel.VIEW and self._sees_all(code, inputs, shape)):
            self.whole.add(name)
        self.shapes[name] = shape
        self.by_code[code] = name
        if strided:
            self.strided.add(name)
        return name

    def _sees_all(self, code: str, inputs: tuple[str, ...], shape: tuple[Size, ...]) -> bool:
        """Whether a view has each element of a value once, that is all of a step's own memory."""
        if len(inputs) != 1 or inputs[0] not in self.whole or not is_rearranged(code, inputs[0]):
            return False
        return bool(sympy.Mul(*self.shapes[inputs[0]]) == sympy.Mul(*shape))

    def names_in(self, code: str) -> tuple[str, ...]:
        """The values that a piece of code reads, each once."""
        return tuple(dict.fromkeys(name for name in _NAMES.findall(code) if name in self.shapes))

    def resolve(self, name: str) -> str:
        """The value behind an alias."""
        while name in self.alias:
            name = self.alias[name]
        return name

    def real(self, legs: tuple[Leg, ...]) -> list[Leg]:
        """The legs that are more than one element."""
        return [leg for leg in legs if leg.size != 1 and not (self.alone and leg.size == N)]

    def in_rounds(self, rounds: int, rows: Iterable[str] = ()) -> None:
        """From here on there are so many rounds, with other values of these names, and of what reads them, in each."""
        self.rounds, self.varying = rounds, set(rows)
        for step in self.steps:
            if not self.varying.isdisjoint(step.inputs):
                self.varying.add(step.name)

    def seconds(self, start: int = 0) -> float:
        """Predicted seconds of the steps from `start` on, each as often as it runs."""
        return sum(self.seconds_of(s) * (self.rounds if s.name in self.varying else 1) for s in self.steps[start:])

    def seconds_of(self, step: Step) -> float:
        """Predicted seconds of a step that runs once."""
        return self.rates.seconds(step.kernel, step.work, self.batch, self.itemsize)

    def cheapest(self, plans: Iterable[Callable[[Store], Ref]], saved: Saved = lambda store, start, ref: 0.0) -> Ref:
        """Try each plan on a fork and adopt the one that is predicted fastest; the first wins a tie."""
        return self.cheapest_of([(plan, None) for plan in plans], saved)[0]

    def cheapest_of(self, plans: Iterable[tuple[Callable[[Store], Ref], T]], saved: Saved) -> tuple[Ref, T]:
        """The same for plans that carry something, which comes back with the value."""
        best: tuple[float, Store, Ref, T] | None = None
        start = len(self.steps)
        for plan, carried in plans:
            trial = self.fork()
            ref = plan(trial)
            seconds = trial.seconds(start) - saved(trial, start, ref)
            if best is None or seconds < best[0]:
                best = (seconds, trial, ref, carried)
        if best is None:
            raise InvariantError("no plan to choose from")
        self.adopt(best[1])
        return best[2], best[3]
