"""Share: every computed value once. Equal expressions are one value; a trial is a layer on what is there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch

from ...diagram.canonical import Key
from ...diagram.core import Diagram, Leg, N, Size, hint_of
from ...errors import InvariantError
from .cost import Kernel, Rates, Work
from .expr import NO_WORK, Body, Expr, Ref, Value, reads
from .facts import base_of, makes_memory

T = TypeVar("T")
Saved = Callable[["Store", Ref], float]
"""(a trial, a value) -> seconds of those predicted that it does not take."""


LIKE = ":like"
"""How diagrams and code call a tensor of the program's dtype, on its device."""
NOTHING = Value(LIKE, None, (), hint="like")


@dataclass(frozen=True)
class Supplier:
    """The diagram of a value that is built when something reads it, and what builds it by its name."""

    diagram: Diagram
    build: Callable[[Store, str, Diagram], None]


class Store:
    """The values so far, and what has already been built. A fork sees its parent and changes nothing there."""

    def __init__(
        self, rates: Rates, batch: int, itemsize: int, one_sample: bool = False, parent: Store | None = None
    ) -> None:
        self.rates, self.batch, self.itemsize = rates, batch, itemsize
        self.one_sample = one_sample
        self.parent = parent
        self.note: str = parent.note if parent else ""
        self.rounds: int = parent.rounds if parent else 1  # of the loop over columns whose values are being entered
        self.steps: list[Value] = []
        self._by_expr: dict[Any, Value] = {}
        self._named: dict[str, Value] = {}
        self._built: dict[Key, Ref] = {}
        self._varying: set[Value] = set()  # what is another value in each round
        self.suppliers: dict[str, Supplier] = parent.suppliers if parent else {}  # of what is built when first read
        self.works: dict[str, tuple[Kernel, Work]] = parent.works if parent else {}  # of the calls of the forward
        self.lowerings: tuple[Any, ...] = parent.lowerings if parent else ()  # rows that offer candidates for a product
        self.outermost: tuple[Any, ...] = parent.outermost if parent else ()  # the same, for whole products only
        self.bodies: dict[Any, Body] = parent.bodies if parent else {}  # functions that several values call
        self.noises: dict[str, Value] = parent.noises if parent else {}  # the values from outside that are random
        self._entered: dict[Any, Value] = parent._entered if parent else {}  # (expression, note), in whatever trial
        self._tried: dict[Any, Ref] = parent._tried if parent else {}  # what trials have built, until one is adopted
        self._count: Iterator[int] = parent._count if parent else iter(range(2**62))
        self.planned: dict[Any, list[Any]] = parent.planned if parent else {}  # what may be done again, by form
        self.fixed: set[Value] = parent.fixed if parent else set()  # what has a name, and is made once
        self.one_dtype: bool = parent.one_dtype if parent else False  # all floating values of the graph have one dtype
        self.several: bool = parent.several if parent else False  # they have several
        self.mixed: bool = parent.mixed if parent else False  # so they have, or copies have another one
        self.integers: frozenset[str] = parent.integers if parent else frozenset()  # what is no floating number
        self.like: Value = parent.like if parent else NOTHING
        self.accumulate: torch.dtype | None = parent.accumulate if parent else None  # of squares and factors
        self.copies: dict[str, str] = parent.copies if parent else {}  # of that dtype: name -> of what

    @property
    def _layers(self) -> Iterator[Store]:
        layer: Store | None = self
        while layer is not None:
            yield layer
            layer = layer.parent

    def fork(self) -> Store:
        """A layer to try a plan on."""
        return Store(self.rates, self.batch, self.itemsize, self.one_sample, self)

    def separate(self, batch: int, one_sample: bool = False) -> Store:
        """An empty store for what a function computes of so many samples; keys of its values are no keys of these."""
        inner = Store(self.rates, batch, self.itemsize, one_sample)
        inner.note, inner._count, inner.mixed = self.note, self._count, self.mixed
        inner.lowerings, inner.outermost, inner.accumulate = self.lowerings, self.outermost, self.accumulate
        inner.integers = self.integers
        return inner

    def adopt(self, trial: Store) -> None:
        """Take over what a fork has built."""
        self.steps += trial.steps
        self._by_expr |= trial._by_expr
        self._named |= trial._named
        self._built |= trial._built
        self._varying |= trial._varying
        if self.parent is None:
            self._tried.clear()

    def given(self, name: str, shape: tuple[Size, ...], floating: bool = False, strided: bool = False) -> Value:
        """A value from outside, or the variable of a loop or a function."""
        value = Value(name, None, shape, hint=hint_of(name), floating=floating, strided=strided)
        self._named[name] = value
        return value

    def noise(self, name: str, shape: tuple[Size, ...]) -> Value:
        """A value from outside that is random."""
        self.noises[name] = self.given(name, shape)
        return self.noises[name]

    def name(self, name: str, value: Value) -> None:
        """Let diagrams call a value so."""
        self._named[name] = value
        self.fixed.add(value)

    def __contains__(self, name: str) -> bool:
        return any(name in layer._named for layer in self._layers)

    def find(self, name: str) -> Value:
        """The value that diagrams call so, built now if nothing has read it yet."""
        for layer in self._layers:
            if name in layer._named:
                return layer._named[name]
        if name not in self.suppliers:
            raise InvariantError(f"no value is called {name!r}")
        supplier = self.suppliers[name]
        supplier.build(self, name, supplier.diagram)
        return self.find(name)

    @property
    def names(self) -> dict[str, Value]:
        """Every value that diagrams call by a name."""
        found: dict[str, Value] = {}
        for layer in self._layers:
            found = layer._named | found
        return found

    def key_of(self, value: Value) -> str:
        """How diagrams call a value."""
        if value.key not in self:
            self._named[value.key] = value
        return value.key

    def known(self, expr: Expr) -> Value | None:
        """The value of an expression that was entered before."""
        for layer in self._layers:
            if expr in layer._by_expr:
                return layer._by_expr[expr]
        return None

    def built(self, key: Key) -> Ref | None:
        """What a diagram, or whatever else has this key, was built as."""
        for layer in self._layers:
            if key in layer._built:
                return layer._built[key]
        return None

    def keep(self, key: Key, ref: Ref, inside: bool = False) -> None:
        """Build it once, and in another trial in the same way."""
        self._built[key] = ref
        self._tried[key, inside, self.note] = ref

    def tried(self, key: Key, inside: bool) -> Ref | None:
        """What another trial has built a diagram as, entered here as well; None where it shared what is not here."""
        ref = self._tried.get((key, inside, self.note))
        if ref is None or (missing := self._missing(ref.value)) is None:
            return None
        for value in missing:
            self._enter(value)
        self._built[key] = ref
        return ref

    def _missing(self, value: Value) -> list[Value] | None:
        """What is to be entered for a value of another trial, in order; None where something equal is here already."""
        found: dict[Value, None] = {}
        seen: set[Value] = set()
        rest = [(value, False)]
        while rest:
            each, entered = rest.pop()
            if entered:
                found[each] = None
                continue
            if each in seen or each.expr is None:
                continue
            seen.add(each)
            known = self.known(each.expr)
            if known is each:
                continue
            if known is not None or each.note != self.note:
                return None
            rest.append((each, True))
            rest += [(inner, False) for inner in reversed(each.inputs)]
        return list(found)

    def _enter(self, value: Value) -> None:
        self.steps.append(value)
        self._by_expr[value.expr] = value
        if any(self.varies(each) for each in value.inputs):
            self._varying.add(value)

    def varies(self, value: Value) -> bool:
        """Whether it is another value in each round of a loop."""
        return any(value in layer._varying for layer in self._layers)

    def add(
        self,
        expr: Expr,
        shape: tuple[Size, ...],
        kernel: Kernel,
        work: Work = NO_WORK,
        *,
        hint: str = "",
        alone: bool = False,
        own: bool | None = None,
        floating: bool = False,
        **facts: Any,
    ) -> Value:
        """Enter a value, unless the same was entered before (`alone`: even then).

        own       whether it is in memory of its own, where its expression does not say it
        floating  it has the one floating dtype, whatever it is made from
        """
        if isinstance(expr, Value):
            return expr
        known = None if alone else self.known(expr)
        if known is not None:
            return known
        entered = None if alone else self._entered.get((expr, self.note))
        if entered is not None:
            self._enter(entered)
            return entered
        inputs = reads(expr)
        known_floating, floating = floating, any(value.floating for value in inputs)
        own = floating and (makes_memory(expr) if own is None else own)
        base = base_of(expr) if kernel is Kernel.VIEW else None
        whole = own or (base is not None and base.whole and sympy.Mul(*base.shape) == sympy.Mul(*shape))
        floating = known_floating or own or (floating and kernel in (Kernel.VIEW, Kernel.COPY))
        facts.setdefault("dtype", next((each.dtype for each in inputs if each.dtype is not None), None))
        value = Value(
            f"%{next(self._count)}", expr, shape, kernel, work, self.note, hint, own, floating, whole,
            inputs=inputs, **facts,
        )  # fmt: skip
        self._entered[expr, self.note] = value
        self._enter(value)
        return value

    def real(self, legs: tuple[Leg, ...]) -> list[Leg]:
        """The legs that are more than one element."""
        return [leg for leg in legs if leg.size != 1 and not (self.one_sample and leg.size == N)]

    def in_rounds(self, rounds: int, rows: Iterable[Value] = ()) -> None:
        """From here on there are so many rounds, with other values of these, and of what reads them, in each."""
        self.rounds, self._varying = rounds, set(rows)
        self._tried.clear()
        for value in self.steps:
            if any(each in self._varying for each in value.inputs):
                self._varying.add(value)

    @property
    def varying(self) -> set[Value]:
        """All that varies."""
        return set().union(*(layer._varying for layer in self._layers))

    @property
    def seconds(self) -> float:
        """Predicted seconds of the values of this layer, each as often as it is computed."""
        return sum(self.seconds_of(each) * (self.rounds if self.varies(each) else 1) for each in self.steps)

    def seconds_of(self, value: Value) -> float:
        """Predicted seconds of a value that is computed once."""
        return self.rates.seconds(value.kernel, value.work, self.batch, self.itemsize)

    def cheapest(self, plans: Iterable[Callable[[Store], Ref]], saved: Saved = lambda trial, ref: 0.0) -> Ref:
        """Try each plan on a fork and adopt the one that is predicted fastest; the first wins a tie."""
        return self.cheapest_of([(plan, None) for plan in plans], saved)[0]

    def cheapest_of(self, plans: Iterable[tuple[Callable[[Store], Ref], T]], saved: Saved) -> tuple[Ref, T]:
        """The same for plans that carry something, which comes back with the value."""
        best: tuple[float, Store, Ref, T] | None = None
        for plan, carried in plans:
            trial = self.fork()
            ref = plan(trial)
            seconds = trial.seconds - saved(trial, ref)
            if best is None or seconds < best[0]:
                best = (seconds, trial, ref, carried)
        if best is None:
            raise InvariantError("no plan to choose from")
        self.adopt(best[1])
        return best[2], best[3]


