"""Lowerings: an ordered table from a product of operands to torch calls. Each row offers plans; the cost decides.

A row is ``(store, product, output legs) -> plans``. Rows are tested against the reference interpreter.
"""

from __future__ import annotations

from functools import partial

from ...diagram.core import Delta, Leg, Map, Operand, Product, Selection, Size, Tensor, Window, ordered_union
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import Call, Expr, Ref
from ..program.store import Store
from .arrange import in_order, sizes_of
from .by_rows import PRODUCTS, SHIFTED_SQUARES
from .candidate import Candidate, Lowering
from .contract import as_tensor, contracted, diagonal, indices, read
from .convolve import convolutions
from .digits import viewed
from .pairs import sum_of_squares
from .receptive import OF_KERNELS, OF_ROWS, OF_VJP, OF_WIDE_VJP, receptive_fields
from .selections import selected
from .shifts import GRAM, shifts
from .windows import turned, unfolded

Legs = tuple[Leg, ...]

HELPERS = (f.LOOP, PRODUCTS, SHIFTED_SQUARES, GRAM, OF_KERNELS, OF_ROWS, OF_VJP, OF_WIDE_VJP)
"""Functions whose source may stand next to a program."""


def squares(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """Σ x²: a norm or a square and a sum, without an intermediate of its own name."""
    (op, *others) = product.operands or (None,)
    if others or not isinstance(op, Map):
        return []
    (tensor,) = op.args
    gone = tuple(leg for leg in dict.fromkeys(tensor.legs) if leg not in legs)
    return [Candidate(lambda s: sum_of_squares(s, diagonal(s, read(s, tensor)), gone).reordered(legs))]


def unfolding(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """Windows on a tensor become strided views of it; then an ordinary contraction."""
    patterns = [op for op in product.operands if isinstance(op, Window | Selection | Delta)]
    if not patterns or selected(store, product, legs):
        return []
    return [Candidate(partial(_unfold_all, product=product, legs=legs))]


def _unfold_all(store: Store, product: Product, legs: Legs) -> Ref:
    product = unfolded(store, turned(product, legs), legs)
    operands = [op if isinstance(op, Tensor) else dense(store, op) for op in product.operands]
    return contracted(store, Product(product.scale, tuple(operands)), legs)


def dense(store: Store, operand: Operand) -> Tensor:
    """A window, delta or selection as a 0/1 tensor: right for every pattern, fast for none."""
    if isinstance(operand, Selection):
        return _one_hot(store, operand)
    legs = operand.legs
    if isinstance(operand, Window):
        right: Expr | int = 0
        for k, (c, leg) in enumerate(operand.terms):
            term = Call(f.MUL, (c, _arange(store, leg, legs)))
            right = Call(f.ADD, (right, term)) if k else term
        meets = Call(f.EQUAL, (_arange(store, operand.image, legs), Call(f.ADD, (right, operand.offset))))
    else:
        meets = Call(f.EQUAL, (_arange(store, legs[0], legs), _arange(store, legs[1], legs)))
    value = store.add(_as_like(store, meets), sizes_of(legs), Kernel.ELEMENTWISE, Work(moved=((2, legs),)))
    return Tensor(store.key_of(value), legs)


def _arange(store: Store, leg: Leg, legs: Legs) -> Expr:
    counted = Call(f.ARANGE, (leg.size,), (("device", Call(f.DEVICE, (store.like,))),))
    return Call(f.RESHAPE, (counted, *(-1 if other == leg else 1 for other in legs)))


def _as_like(store: Store, expr: Expr) -> Expr:
    return Call(f.TO, (expr, store.like))


def _one_hot(store: Store, operand: Selection) -> Tensor:
    index = indices(store, operand.index)
    if set(operand.choice) & set(index.order):
        return _one_hot_within(store, operand, index)
    count = 1
    for leg in operand.choice:
        count = count * leg.size
    counted = Call(f.ARANGE, (count,), (("device", Call(f.DEVICE, (store.like,))),))
    meets = Call(f.EQUAL, (Call(f.UNSQUEEZE, (in_order(store, index), -1)), counted))
    legs = (*index.order, *operand.choice)
    shape = (*sizes_of(index.order), count)
    value = store.add(_as_like(store, meets), shape, Kernel.ELEMENTWISE, Work(moved=((2, legs),)))
    return as_tensor(store, Ref(value, legs, legs))


def _one_hot_within(store: Store, operand: Selection, index: Ref) -> Tensor:
    """Where a leg of the choice is one of the index: its entries are compared with where they stand themselves."""
    legs = ordered_union(index.order, operand.choice)
    place: Expr | int = 0
    stride: Size = 1
    for k, leg in enumerate(reversed(operand.choice)):
        term = Call(f.MUL, (stride, _arange(store, leg, legs)))
        place, stride = Call(f.ADD, (place, term)) if k else term, stride * leg.size
    flat = Call(f.RESHAPE, (in_order(store, index), *sizes_of(index.order), *(1 for _ in legs[len(index.order) :])))
    value = store.add(
        _as_like(store, Call(f.EQUAL, (flat, place))), sizes_of(legs), Kernel.ELEMENTWISE, Work(moved=((2, legs),))
    )  # fmt: skip
    return Tensor(store.key_of(value), legs)


LOWERINGS: tuple[Lowering, ...] = (squares, convolutions, shifts, selected, receptive_fields, viewed, unfolding)
