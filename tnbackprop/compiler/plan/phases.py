"""Phases: what quantities have computed from totals before what reads it is extracted."""

from __future__ import annotations

from collections.abc import Mapping

from ..entered.forward import enter
from ..lower.arrange import reshaped
from ..program.cost import Kernel
from ..program.expr import Value
from ..program.store import Store
from ..sweep.derived import Derived, Phase, Result

Results = Mapping[Result, Mapping[str, Value]]


def enter_phases(store: Store, derived: Derived, level: int, results: Results) -> None:
    """The values that everything of this level reads."""
    for phase in derived.phases:
        if phase.level == level:
            _enter(store, derived, phase, results)


def _enter(store: Store, derived: Derived, phase: Phase, results: Results) -> None:
    store.note = f"between, for {phase.quantity}"
    for name, (result, group) in phase.totals.items():
        store.name(name, results[result][group])
    enter(store, phase.calls, phase.dtype)
    for name, value in phase.outcome.items():
        found = store.find(value)
        expr = reshaped(found, found.shape, derived.readings[name].sizes)
        store.name(name, store.add(expr, derived.readings[name].sizes, Kernel.VIEW))
