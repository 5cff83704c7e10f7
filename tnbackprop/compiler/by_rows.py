"""Sums over samples one row at a time: for long rows what is summed is never in memory as a whole."""

from __future__ import annotations

from ..diagram import Leg
from .arrange import arranged, sizes_of
from .cost import Kernel, Work, number
from .store import Ref, Store

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

BY_ROWS = {"sum_of_products": SUM_OF_PRODUCTS, "sum_of_shifted_squares": SUM_OF_SHIFTED_SQUARES}


def by_rows(store: Store, whole: Work, codes: tuple[str, str], read: tuple[Legs, ...], kept: Legs) -> Ref | None:
    """Σ of products over the first axis, if that is faster than `whole`, which builds them."""
    return _called(store, whole, "sum_of_products", codes, read, kept, launches=1)


def shifted_by_rows(store: Store, whole: Work, codes: tuple[str, str], read: Legs, kept: Legs) -> Ref | None:
    """The same for squares of rows with something added that is equal for all of them."""
    return _called(store, whole, "sum_of_shifted_squares", codes, (read,), kept, launches=2)


def shifted(store: Store, ref: Ref, kept: Legs) -> tuple[Ref, str] | None:
    """A value as a sum: of one in the same order, and of one with kept legs only, as code that broadcasts over rows."""
    large, small = store.sums.get(store.resolve(ref.name), (None, None))
    if large is None or small is None:
        return None
    now = dict(zip(large.stored, ref.stored, strict=True))
    legs = tuple(now[leg] for leg in small.order)
    if not set(legs) <= set(kept):
        return None
    shift = arranged(store, small.renamed(legs), tuple((leg,) if leg in legs else () for leg in kept))
    return Ref(large.name, ref.stored, ref.stored), shift


def _called(
    store: Store,
    whole: Work,
    function: str,
    codes: tuple[str, str],
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
    store.functions[function] = BY_ROWS[function]
    name = store.add(f"{function}({', '.join(codes)})", sizes_of(kept), Kernel.REDUCE, work, own=True)
    return Ref(name, kept, kept)
