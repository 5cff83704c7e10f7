"""Choose: which halves of a parameter's quantities are built once, and which are multiplied out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations

from ...diagram.algebra import all_parts, inline, of_tensors, parts
from ...diagram.core import Diagram, Tensor
from ..lower.contract import build
from ..program.cost import number
from ..program.expr import Ref, Value
from ..program.hoist import epilogues, saved
from ..program.repeat import again, asked, keep
from ..program.store import Store
from ..sweep.derived import Extraction, Result
from .rows import in_rows
from .slices import build_sliced

MOST_PARTS = 4
"""Up to here every subset of parts is tried; beyond it, parts are decided one after the other."""


@dataclass(frozen=True, eq=False)
class Option:
    """A set of parts to build, tried out: all steps that it takes, and which of them gives each quantity.

    rounds  of the steps that run in each round of a loop over columns, how often
    """

    kept: frozenset[Diagram]
    seconds: float
    steps: tuple[Value, ...]
    results: Mapping[Result, Value]  # made by the steps, or built before
    forms: Mapping[Result, Diagram]  # quantity -> the diagram that was built
    free: bool  # whether a quantity could be multiplied out all the same
    rounds: Mapping[Value, int]


@dataclass(frozen=True)
class Choice:
    """What was decided for one parameter: which of its parts are built.

    tried  what was tried, for this one or for an equal one that came before
    best   the number of what was chosen
    names  the tensors here, by their names there
    """

    parameter: str
    item: Extraction
    tried: tuple[Option, ...]
    best: int
    names: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def found(self) -> tuple[Diagram, ...]:
        """The parts that may be built."""
        return tuple(dict.fromkeys((*_parts_of(self.item.diagrams), *_parts_of(self.item.condensed))))

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """All that was tried; for an equal parameter, with what that one costs."""
        return tuple(_of_tensors(option, self.names) for option in self.tried) if self.names else self.tried

    @property
    def chosen(self) -> Option:
        return self.options[self.best]


def _of_tensors(option: Option, to: Mapping[str, str]) -> Option:
    forms = {quantity: of_tensors(form, to) for quantity, form in option.forms.items()}
    return replace(option, kept=frozenset(of_tensors(part, to) for part in option.kept), forms=forms)


def choose(
    store: Store, item: Extraction, dotted: str, chunk: int | None
) -> tuple[Choice, dict[Result, Ref]]:
    """The fastest option, built; what was chosen for an equal parameter is chosen again.

    When the batch is sliced to save memory, it is the fastest with small allocations.
    """
    diagrams = {(q, way): d for way, by in enumerate((item.diagrams, item.condensed)) for q, d in by.items()}
    what = asked(store, diagrams) if chunk is None else None
    notes = (dotted, f"individual gradients of {dotted}", *(f"{quantity} of {dotted}" for quantity in item.diagrams))
    if what is not None and (known := again(store, what, notes)) is not None:
        first, made = known[0].made, known[1]
        names = dict(zip(known[0].names, what.names, strict=True))
        return Choice(dotted, item, first.tried, first.best, names), dict(zip(item.diagrams, made, strict=True))
    choice, refs, trial = _chosen(store, item, dotted, chunk)
    if what is not None:
        keep(store, what, trial, tuple(refs[quantity] for quantity in item.diagrams), notes, choice)
    return choice, refs


def chosen(
    item: Extraction, dotted: str, store: Store, native: Callable[[Store], Ref]
) -> tuple[Choice, dict[Result, Ref]]:
    """No choice: all quantities are what native code gives."""
    trial = store.fork()
    trial.note = f"{next(iter(item.diagrams))} of {dotted}"
    ref = native(trial)
    results = dict.fromkeys(item.diagrams, ref.value)
    option = Option(frozenset(), trial.seconds, tuple(trial.steps), results, item.diagrams, True, {})
    store.adopt(trial)
    return Choice(dotted, item, (option,), 0), dict.fromkeys(item.diagrams, ref)


def _chosen(
    store: Store, item: Extraction, dotted: str, chunk: int | None
) -> tuple[Choice, dict[Result, Ref], Store]:
    """The fastest option, and the trial that has built it."""
    found, before = (_parts_of(diagrams) for diagrams in (item.diagrams, item.condensed))
    allowed = [(subset, free) for subset in _subsets(item.diagrams, found) for free in (True, False) if subset or free]
    allowed += [(subset, True) for subset in _subsets(item.condensed, before) if subset]
    tried = {}
    for subset, free in allowed:
        option, trial, refs = _option(store, item, dotted, subset, free, chunk)
        tried[option] = trial, refs
    options = candidates = tuple(tried)
    if chunk is not None:
        largest = {option: _largest(option, store.batch) for option in options}
        candidates = tuple(option for option in options if largest[option] <= 2 * min(largest.values()))
    chosen = min(candidates, key=lambda option: option.seconds)
    trial, refs = tried[chosen]
    store.adopt(trial)
    return Choice(dotted, item, options, options.index(chosen)), refs, trial


def _parts_of(diagrams: Mapping[Result, Diagram]) -> tuple[Diagram, ...]:
    """What there is to build; a part that is one tensor is there already."""
    found = dict.fromkeys(part for diagram in diagrams.values() for part in parts(diagram))
    return tuple(part for part in found if not _is_tensor(part))


def _is_tensor(diagram: Diagram) -> bool:
    operands = [op for product in diagram.products for op in product.operands]
    return len(operands) == 1 and isinstance(operands[0], Tensor) and set(operands[0].legs) == set(diagram.legs)


def _subsets(diagrams: Mapping[Result, Diagram], found: tuple[Diagram, ...]) -> list[frozenset[Diagram]]:
    """The sets of parts that may be built together."""
    subsets = [frozenset(s) for size in range(len(found) + 1) for s in combinations(found, size)]
    if len(found) > MOST_PARTS:
        subsets = [frozenset(found[:k]) for k in range(len(found) + 1)]
    followers = [p for d in diagrams.values() for p in all_parts(d) if p.with_inner]
    return [s for s in subsets if all(p.diagram in s or not s & set(parts(p.diagram)) for p in followers)]


def _largest(option: Option, batch: int) -> float:
    """Elements of the largest allocation."""
    return max((number(step.work.fresh, batch) for step in option.steps), default=0.0)


def _option(
    store: Store,
    item: Extraction,
    dotted: str,
    kept: frozenset[Diagram],
    free: bool,
    chunk: int | None,
) -> tuple[Option, Store, dict[Result, Ref]]:
    """A set of parts to build, tried on a fork, and what that has built."""
    trial = store.fork()
    built = _build_all(trial, item, dotted, kept, chunk, free)
    refs = {quantity: ref for quantity, (ref, _) in built.items()}
    results = {quantity: ref.value for quantity, ref in refs.items()}
    forms = {quantity: form for quantity, (_, form) in built.items()}
    seconds = trial.seconds - saved(trial, *refs.values())
    once = epilogues(trial, *refs.values())
    steps = tuple(trial.steps)
    rounds = {step: trial.rounds for step in steps if trial.varies(step) and step not in once}
    return Option(kept, seconds, steps, results, forms, free, rounds), trial, refs


def _build_all(
    store: Store,
    item: Extraction,
    dotted: str,
    kept: frozenset[Diagram],
    chunk: int | None,
    free: bool,
) -> dict[Result, tuple[Ref, Diagram]]:
    """Every quantity of the parameter with the parts in `kept` built; if `free`, each may be multiplied out still."""
    def one(diagram: Diagram, trial: Store) -> Ref:
        diagram = in_rows(trial, diagram)
        return build(trial, diagram) if chunk is None else build_sliced(trial, diagram, chunk)

    if chunk is None:
        found_here = dict.fromkeys((*_parts_of(item.diagrams), *_parts_of(item.condensed)))
        for part in sorted((p for p in found_here if p in kept), key=lambda part: len(parts(part))):
            store.note = f"individual gradients of {dotted}"
            build(store, inline(part, kept - {part}))
    found = {}
    for quantity in item.diagrams:
        store.note = f"{quantity} of {dotted}"
        ways = dict.fromkeys(_ways(item, quantity, kept, free))
        found[quantity] = store.cheapest_of([(partial(one, way), way) for way in ways], saved)
    return found


def _ways(item: Extraction, quantity: Result, kept: frozenset[Diagram], free: bool) -> Iterator[Diagram]:
    """The diagrams that may be built for a quantity: with the parts that are built, and if `free` multiplied out."""
    both = [form for form in (item.diagrams[quantity], item.condensed.get(quantity)) if form is not None]
    reading = [form for form in both if kept & set(parts(form))] or both[:1]
    yield from (inline(form, kept) for form in (reading if kept else both))
    for form in both:
        if free and kept and not any(part.with_inner for part in all_parts(form)):
            yield inline(form)
