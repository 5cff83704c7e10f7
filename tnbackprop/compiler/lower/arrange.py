"""Arrange: the expression that reads a value with its legs in a given order and grouping."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import prod

import sympy

from ...diagram.core import Leg, Size
from ..program import functions as f
from ..program.cost import Kernel, Work, size_at
from ..program.expr import Call, Expr, Ref, Value
from ..program.functions import Function
from ..program.store import Store

Groups = tuple[tuple[Leg, ...], ...]
CACHED = 2**16


def alike(store: Store, first: Expr, second: Expr) -> Expr:
    """The second operand of a product, in the dtype of the first one, where a program has several."""
    return Call(f.TO, (second, Call(f.DTYPE, (first,)))) if store.mixed else second


def sizes_of(legs: tuple[Leg, ...]) -> tuple[Size, ...]:
    return tuple(leg.size for leg in legs)


@lru_cache(CACHED)
def merged(group: tuple[Leg, ...]) -> Size:
    """The size of several legs read as one axis."""
    fixed = prod(leg.size for leg in group if isinstance(leg.size, int))
    symbols = sympy.Mul(*(leg.size for leg in group if not isinstance(leg.size, int)))
    return fixed if symbols == 1 else symbols * fixed


Steps = tuple[tuple[Function, tuple[object, ...]], ...]
"""Views one after the other: each a function and its arguments."""


def arranged(store: Store, ref: Ref, groups: Groups) -> Expr:
    """`ref` with one axis per group; a group without legs is an axis of size 1."""
    expr: Expr = ref.value
    for fn, args in _views(ref.value.shape, ref.stored, groups):
        expr = Call(fn, (expr, *args))
    return expr


def in_order(store: Store, ref: Ref) -> Expr:
    """`ref` with an axis for each leg, in their order."""
    return arranged(store, ref, tuple((leg,) for leg in ref.order))


def as_stored(store: Store, ref: Ref) -> Expr:
    """`ref` with an axis for each leg, in the order of its memory."""
    return arranged(store, ref, tuple((leg,) for leg in ref.stored))


def added(store: Store, one: Value, other: Value) -> Value:
    """The sum of two values of one shape."""
    legs = legs_of(other)
    work = Work(flops=((1, legs),), moved=((3, legs),), fresh=((1, legs),))
    return store.add(Call(f.ADD, (one, other)), other.shape, Kernel.ELEMENTWISE, work)


def legs_of(value: Value) -> tuple[Leg, ...]:
    """A leg for each axis."""
    return tuple(Leg(f"a{k}", size) for k, size in enumerate(value.shape))


def reshaped(expr: Expr, shape: tuple[Size, ...], wanted: tuple[Size, ...]) -> Expr:
    """An expression of this shape in another one."""
    return expr if shape == wanted else Call(f.RESHAPE, (expr, *(wanted or ((),))))


@lru_cache(CACHED)  # trials ask the same again and again
def _views(shape: tuple[Size, ...], stored: tuple[Leg, ...], groups: Groups) -> Steps:
    flat = tuple(leg for group in groups for leg in group)
    wanted = tuple(merged(group) for group in groups)
    if flat == stored:
        return () if wanted == shape else (_reshape(shape, wanted),)
    axes, permuted_shape = _coarsest(stored, flat, shape)
    steps: Steps = () if sizes_of_axes(axes) == shape else ((f.RESHAPE, sizes_of_axes(axes)),)
    order = [axes.index(axis) for axis in permuted_shape]
    steps += _permute(order)
    now = sizes_of_axes(tuple(permuted_shape))
    return steps if now == wanted else (*steps, _reshape(now, wanted))


def sizes_of_axes(axes: tuple[tuple[Leg, ...], ...]) -> tuple[Size, ...]:
    return tuple(merged(axis) for axis in axes)


def _coarsest(
    stored: tuple[Leg, ...], flat: tuple[Leg, ...], shape: tuple[Size, ...]
) -> tuple[Groups, list[tuple[Leg, ...]]]:
    """The stored axes if no leg order changes inside one of them, else the runs of legs that stay together."""
    by_shape = _split_by(stored, shape)
    for axes in (by_shape, _runs(stored, flat)):
        if axes is None:
            continue
        place = {leg: k for k, leg in enumerate(flat)}
        whole = all(tuple(flat[place[a[0]] : place[a[0]] + len(a)]) == a for a in axes if a)
        if whole and all(axes):
            return axes, sorted(axes, key=lambda axis: place[axis[0]])
    singles = tuple((leg,) for leg in stored)
    return singles, [(leg,) for leg in flat]


def _split_by(stored: tuple[Leg, ...], shape: tuple[Size, ...]) -> Groups | None:
    """`stored` cut where the stored axes end; None where a leg spans two axes."""
    groups: list[tuple[Leg, ...]] = []
    rest = list(stored)
    for size in shape:
        group: list[Leg] = []
        while rest and merged(tuple(group)) != size:
            group.append(rest.pop(0))
        if merged(tuple(group)) != size:
            return None
        groups.append(tuple(group))
    return tuple(groups) if not rest else None


def _runs(stored: tuple[Leg, ...], flat: tuple[Leg, ...]) -> Groups:
    """Maximal runs of stored legs that are neighbours in `flat`, too."""
    place = {leg: k for k, leg in enumerate(flat)}
    starts = [0, *(k for k in range(1, len(stored)) if place[stored[k]] != place[stored[k - 1]] + 1), len(stored)]
    return tuple(stored[a:b] for a, b in pairwise(starts))


def _reshape(shape: tuple[Size, ...], wanted: tuple[Size, ...]) -> tuple[Function, tuple[object, ...]]:
    """The plainest view that reshapes: unsqueeze and squeeze read better than reshape."""
    for k in range(len(wanted)):
        if wanted[k] == 1 and (*wanted[:k], *wanted[k + 1 :]) == shape:
            return f.UNSQUEEZE, (k,)
    for k in range(len(shape)):
        if shape[k] == 1 and (*shape[:k], *shape[k + 1 :]) == wanted:
            return f.SQUEEZE, (k,)
    return f.RESHAPE, wanted or ((),)


def _permute(order: list[int]) -> Steps:
    if order == sorted(order):
        return ()
    moved = [k for k, o in enumerate(order) if k != o]
    if len(order) == 2:
        return ((f.T, ()),)
    if len(moved) == 2:
        return ((f.TRANSPOSE, (moved[0], moved[1])),)
    return ((f.PERMUTE, tuple(order)),)


def copies(store: Store, ref: Ref, groups: Groups) -> bool:
    """Whether that expression has to copy: some group joins legs that are not neighbours in memory."""
    place = {leg: k for k, leg in enumerate(ref.stored)}
    solid = not ref.value.strided
    for group in groups:
        real = store.real(group)
        if any(not solid or place[b] != place[a] + 1 for a, b in pairwise(real)):
            return True
    return False


def copy_work(legs: tuple[Leg, ...]) -> Work:
    return Work(moved=((2, legs),), fresh=((1, legs),))


def placed(store: Store, ref: Ref, groups: Groups) -> Expr:
    """Like `arranged`; where that copies, the copy is a value of its own, so that others can share it."""
    expr = arranged(store, ref, groups)
    if not copies(store, ref, groups):
        return expr
    flat = tuple(leg for group in groups for leg in group)
    return store.add(expr, sizes_of_axes(groups), Kernel.COPY, copy_work(flat))


def copy_seconds(store: Store, ref: Ref, groups: Groups) -> float:
    """What `placed` would cost: nothing for a view or for a copy that is there already.

    A copy runs along its innermost leg; short runs and strides are what makes it slow (measured on a CPU).
    """
    if not copies(store, ref, groups) or store.known(arranged(store, ref, groups)) is not None:
        return 0.0
    seconds = store.rates.seconds(Kernel.COPY, copy_work(ref.stored), store.batch, store.itemsize)
    return seconds * (store.rates.copy_factor + store.rates.copy_run / _run(store, ref, groups))


def _run(store: Store, ref: Ref, groups: Groups) -> int:
    """How many elements lie next to each other both in memory and in the copy, along its innermost leg."""
    flat = store.real(tuple(leg for group in groups for leg in group))
    if not flat:
        return 1
    if ref.value.near is not None:  # a short stride takes what it skips as well
        axes = [k for k, size in enumerate(ref.value.shape) if size != 1]  # a leg may stand for none of size 1
        legs = [leg for leg in ref.stored if leg.size != 1]
        steps = {leg: ref.value.near[k] for k, leg in zip(axes, legs, strict=False) if k in ref.value.near}
        return max(1, size_at(flat[-1].size, store.batch) // steps[flat[-1]]) if flat[-1] in steps else 1
    run, stored = 1, store.real(ref.stored)
    while flat and stored and flat[-1] == stored[-1]:
        run *= size_at(flat.pop().size, store.batch)
        stored.pop()
    return run


def matrix_seconds(store: Store, ref: Ref, head: Groups, rows: tuple[Leg, ...], columns: tuple[Leg, ...]) -> float:
    """What it costs to have a value as [head, rows, columns], possibly as the transpose of a copy."""
    return min(copy_seconds(store, ref, (*head, rows, columns)), copy_seconds(store, ref, (*head, columns, rows)))


def matrix(store: Store, ref: Ref, head: Groups, rows: tuple[Leg, ...], columns: tuple[Leg, ...]) -> Expr:
    """A value as [head, rows, columns]; matmul reads a transposed copy as well as a straight one."""
    straight, turned = (*head, rows, columns), (*head, columns, rows)
    if copy_seconds(store, ref, straight) <= copy_seconds(store, ref, turned):
        return placed(store, ref, straight)
    return Call(f.MT, (placed(store, ref, turned),))
