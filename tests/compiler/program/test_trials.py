"""Trials on a store: what one of them has built is built in the same way in the next, and shared where it may be."""

from __future__ import annotations

from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import Kernel
from tnbackprop.compiler.program.expr import Call, Ref, Value
from tnbackprop.compiler.program.store import Store
from tnbackprop.diagram.core import Leg

from ...programs import CPU

LEGS = (Leg("i", 3),)
KEY = ("a diagram",)


def doubled(store: Store, value: Value) -> Value:
    return store.add(Call(f.ADD, (value, value)), (3,), Kernel.ELEMENTWISE)


def built(store: Store, x: Value) -> Value:
    """Four times x, kept as what a diagram is."""
    value = doubled(store, doubled(store, x))
    store.keep(KEY, Ref(value, LEGS, LEGS))
    return value


def test_equal_values_of_two_trials_are_one() -> None:
    store = Store(CPU, 2, 8)
    x = store.given("x", (3,))
    one, other = store.fork(), store.fork()
    value = built(one, x)
    assert built(store.fork(), x) is value
    assert other.known(value.expr) is None
    found = other.tried(KEY, inside=False)
    assert found is not None and found.value is value
    assert other.steps == one.steps and doubled(other, doubled(other, x)) is value


def test_not_where_something_equal_is_there_for_another_purpose() -> None:
    """Both would be computed."""
    store = Store(CPU, 2, 8)
    x = store.given("x", (3,))
    built(store.fork(), x)
    other = store.fork()
    other.note = "another"
    doubled(other, x)
    other.note = store.note
    assert other.tried(KEY, inside=False) is None and len(other.steps) == 1


def test_what_is_adopted_ends_it() -> None:
    """From there on all see something else."""
    store = Store(CPU, 2, 8)
    x = store.given("x", (3,))
    trial = store.fork()
    built(trial, x)
    store.adopt(store.fork())
    assert store.fork().tried(KEY, inside=False) is None
