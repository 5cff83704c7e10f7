"""Two tensors into one, and one into less: mm, bmm, mul, sum, and elementwise maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import sympy

from ...diagram.core import Leg, Size, argument, ordered_union
from ..program import functions as f
from ..program.cost import Kernel, Work, size_at
from ..program.expr import Call, Expr, Filled, Pointwise, Ref
from ..program.functions import Memory, helper
from ..program.store import Store
from .arrange import (
    Groups,
    alike,
    arranged,
    as_stored,
    copies,
    copy_seconds,
    copy_work,
    matrix,
    matrix_seconds,
    merged,
    placed,
    sizes_of,
)
from .by_rows import by_rows, shifted, shifted_by_rows

Legs = tuple[Leg, ...]
PANELS = 4
SYMMETRIC_PRODUCT = """\
def symmetric_product(x, out=None):
    # xᵀ x in panels of rows. What is left of the diagonal is above it, too, and is read down the columns of a panel,
    # whose rows are a little longer than they have to be: at powers of two the cache has room for few of them.
    size = x.shape[1]
    width = min(-(-size // 4), 384)
    product = x.new_empty(size, size) if out is None else out
    memory = x.new_empty(width, size + 16)
    for k in range(0, size, width):
        rows = x[:, k : k + width].mT
        panel = torch.mm(rows, x[:, k:], out=memory[: len(rows), : size - k])
        product[k : k + width, k:] = panel
        product[k + width :, k : k + width] = panel[:, width:].mT
    return product"""
SYMMETRIC = helper("symmetric_product", SYMMETRIC_PRODUCT, memory=Memory.OWN, into="symmetric_product")
Dims = tuple[int | tuple[int, ...], ...]
"""The argument of a sum over some axes; nothing where they are all."""


def sum_legs(store: Store, ref: Ref, gone: Legs) -> Ref:
    """Σ over legs of one value."""
    if not gone:
        return ref
    kept = tuple(leg for leg in ref.stored if leg not in gone)
    expr, dims = _with_dims(store, ref, gone)
    work = Work(flops=((1, ref.stored),), moved=((1, ref.stored),), fresh=((1, kept),))
    value = store.add(Call(f.SUM, (expr, *dims)), sizes_of(kept), Kernel.REDUCE, work)
    return Ref(value, kept, tuple(leg for leg in ref.order if leg not in gone))


def sum_of_squares(store: Store, ref: Ref, gone: Legs) -> Ref:
    """Σ x² over legs of one value: a norm where they are innermost, else row by row, or a square and a sum."""
    kept = tuple(leg for leg in ref.stored if leg not in gone)
    expr, dims = _with_dims(store, ref, gone)
    innermost = ref.stored[len(ref.stored) - len(gone) :] == tuple(leg for leg in ref.stored if leg in gone)
    if innermost and not ref.value.strided:
        squares = Call(f.SQUARE, (_norm(store, ref, gone, expr, dims),))
        work = Work(flops=((2, ref.stored),), moved=((1, ref.stored),), fresh=((1, kept),))
    else:
        work = Work(flops=((2, ref.stored),), moved=((3, ref.stored),), fresh=((1, ref.stored),))
        if dims == (0,) and (found := _squares_by_rows(store, ref, gone, kept, expr, work)):
            return found.reordered(tuple(leg for leg in ref.order if leg not in gone))
        squares = Call(f.SUM, (Call(f.SQUARE, (expr,)), *dims))
    value = store.add(squares, sizes_of(kept), Kernel.REDUCE, work)
    return Ref(value, kept, tuple(leg for leg in ref.order if leg not in gone))


LONG = 2**16
"""torch's norm adds so many float32 squares one after the other to four digits; of more it is taken in two steps."""


def _norm(store: Store, ref: Ref, gone: Legs, expr: Expr, dims: Dims) -> Expr:
    """The norm along the innermost legs, which are `gone`; of a long row that of the norms of its parts."""
    legs = ref.stored[len(ref.stored) - len(gone) :]
    sizes = [size_at(leg.size, store.batch) for leg in legs]
    if len(legs) > 1 and prod(sizes) > LONG:
        first = min(range(1, len(legs)), key=lambda k: max(prod(sizes[:k]), prod(sizes[k:])))
        kept = ref.stored[: len(ref.stored) - len(gone)]
        parts = arranged(store, ref.reordered(ref.stored), (*((leg,) for leg in kept), legs[:first], legs[first:]))
        inner = Call(f.NORM, (parts,), (("dim", len(kept) + 1),))
        return Call(f.NORM, (inner,), (("dim", len(kept)),))
    return Call(f.NORM, (expr,), (("dim", dims[0] if dims else None),))


def _squares_by_rows(store: Store, ref: Ref, gone: Legs, kept: Legs, expr: Expr, whole: Work) -> Ref | None:
    """Σ x² over the first axis, if that is faster row by row; what is added to all rows, row by row, too."""
    parts = shifted(store, ref, kept)
    if parts is not None:
        both = _with_dims(store, parts[0], gone)[0], parts[1]
        return shifted_by_rows(store, whole, both, ref.stored, kept)
    return by_rows(store, whole, (expr, expr), (ref.stored,), kept)


def _seconds(store: Store, kernel: Kernel, work: Work) -> float:
    return store.rates.seconds(kernel, work, store.batch, store.itemsize)


def _with_dims(store: Store, ref: Ref, gone: Legs) -> tuple[Expr, Dims]:
    """The value with runs of legs merged, and the axes that are summed."""
    groups: list[Legs] = []
    for leg in ref.stored:
        if leg.size != 1 and groups and leg in gone and groups[-1][-1] in gone:
            groups[-1] = (*groups[-1], leg)
        else:
            groups.append((leg,))
    stored = ref.reordered(ref.stored)
    expr = arranged(store, stored, tuple(groups))
    if copies(store, stored, tuple(groups)) and store.known(expr) is None:  # a copy that is there is for free
        groups = [(leg,) for leg in ref.stored]
        expr = arranged(store, stored, tuple(groups))
    dims = tuple(k for k, group in enumerate(groups) if group[0] in gone)
    return store.known(expr) or expr, () if len(dims) == len(groups) == 1 else _dims(dims)


def _dims(axes: tuple[int, ...]) -> Dims:
    return axes if len(axes) == 1 else (axes,)


def elementwise(store: Store, expr: sympy.Expr, args: tuple[Ref, ...]) -> Ref:
    """A map applied to values that broadcast by leg."""
    legs = ordered_union(*(ref.stored for ref in sorted(args, key=lambda r: -len(r.stored))))
    groups: Groups = tuple((leg,) for leg in legs)
    read: list[Expr] = []
    for ref in args:
        own = groups if set(ref.stored) == set(legs) else tuple((leg,) if leg in ref.stored else () for leg in legs)
        read.append(arranged(store, ref, own))
    work = Work(flops=((4, legs),), moved=((1 + len(args), legs),), fresh=((1, legs),))
    if expr == argument(0):
        return Ref(store.add(read[0], sizes_of(legs), Kernel.ELEMENTWISE, work), legs, legs)
    symbols = tuple((argument(k), each) for k, each in enumerate(read))
    made: Expr = Call(f.SQUARE, (read[0],)) if expr == argument(0) ** 2 else Pointwise(expr, symbols)
    return Ref(store.add(made, sizes_of(legs), Kernel.ELEMENTWISE, work, own=True), legs, legs)


def gated(store: Store, value: Ref, gate: Ref) -> Ref:
    """The value where the gate, which has no other legs, is above 0; where it is 0 it is 0, also of an infinity."""
    legs = value.stored
    one, other = (arranged(store, r, tuple((leg,) if leg in r.stored else () for leg in legs)) for r in (value, gate))
    work = Work(flops=((1, legs),), moved=((2, legs), (1, gate.stored)), fresh=((1, legs),))
    made = Filled(f.GATE, (("value", one), ("gate", other)))
    return Ref(store.add(made, sizes_of(legs), Kernel.ELEMENTWISE, work, own=True), legs, value.order)


def contract_pair(store: Store, a: Ref, b: Ref, output: Legs, ordered: bool) -> Ref:
    """Σ a·b over the legs that are not in `output`."""
    private = tuple(leg for leg in a.order if leg not in b.order and leg not in output)
    a = sum_legs(store, a, private)
    b = sum_legs(store, b, tuple(leg for leg in b.order if leg not in a.order and leg not in output))
    summed = tuple(leg for leg in a.stored if leg in b.order and leg not in output)
    if not summed:
        return _multiplied(store, a, b, output if ordered else None)
    ways = [partial(_summed, a=a, b=b, summed=summed, output=output, ordered=ordered)]
    if (known := _known_product(store, a, b)) is not None:
        ways.append(partial(sum_legs, ref=known, gone=summed))
    return store.cheapest(ways) if len(ways) > 1 else ways[0](store)


def _summed(store: Store, a: Ref, b: Ref, summed: Legs, output: Legs, ordered: bool) -> Ref:
    """Σ a·b over legs that both have."""
    left = tuple(leg for leg in a.stored if leg not in b.order)
    right = tuple(leg for leg in b.stored if leg not in a.order)
    if not left and not right:
        return _dotted(store, a, b, summed)
    return _matmul(store, a, b, output, ordered)


def _multiplied(store: Store, a: Ref, b: Ref, wanted: Legs | None) -> Ref:
    """Elementwise product with broadcasting."""
    a, b, legs, factors = _factors(store, a, b, wanted)
    work = Work(flops=((1, legs),), moved=((1, legs), (1, a.stored), (1, b.stored)), fresh=((1, legs),))
    square = factors[0] == factors[1] and a.stored == legs
    expr = Call(f.SQUARE, factors[:1]) if square else Call(f.MUL, factors)
    return Ref(store.add(expr, sizes_of(legs), Kernel.ELEMENTWISE, work), legs, legs)


def _factors(store: Store, a: Ref, b: Ref, wanted: Legs | None) -> tuple[Ref, Ref, Legs, tuple[Expr, Expr]]:
    """The larger factor, the smaller one, the legs of their product, and each as it broadcasts to them."""
    if len(b.stored) > len(a.stored):
        a, b = b, a
    legs = wanted or ordered_union(a.stored, b.stored)
    one, other = (arranged(store, r, tuple((leg,) if leg in r.stored else () for leg in legs)) for r in (a, b))
    return a, b, legs, (one, other)


def _known_product(store: Store, a: Ref, b: Ref) -> Ref | None:
    """The elementwise product, where it has been computed for something else."""
    a, b, legs, factors = _factors(store, a, b, None)
    value = store.known(Call(f.MUL, factors))
    return Ref(value, legs, legs) if value is not None else None


def _dotted(store: Store, a: Ref, b: Ref, summed: Legs) -> Ref:
    """Both operands have the same legs and some are summed: multiply and sum."""
    kept = tuple(leg for leg in a.stored if leg not in summed)
    order = (*kept, *summed)
    groups: Groups = (*((leg,) for leg in kept), summed)
    if a.stored == b.stored == (*summed, *kept):
        order, groups = a.stored, (summed, *((leg,) for leg in kept))
    elif copies(store, a, groups) or copies(store, b, groups) or (store.one_sample and a.stored != order):
        order = a.stored  # as in memory
        groups = tuple((leg,) for leg in a.stored)
    dims = _dims(tuple(k for k, group in enumerate(groups) if group[0] in summed))
    factors = arranged(store, a, groups), arranged(store, b, groups)
    work = Work(flops=((2, order),), moved=((4, order),), fresh=((1, order),))
    if dims == (0,) and (found := by_rows(store, work, factors, (order, order), kept)):
        return found
    expr = Call(f.SUM, (Call(f.MUL, factors), *dims))
    return Ref(store.add(expr, sizes_of(kept), Kernel.REDUCE, work), kept, kept)


def _weighed(store: Store, large: Ref, small: Ref, summed: Legs) -> Ref:
    """Σ large·small over all legs of the small one, in the memory order of the large one: no copy of it."""
    kept = tuple(leg for leg in large.stored if leg not in summed)
    weights = arranged(store, small, tuple((leg,) if leg in small.stored else () for leg in large.stored))
    dims = _dims(tuple(k for k, leg in enumerate(large.stored) if leg in summed))
    expr = Call(f.SUM, (Call(f.MUL, (as_stored(store, large), weights)), *dims))
    return Ref(store.add(expr, sizes_of(kept), Kernel.REDUCE, _weighing(large)), kept, kept)


def _weighing(large: Ref) -> Work:
    return Work(flops=((2, large.stored),), moved=((4, large.stored),), fresh=((1, large.stored),))


def _weighing_seconds(store: Store, large: Ref, small: Ref) -> float:
    order = tuple((leg,) if leg in small.stored else () for leg in large.stored)
    copies_small = copy_seconds(store, small, tuple(group for group in order if group))
    return copies_small + _seconds(store, Kernel.REDUCE, _weighing(large))


@dataclass(frozen=True)
class Product2:
    """One way to write Σ first·second as mm or bmm: legs of the result are head + left + right."""

    first: Ref
    second: Ref
    head: Legs
    left: Legs
    summed: Legs
    right: Legs

    @property
    def legs(self) -> Legs:
        return (*self.head, *self.left, *self.right)

    @property
    def kernel(self) -> Kernel:
        return Kernel.BMM if self.head else Kernel.MM

    @property
    def work(self) -> Work:
        moved = ((1, self.first.stored), (1, self.second.stored), (1, self.legs))
        return Work(flops=((2, (*self.legs, *self.summed)),), moved=moved, fresh=((1, self.legs),))

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(merged(group) for group in (self.head, self.left, self.right) if group)

    @property
    def leading(self) -> Groups:
        return (self.head,) if self.head else ()

    def seconds(self, store: Store, output: Legs | None) -> float:
        """The kernel, the copies that its operands need, and the copy that a wrong order of the result costs."""
        total = matrix_seconds(store, self.first, self.leading, self.left, self.summed)
        total += matrix_seconds(store, self.second, self.leading, self.summed, self.right)
        if output is not None and store.real(self.legs) != store.real(output):
            total += _seconds(store, Kernel.COPY, copy_work(self.legs))
        if store.one_sample and self.filled(store):  # for every sample; before a loop it is nothing
            total += _seconds(store, Kernel.COPY, copy_work(self.second.stored))
        return total + _seconds(store, self.kernel, self.work) * self._slower(store)

    def _slower(self, store: Store) -> float:
        """Matmul kernels are made for many columns: few of them had better be rows."""
        matrices = self.head or (self.left and self.right)
        narrow = matrices and size_at(merged(self.right), store.batch) < store.rates.narrow
        return store.rates.narrow_factor if narrow else 1.0

    def expr(self, store: Store) -> Expr:
        """mv, mm, or bmm with the missing axis put in and taken out again."""
        if not self.head and not self.left:
            vector = placed(store, self.first, (self.summed,))
            whole = matrix(store, self.second, (), self.right, self.summed)
            return Call(f.MV, (whole, alike(store, whole, vector)))
        one = matrix(store, self.first, self.leading, self.left, self.summed)
        if not self.head and not self.right:
            return Call(f.MV, (one, alike(store, one, placed(store, self.second, (self.summed,)))))
        two = alike(store, one, matrix(store, self.second, self.leading, self.summed, self.right))
        if not self.head:
            return Call(SYMMETRIC, (two,)) if self.symmetric(store) else Call(f.MM, (one, two))
        extra = self.filled(store)
        width = int(merged(self.right)) if extra else 0
        if extra:
            shape = (*(merged(group) for group in (self.head, self.summed)), width + extra)
            padded = Call(f.PAD, (two, (0, extra)))
            two = store.add(padded, shape, Kernel.COPY, copy_work(self.second.stored))
        found: Expr = Call(f.BMM, (one, two))
        found = Call(f.NARROW, (found, 2, 0, width)) if extra else found
        found = found if self.left else Call(f.SQUEEZE, (found, 1))
        return found if self.right else Call(f.SQUEEZE, (found, -1))

    def symmetric(self, store: Store) -> bool:
        """Whether it is xᵀ x with so many rows that half the multiplies are saved in panels."""
        first, second = self.first, self.second
        if self.head or first.value is not second.value or not store.rates.symmetric:
            return False
        places = ([ref.stored.index(leg) for leg in legs] for ref, legs in (
            (first, (*self.left, *self.summed)), (second, (*self.right, *self.summed))
        ))  # fmt: skip
        rows, summed = merged(self.right), size_at(merged(self.summed), store.batch)
        large = isinstance(rows, int) and min(rows, 2 * summed) >= store.rates.symmetric
        return large and len({tuple(each) for each in places}) == 1

    def work_of(self, store: Store) -> Work:
        """With panels of a fourth of the rows, 5/8 of the multiplies."""
        if not self.symmetric(store):
            return self.work
        panel = Leg("panel", int(merged(self.right)) // PANELS)
        return replace(self.work, flops=((PANELS + 1, (panel, *self.right, *self.summed)),), launches=3 * PANELS)

    def filled(self, store: Store) -> int:
        """How many columns of zeros are put to an odd number of them that stay the same in all rounds of a loop."""
        columns = merged(self.right)
        odd = self.head and isinstance(columns, int) and columns > 1 and columns % 2
        stays = (store.rounds > 1 or store.one_sample) and not store.varies(self.second.value)
        return -int(columns) % store.rates.odd if odd and stays else 0


def _matmul(store: Store, a: Ref, b: Ref, output: Legs, ordered: bool) -> Ref:
    """The orientation that needs the fewest copies and gives the order asked for."""
    ways = [_oriented(*pair, output, sort) for sort in (ordered, False) for pair in ((a, b), (b, a))]
    ways += [replace(w, summed=tuple(leg for leg in w.second.stored if leg in w.summed)) for w in ways]
    best = min(dict.fromkeys(ways), key=lambda way: way.seconds(store, output if ordered else None))
    if not best.head and not (best.left and best.right):
        large, small = (best.first, best.second) if best.left else (best.second, best.first)
        if _weighing_seconds(store, large, small) < best.seconds(store, output if ordered else None):
            return _weighed(store, large, small, best.summed)
    filled = best.filled(store) > 0
    value = store.add(best.expr(store), best.shape, best.kernel, best.work_of(store), strided=filled)
    return Ref(value, best.legs, best.legs)


def _oriented(first: Ref, second: Ref, output: Legs, sort: bool) -> Product2:
    """first @ second, the legs of each group in the order of the output or of the memory."""

    def along(legs: Legs) -> Legs:
        return tuple(sorted(legs, key=output.index)) if sort else legs

    shared = tuple(leg for leg in first.stored if leg in second.stored)
    return Product2(
        first,
        second,
        head=along(tuple(leg for leg in shared if leg in output)),
        left=along(tuple(leg for leg in first.stored if leg not in second.stored)),
        summed=tuple(leg for leg in shared if leg not in output),
        right=along(tuple(leg for leg in second.stored if leg not in first.stored)),
    )
