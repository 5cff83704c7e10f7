"""Selections as index_select and index_add_: no one-hot of [positions, choices] is made."""

from __future__ import annotations

from functools import partial
from itertools import chain

import sympy

from ...diagram.core import Diagram, Leg, Operand, Product, Selection, Size, Tensor, Window, ordered_union
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import Call, Expr, Ref, Slice, Value
from ..program.store import Store
from .arrange import arranged, merged, placed, sizes_of
from .candidate import Candidate, Made, Then
from .contract import as_tensor, indices

Legs = tuple[Leg, ...]


def selected(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """The first selection of the product that can be a look-up (its choice is summed) or a scatter (it is kept)."""
    for op in product.operands:
        if isinstance(op, Selection) and op.choice:
            others = [other for other in product.operands if other is not op]
            kept = [leg for leg in op.choice if leg in legs]
            if set(op.choice) & set(op.index.legs) or not all(_fits(op, other) for other in others):
                continue
            holders = _legs([other for other in others if not isinstance(other, Selection)])
            alike = any(isinstance(other, Selection) and other.choice == op.choice for other in others)
            if len(kept) == len(op.choice):
                return [Candidate(partial(_scattered, op=op, others=others, legs=legs))]
            if not kept and (set(op.choice) <= set(holders) or (alike and not set(op.choice) & set(holders))):
                return [Candidate(partial(_looked_up, op=op, others=others, legs=legs))]
    return []


def _fits(op: Selection, other: Operand) -> bool:
    """Another selection shares the whole choice or nothing of it."""
    outer = not set(op.choice) & set(other.legs)
    return outer or not isinstance(other, Selection) or (other.choice == op.choice and not _within(op, other))


def _within(op: Selection, other: Selection) -> bool:
    return bool(set(op.choice) & set(other.index.legs))


def _legs(operands: list[Operand]) -> Legs:
    return ordered_union(*(op.legs for op in operands))


def _of(product: list[Operand], legs: Legs) -> Diagram:
    return Diagram(legs, (Product(sympy.Integer(1), tuple(product)),))


def _agreeing(store: Store, op: Selection, others: list[Operand]) -> list[Operand]:
    """Other selections with the same choice only say where the two indices are equal."""
    return [
        _equal(store, op, other) if isinstance(other, Selection) and other.choice == op.choice else other
        for other in others
    ]


def _equal(store: Store, one: Selection, other: Selection) -> Tensor:
    """[index, index'] -> 1 where both choose the same."""
    refs = [indices(store, op.index) for op in (one, other)]
    legs = ordered_union(refs[0].order, refs[1].order)
    first, second = (arranged(store, r, tuple((leg,) if leg in r.order else () for leg in legs)) for r in refs)
    meets = Call(f.AND, (Call(f.EQUAL, (first, second)), _inside(first, merged(one.choice))))
    work = Work(moved=((2, legs),), fresh=((1, legs),))
    value = store.add(Call(f.TO, (meets, store.like)), sizes_of(legs), Kernel.ELEMENTWISE, work)
    return Tensor(store.key_of(value), legs)


def _inside(index: Expr, count: Size) -> Expr:
    return Call(f.AND, (Call(f.AT_LEAST, (index, 0)), Call(f.LESS, (index, count))))


def _looked_up(store: Store, op: Selection, others: list[Operand], legs: Legs) -> Candidate:
    """Σ_c [index = c] X[c, …] Y[c, …] = X[index, …] Y[index, …]."""
    others = _agreeing(store, op, others)
    tables = _tables(op, others, legs)
    rest = [other for other in others if not any(other in joined for joined in tables)]
    parts = []
    for joined in tables:
        needed = {*legs, *_legs(rest), *op.index.legs, *_legs([o for o in others if o not in joined])}
        free = tuple(leg for leg in _legs(joined) if leg not in op.choice and leg in needed)
        parts.append(_of(joined, (*free, *op.choice)))
    return Candidate(partial(_rows_of, op=op, rest=tuple(rest), legs=legs), tuple(parts))


def _rows_of(store: Store, *tables: Ref, op: Selection, rest: tuple[Operand, ...], legs: Legs) -> Made:
    """The rows of one table after the other; then what is left of the product."""
    if not tables:
        return _of(list(rest), legs)
    table, *others = tables
    splits = _splits(table, op, indices(store, op.index).order)
    ways = [partial(rows, op=op, table=table, split=split) for rows in (_rows, _padded_rows) for split in splits]

    def go_on(store: Store, found: Ref) -> Made:
        return _rows_of(store, *others, op=op, rest=(*rest, as_tensor(store, found)), legs=legs)

    return Then(tuple(map(Candidate, ways)), go_on)


def _tables(op: Selection, others: list[Operand], legs: Legs) -> list[list[Operand]]:
    """What is looked up, together where a leg is summed that nothing else has; a window with what it is a window on."""
    joined = [other for other in others if set(op.choice) & set(other.legs)]
    images = {o.image for o in joined if isinstance(o, Window)} - {*legs, *op.index.legs, *op.choice}
    joined += [other for other in others if other not in joined and images & set(other.legs)]
    outer = {*legs, *op.index.legs, *op.choice, *_legs([other for other in others if other not in joined])}
    tables: list[list[Operand]] = []
    for operand in joined:
        linked = [table for table in tables if set(operand.legs) & set(_legs(table)) - outer]
        tables = [table for table in tables if table not in linked] + [[*chain(*linked), operand]]
    every = all(set(op.choice) <= set(_legs(table)) for table in tables)
    return tables if every or not joined else [joined]


def _splits(table: Ref, op: Selection, index: Legs) -> list[tuple[Legs, Legs, Legs]]:
    """The legs of a look-up: leading, own, trailing: what goes on from the choice in memory, or all there is."""
    last = max(table.stored.index(leg) for leg in op.choice)
    found = []
    for start in (last + 1, 0):
        trailing = tuple(leg for leg in table.stored[start:] if leg not in (*index, *op.choice))
        leading = tuple(leg for leg in table.stored if leg not in (*op.choice, *trailing))
        found.append((leading, tuple(leg for leg in index if leg not in leading), trailing))
    return list(dict.fromkeys(found))


def _rows(store: Store, op: Selection, table: Ref, split: tuple[Legs, Legs, Legs]) -> Ref:
    """The rows of a table [leading, choice, trailing] that an index [leading, own] names: [leading, own, trailing]."""
    leading, own, trailing = split
    outside, flat = _flat(store, indices(store, op.index), leading, own, op.choice, 0)
    rows = Call(f.INDEX_SELECT, (placed(store, table, ((*leading, *op.choice), *_axis(trailing))), 0, flat))
    out = (*leading, *own, *trailing)
    mask = Call(f.RESHAPE, (outside, -1, *([1] if trailing else [])))
    work = Work(moved=((3, out),), fresh=((1, out),), launches=2)
    expr = Call(f.MASKED_FILL, (rows, mask, 0))
    return Ref(store.add(expr, _merged(leading + own, trailing), Kernel.ELEMENTWISE, work), out, out)


def _padded_rows(store: Store, op: Selection, table: Ref, split: tuple[Legs, Legs, Legs]) -> Ref:
    """The same from a table with a row of zeros more, for an index outside: better where more rows are looked up."""
    leading, own, trailing = split
    rows, out = (*leading, *op.choice), (*leading, *own, *trailing)
    _, flat = _flat(store, indices(store, op.index), leading, own, op.choice, merged(rows))
    padding = (0, 0, 0, 1) if trailing else (0, 1)
    expr = Call(f.PAD, (arranged(store, table, (rows, *_axis(trailing))), padding))
    work = Work(moved=((4, (*rows, *trailing)),), fresh=((2, (*rows, *trailing)),))
    padded = store.add(expr, (merged(rows) + 1, *_merged((), trailing)[1:]), Kernel.COPY, work, own=True)
    work = Work(moved=((2, out),), fresh=((1, out),))
    found = Call(f.INDEX_SELECT, (padded, 0, flat))
    return Ref(store.add(found, _merged(leading + own, trailing), Kernel.ELEMENTWISE, work), out, out)


def _merged(rows: Legs, trailing: Legs) -> tuple[Size, ...]:
    return (merged(rows), *(merged(group) for group in _axis(trailing)))


def _scattered(store: Store, op: Selection, others: list[Operand], legs: Legs) -> Candidate:
    """Y[c, …] = Σ [index = c] X[index's legs, …]: rows are added at their places."""
    others = _agreeing(store, op, others)
    holders = [other for other in others if set(op.choice) & set(other.legs)]
    rest = [other for other in others if other not in holders]
    needed = {*legs, *_legs(holders)}
    free = tuple(leg for leg in _legs(rest) if leg in needed and leg not in op.index.legs)
    index = indices(store, op.index)
    scatter = partial(_added, op=op, index=index, holders=tuple(holders), kept=frozenset(needed), legs=legs)
    return Candidate(scatter, (_of(rest, (*index.order, *free)),))


def _added(
    store: Store, values: Ref, op: Selection, index: Ref, holders: tuple[Operand, ...], kept: frozenset[Leg], legs: Legs
) -> Made:
    """Rows of values, added at their places; then what else has the choice."""
    own = tuple(leg for leg in index.order if leg not in kept)
    last = max((values.stored.index(leg) for leg in index.order), default=-1)
    trailing = tuple(leg for leg in values.stored[last + 1 :] if leg not in index.order)
    leading = tuple(leg for leg in values.stored if leg not in own and leg not in trailing)
    count = merged((*leading, *op.choice))
    _, flat = _flat(store, index, leading, own, op.choice, count)
    source = placed(store, values, ((*leading, *own), *_axis(trailing)))
    out = (*leading, *op.choice, *trailing)
    shape = (count, *(merged(group) for group in _axis(trailing)))
    zeros = Call(f.NEW_ZEROS, (values.value, count + 1, *shape[1:]))
    expr = Call(f.ITEM, (Call(f.INDEX_ADD, (zeros, 0, flat, source)), Slice(stop=count)))
    work = Work(moved=((3, (*leading, *own, *trailing)), (2, out)), fresh=((1, out),), launches=2)
    ref = Ref(store.add(expr, shape, Kernel.REDUCE, work), out, out)
    return _of([as_tensor(store, ref), *holders], legs) if holders else ref.reordered(legs)


def _axis(legs: Legs) -> tuple[Legs, ...]:
    return (legs,) if legs else ()


def _flat(store: Store, index: Ref, leading: Legs, own: Legs, choice: Legs, other: Size) -> tuple[Value, Value]:
    """[leading, own] -> whether the index is outside the choice, and its place in [leading, choice] or `other`."""
    axes = tuple((leg,) if leg in index.order else () for leg in leading)
    count, every = merged(choice), (*leading, *own)
    at = arranged(store, index, (*axes, own))
    work = Work(moved=((2, every),), launches=3)
    beyond = Call(f.OR, (Call(f.LESS, (at, 0)), Call(f.AT_LEAST, (at, count))))
    outside = store.add(beyond, (*_kept(axes), merged(own)), Kernel.ELEMENTWISE, work)
    place = at
    if leading:
        counted = Call(f.ARANGE, (merged(leading),), (("device", Call(f.DEVICE, (store.like,))),))
        starts = Call(f.RESHAPE, (counted, *sizes_of(leading), 1))
        place = Call(f.ADD, (at, Call(f.MUL, (starts, count))))
    chosen: Expr = Call(f.WHERE, (outside, other, place))
    chosen = Call(f.RESHAPE, (chosen, -1)) if leading else chosen
    flat = store.add(chosen, (merged(every),), Kernel.ELEMENTWISE, work)
    return (outside if axes == tuple((leg,) for leg in leading) else _spread(store, outside, leading, own)), flat


def _spread(store: Store, mask: Value, leading: Legs, own: Legs) -> Value:
    """The mask for legs that the index does not have."""
    shape = (*sizes_of(leading), merged(own))
    return store.add(Call(f.EXPAND, (mask, *shape)), shape, Kernel.VIEW, strided=True)


def _kept(axes: tuple[Legs, ...]) -> tuple[Size, ...]:
    return tuple(merged(group) for group in axes)
