"""Sums over samples one row at a time: for long rows what is summed is never in memory as a whole."""

from __future__ import annotations

from ...diagram.core import Leg
from ..program.cost import Kernel, Work, number
from ..program.expr import Call, Expr, Ref
from ..program.functions import Function, Memory, helper
from ..program.store import Store
from .arrange import arranged, sizes_of

Legs = tuple[Leg, ...]

SUM_OF_PRODUCTS = """\
def sum_of_products(x, y):
    # Σ x y over axis 0, one row at a time: the products themselves are never in memory.
    total = x[0] * y[0]
    for one, other in zip(x[1:].unbind(0), y[1:].unbind(0), strict=True):
        total.addcmul_(one, other)
    return total"""

SUM_OF_SHIFTED_SQUARES = """\
def sum_of_shifted_squares(x, y):
    # Σ (x + y)² over axis 0, one row at a time, with the same y for all rows: the sums are never in memory.
    total = (x[0] + y).square_()
    for row in x[1:].unbind(0):
        row = row + y
        total.addcmul_(row, row)
    return total"""

PRODUCTS = helper("sum_of_products", SUM_OF_PRODUCTS, memory=Memory.OWN)
SHIFTED_SQUARES = helper("sum_of_shifted_squares", SUM_OF_SHIFTED_SQUARES, memory=Memory.OWN)


def by_rows(store: Store, whole: Work, factors: tuple[Expr, Expr], read: tuple[Legs, ...], kept: Legs) -> Ref | None:
    """Σ of products over the first axis, if that is faster than `whole`, which builds them."""
    return _called(store, whole, PRODUCTS, factors, read, kept, launches=1)


def shifted_by_rows(store: Store, whole: Work, terms: tuple[Expr, Expr], read: Legs, kept: Legs) -> Ref | None:
    """The same for squares of rows with something added that is equal for all of them."""
    return _called(store, whole, SHIFTED_SQUARES, terms, (read,), kept, launches=2)


def shifted(store: Store, ref: Ref, kept: Legs) -> tuple[Ref, Expr] | None:
    """A value as a sum: of one in the same order, and of one with kept legs only, as it broadcasts over rows."""
    if ref.value.summands is None:
        return None
    large, small = ref.value.summands
    now = dict(zip(large.stored, ref.stored, strict=True))
    legs = tuple(now[leg] for leg in small.order)
    if not set(legs) <= set(kept):
        return None
    shift = arranged(store, small.renamed(legs), tuple((leg,) if leg in legs else () for leg in kept))
    return Ref(large.value, ref.stored, ref.stored), shift


def _called(
    store: Store,
    whole: Work,
    function: Function,
    args: tuple[Expr, Expr],
    read: tuple[Legs, ...],
    kept: Legs,
    launches: int,
) -> Ref | None:
    rows = number(((1, read[0]),), store.batch) / max(1.0, number(((1, kept),), store.batch))
    moved = (*((1, legs) for legs in read), (2, kept))
    work = Work(flops=whole.flops, moved=moved, fresh=((1, kept),), launches=1 + launches * int(rows))
    first, other = (store.rates.seconds(Kernel.REDUCE, each, store.batch, store.itemsize) for each in (work, whole))
    if first >= other:
        return None
    value = store.add(Call(function, args), sizes_of(kept), Kernel.REDUCE, work)
    return Ref(value, kept, kept)
