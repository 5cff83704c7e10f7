"""Steps for the columns at the model's output: all of them before a loop, or drawn one round at a time inside."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from ...diagram.core import BATCH, Leg, N, Size, hint_of
from ...notation.bind import CURVATURE, HESSIAN_ROOT, NOISE
from ..lower.arrange import arranged, in_order, sizes_of
from ..lower.contract import build
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Expr, Lambda, Ref, Value
from ..program.store import Store
from ..sweep.derived import Arriving, Basis, Columns, Formula, Given, Noise
from ..sweep.roots import LossRoot
from ..translate.graph import Graph
from .definite import in_double, smallest_eigenvalue
from .forward import EACH, fill
from .hessian_root import hessian_root
from .labels import drawn_gradient

Filling = Callable[[Expr], Expr]


def root_steps(
    store: Store, graph: Graph, columns: Columns, checks: dict[str, Value]
) -> dict[str, Value]:
    """What a loop runs over: variable -> the value whose rows it takes (the columns or their noise; their weights).

    Where all columns are propagated together there is no loop, and the rows are entered under the variable's name.
    """
    for noise in columns.noises:
        _noise(store, graph, columns, noise)
    if isinstance(columns.start, Formula):
        return {}
    if isinstance(columns.start, Given):
        for name, handed in ((columns.variable, columns.start.shape), (columns.weight, (columns.count, N))):
            if name and name not in store:
                store.given(name, handed)
        return {}
    if isinstance(columns.start, Basis):
        return _basis(store, graph, columns, columns.start)
    root, number = columns.start, columns.number
    if root.labels is not None:
        store.note = f"gradients of the labels that {root.labels.by} draws"
        return _drawn(store, columns, root, drawn_gradient(store, graph, root, root.labels))
    store.note = "root of the loss Hessian"
    code, shape = root.root.sample if columns.samples else root.root.code, root.output.shape
    rows: dict[str, Value] = {}
    given: dict[str, Expr] = {}
    if root.curvature is not None:
        given[CURVATURE] = weights = _curvature(store, root, number, checks)
        if root.signed:
            rows |= _rows(store, columns, columns.weight, _signs(root, root.curvature.legs, weights), (N,))
            given[CURVATURE] = Call(f.ABS, (weights,))
    if root.calls:
        given[HESSIAN_ROOT], extra = hessian_root(store, graph, root, number)
        if root.signed:
            rows |= _rows(store, columns, columns.weight, extra, (N,))
        else:
            assert isinstance(extra, Value)
            checks[f"indefinite_{number}"] = extra
    if columns.samples:
        return _drawn(store, columns, root, lambda noise: fill(store, code, {**given, NOISE: noise}))
    return _rows(store, columns, columns.variable, fill(store, code, given), shape) | rows


def _curvature(
    store: Store, root: LossRoot, number: int, checks: dict[str, Value]
) -> Value:
    """A diagonal loss Hessian. Its entries are blocks of their own; in float64, so that their signs are right."""
    assert root.curvature is not None
    if root.positive:
        return _ordered(store, build(store, root.curvature))
    lower = root.output.dtype != torch.float64
    diagram = in_double(store, root.curvature) if lower else root.curvature
    exact, output = _ordered(store, build(store, diagram)), store.find(root.output.name)
    entries = (exact, Call(f.ABS, (exact,)))
    if not root.signed:
        checks[f"indefinite_{number}"] = smallest_eigenvalue(store, entries, output, root.scale, torch.float64)
    if not lower:
        return exact
    return store.add(Call(f.TO, (exact, Call(f.DTYPE, (output,)))), exact.shape, Kernel.NATIVE)


def _signs(root: LossRoot, legs: tuple[Leg, ...], weights: Value) -> Expr:
    """Those of the columns, [columns, N], from the weight of each position of a sample."""
    signs: Expr = Call(f.SIGN, (weights,))
    own = [k for k, leg in enumerate(legs) if leg != BATCH]
    if len(own) == len(legs):
        return Call(f.EXPAND, (signs, root.columns, N))
    places = prod(int(legs[k].size) for k in own)
    turned = Call(f.RESHAPE, (Call(f.PERMUTE, (signs, *own, legs.index(BATCH))), 1, places, N))
    return Call(f.RESHAPE, (Call(f.EXPAND, (turned, root.columns // places, places, N)), root.columns, N))


def _ordered(store: Store, ref: Ref) -> Value:
    """A built value in the order of its legs."""
    if ref.order == ref.stored:
        return ref.value
    return store.add(in_order(store, ref), sizes_of(ref.order), Kernel.VIEW, strided=True)


def _basis(
    store: Store, graph: Graph, columns: Columns, basis: Basis
) -> dict[str, Value]:
    """One-hot columns with what arrives where they are, and their weights."""
    store.note = f"columns at {hint_of(basis.value)}"
    several = basis.value in graph.values and not store.one_dtype  # the value's may not be that of the parameters
    dtype = graph.values[basis.value].dtype if several else Call(f.DTYPE, (store.like,))
    eye = Call(f.EYE, (basis.own,), (("dtype", dtype), ("device", Call(f.DEVICE, (store.like,)))))
    legs = tuple(leg for leg in columns.legs if leg not in columns.lead)
    shape, once = sizes_of(legs), tuple(1 if leg == BATCH else leg.size for leg in legs)
    expr: Expr = Call(f.RESHAPE, (eye, basis.own, *once))
    if basis.arriving:
        arriving = (Call(f.RESHAPE, (store.find(a.cotangent), a.columns, *shape)) for a in basis.arriving)
        expr = Call(f.CAT, ([Call(f.EXPAND, (expr, basis.own, *shape)), *arriving],))
    rows = _rows(store, columns, columns.variable, expr, shape)
    if basis.weight is not None:
        ref = build(store, basis.weight)
        expr = arranged(store, ref, (tuple(leg for leg in ref.order if leg != BATCH), (BATCH,)))
        if basis.arriving:
            expr = Call(f.CAT, ([expr, *(_weights(store, a) for a in basis.arriving)],))
        rows |= _rows(store, columns, columns.weight, expr, (N,))
    return rows


def _weights(store: Store, arriving: Arriving) -> Expr:
    size = (arriving.columns, N)
    return Call(f.RESHAPE, (store.find(arriving.weight), *size)) if arriving.weight else Call(
        f.NEW_ONES, (store.like, *size)
    )


def _rows(store: Store, columns: Columns, variable: str, expr: Expr, shape: tuple[Size, ...]) -> dict[str, Value]:
    """All rows at once, with rows of zeros to fill up the last round."""
    rows = columns.rounds * int(columns.width)
    if rows > columns.count:
        amounts = (*(0 for _ in range(2 * len(shape))), 0, rows - int(columns.count))
        expr = Call(f.PAD, (expr, amounts))
    hint = f"root_{columns.number}" if variable == columns.variable else f"{hint_of(variable)}_rows"
    root = store.add(expr, (rows, *shape), Kernel.NATIVE, hint=hint)
    _entered(store, columns, variable, root, shape)
    return {variable: root}


def _noise(store: Store, graph: Graph, columns: Columns, noise: Noise) -> None:
    """Numbers of more than 16 bits are drawn, and what is made of them is in the dtype of the output."""
    dtype, shape = graph.values[columns.start.value].dtype, sizes_of(noise.legs)
    if dtype.itemsize > 2:
        store.noise(noise.name, shape)
        return
    drawn = store.noise(f"{noise.name}:drawn", shape)
    store.name(noise.name, store.add(Call(f.TO, (drawn, dtype)), shape, Kernel.NATIVE))


ROW_BY_ROW = """\
def row_by_row(function, rows):
    # What the function gives for each row: one value at a time next to all of them.
    first = function(rows[0])
    found = first.new_empty(len(rows), *first.shape)
    found[0] = first
    del first
    for own, row in zip(found[1:], rows[1:], strict=True):
        own.copy_(function(row))
    return found"""
BY_ROWS = f.helper("row_by_row", ROW_BY_ROW)


def _drawn(store: Store, columns: Columns, root: LossRoot, fill: Filling) -> dict[str, Value]:
    """A column for each row of noise, which has more bits than a column of 16: those draw too few different numbers."""
    shape, own = root.output.shape, root.noise_shape()
    noise = store.noise(columns.noise, (columns.samples, *own))
    draw = columns.draw
    _entered(store, columns, draw, noise, own)
    expr: Expr = fill(EACH if columns.lead else store.find(draw))
    if columns.lead and root.root.by_position:
        expr = Call(BY_ROWS, (Lambda((EACH,), expr), store.find(draw)))
    elif columns.lead:
        expr = Call(f.APPLY, (Call(f.VMAP, (Lambda((EACH,), expr),)), store.find(draw)))
    expr = Call(f.MUL, (expr, columns.samples**-0.5)) if columns.samples > 1 else expr
    if root.output.dtype.itemsize == 2:
        expr = Call(f.TO, (expr, root.output.dtype))
    whole = (*sizes_of(columns.lead), *shape)
    drawn = store.add(
        expr, whole, Kernel.NATIVE, hint=hint_of(columns.variable), alone=True, own=False
    )
    store.name(columns.variable, drawn)
    return {draw: noise}


def _entered(store: Store, columns: Columns, name: str, rows: Value, shape: tuple[Size, ...]) -> None:
    """The loop's variable; without a loop, the rows themselves."""
    if columns.looped:
        store.given(name, (*sizes_of(columns.lead), *shape))
    elif columns.lead:
        store.name(name, rows)
    else:
        only = Call(f.SQUEEZE, (rows, 0))
        store.name(name, store.add(only, shape, Kernel.VIEW, hint=hint_of(name)))
