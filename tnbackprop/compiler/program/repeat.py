"""Repeat: what was planned for some diagrams is done again for equal ones of other tensors: blocks are planned once.

Two diagrams are equal here where they differ in nothing but the names of their tensors, and the tensors' values in
nothing that a lowering looks at. The steps are entered anew, each as it was, of the other values; what the store has
already is shared as always. Where that takes longer than it was planned to, all is planned as if it were new.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...diagram.algebra import of_tensors
from ...diagram.core import Diagram, leaves
from .expr import Of, Ref, Rounds, Value, children, replaced
from .hoist import saved
from .lines import alive
from .store import Store

SLACK = 1.001
"""How much longer it may look than what was planned."""


@dataclass(frozen=True, eq=False)
class Planned:
    """What was planned once: of these values, in these steps, with these results, for so many seconds.

    names  of the values, as the diagrams call them; None for one that was not there yet
    found  what those are that were not, where something read them: an equal value may have been there all the same
    varying  those, and what they view, that are others in each round of a loop, which another loop's are not any more
    notes  what the steps are for
    made   what else there is to know about it
    """

    key: Hashable
    names: tuple[str, ...]
    values: tuple[Value | None, ...]
    found: tuple[Value | None, ...]
    varying: frozenset[Value]
    steps: tuple[Value, ...]
    refs: tuple[Ref, ...]
    seconds: float
    notes: tuple[str, ...]
    made: Any


@dataclass(frozen=True)
class Asked:
    """Diagrams that are to be built: their form, and the tensors that they read, in order."""

    key: Hashable
    names: tuple[str, ...]
    values: tuple[Value | None, ...]


def asked(store: Store, diagrams: Mapping[Any, Diagram]) -> Asked:
    """The form of diagrams; what is only built when something reads it is one of them, too."""
    every = dict(diagrams)
    names: dict[str, None] = {}
    rest = list(diagrams.values())
    while rest:
        for name in leaves(rest.pop(0)):
            if name not in names and name not in store:
                every["supplied", len(names)] = store.suppliers[name].diagram
                rest.append(every["supplied", len(names)])
            names[name] = None
    to = {name: f"{k}" for k, name in enumerate(names)}
    form = tuple((what, of_tensors(diagram, to)) for what, diagram in every.items())
    values = tuple(store.find(name) if name in store else None for name in names)
    facts = tuple(value and _facts(value, store.varies(value)) for value in values)
    return Asked((form, store.rounds, facts), tuple(names), values)


def keep(
    store: Store, what: Asked, trial: Store, refs: tuple[Ref, ...], notes: tuple[str, ...], made: Any = None
) -> None:
    """What a trial has built for these diagrams, to be done again for equal ones."""
    steps = alive(trial.steps, {ref.value for ref in refs})
    if any(_calls(step.expr) for step in steps):
        return  # their functions read what they like
    seconds = trial.seconds - saved(trial, *refs)
    named = zip(what.names, what.values, strict=True)
    found = tuple(store.find(name) if value is None and name in store else None for name, value in named)
    varying = frozenset(each for each in _seen((*what.values, *found)) if store.varies(each))
    planned = Planned(what.key, what.names, what.values, found, varying, steps, refs, seconds, notes, made)
    store.planned.setdefault(what.key, []).append(planned)


def again(store: Store, what: Asked, notes: tuple[str, ...]) -> tuple[Planned, tuple[Ref, ...]] | None:
    """What was planned for equal diagrams, done again for these; None where nothing was, or nothing as fast."""
    for planned in store.planned.get(what.key, ()):
        to: dict[Value, Value] = {store.like: store.like}
        pairs = zip(planned.values, what.values, strict=True)
        if not all(_paired(store, one, other, to, planned.varying) for one, other in pairs if one and other):
            continue
        trial = store.fork()
        copies = _Copies(trial, to, frozenset(planned.steps), dict(zip(planned.notes, notes, strict=True)))
        there = ((name, then) for name, then in zip(what.names, planned.found, strict=True) if then)
        if not all(copies.supplied(name, then, planned.varying) for name, then in there):
            continue
        if not all(map(copies.enter, (*planned.steps, *(ref.value for ref in planned.refs)))):
            continue
        refs = tuple(copies.ref(ref) for ref in planned.refs)
        if trial.seconds - saved(trial, *refs) <= SLACK * planned.seconds:
            store.adopt(trial)
            return planned, refs
    return None


def _calls(expr: Any) -> bool:
    """Whether functions next to the program, or loops, are in it."""
    return isinstance(expr, Rounds | Of) or any(_calls(each) for each in children(expr) if not isinstance(expr, Value))


def _seen(values: Iterable[Value | None]) -> set[Value]:
    """Values, and those that a lowering may read in their place."""
    found, rest = set[Value](), [value for value in values if value]
    while rest:
        if (value := rest.pop()) not in found:
            found.add(value)
            rest += [ref.value for ref in _around(value) if ref is not None]
    return found


def _paired(store: Store, one: Value, other: Value, to: dict[Value, Value], varying: frozenset[Value]) -> bool:
    """Whether a value is to a lowering what another was; pairs of both, and of what they view, are added `to` it."""
    if one in to:
        return to[one] is other
    to[one] = other
    if _facts(one, one in varying) != _facts(other, store.varies(other)):
        return False
    pairs = list(zip(_around(one), _around(other), strict=True))
    if not all(_legs(a) == _legs(b) for a, b in pairs):
        return False
    return all(_paired(store, a.value, b.value, to, varying) for a, b in pairs if a and b)


def _legs(ref: Ref | None) -> object:
    return (ref.stored, ref.order) if ref is not None else None


def _facts(value: Value, varies: bool) -> tuple[object, ...]:
    near = tuple(sorted(value.near.items())) if value.near is not None else None
    return value.shape, value.own, value.floating, value.whole, value.strided, near, varies, value.dtype


def _around(value: Value) -> list[Ref | None]:
    """The values that a lowering may read in its place."""
    linear = Ref(value.linear, (), ()) if value.linear is not None else None
    return [value.seen, value.spread, *(value.summands or (None, None)), linear]


@dataclass
class _Copies:
    """The steps of a plan, entered for other values."""

    trial: Store
    to: dict[Value, Value]
    own: frozenset[Value]
    notes: Mapping[str, str]

    def enter(self, step: Value) -> bool:
        """Whether a value could be made again, and all that it reads."""
        if step in self.to:
            return True
        elsewhere = step.expr is None or (step in self.trial.fixed and step not in self.own)
        if elsewhere or not all(map(self.enter, step.inputs)):
            return False
        around = [ref.value for ref in _around(step) if ref is not None]
        if not all(map(self.enter, around)):
            return False
        self.trial.note = self.notes.get(step.note, self.trial.note)
        self.to[step] = self.trial.add(
            replaced(step.expr, self.to.__getitem__), step.shape, step.kernel, step.work,
            own=step.own, floating=step.floating, strided=step.strided, near=step.near,
            seen=self._maybe(step.seen), spread=self._maybe(step.spread),
            summands=(self.ref(step.summands[0]), self.ref(step.summands[1])) if step.summands else None,
            linear=self.to[step.linear] if step.linear is not None else None, dtype=step.dtype,
        )  # fmt: skip
        return True

    def supplied(self, name: str, then: Value, varying: frozenset[Value]) -> bool:
        """Whether what something reads first is, where that was there before, what it was then."""
        if then in self.own:
            return True
        self.trial.note = self.notes.get(then.note, self.trial.note)
        return _paired(self.trial, then, self.trial.find(name), self.to, varying)

    def ref(self, ref: Ref) -> Ref:
        """A value seen with the same legs."""
        return Ref(self.to[ref.value], ref.stored, ref.order)

    def _maybe(self, ref: Ref | None) -> Ref | None:
        return self.ref(ref) if ref is not None else None
