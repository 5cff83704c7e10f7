"""Lowerings: an ordered table from a product of operands to torch calls. Each row offers plans; the cost decides.

A row is ``(store, product, output legs) -> plans``. Rows are tested against the reference interpreter.
"""

from __future__ import annotations

from functools import partial

from ..diagram import Delta, Leg, Map, Operand, Product, Selection, Tensor, Window
from .arrange import arranged, sizes_of
from .contract import Lowering, Plan, as_tensor, contracted, diagonal, read
from .convolve import convolutions
from .cost import Kernel, Work
from .digits import viewed
from .pairs import sum_of_squares
from .receptive import receptive_fields
from .selections import selected
from .shifts import shifts
from .slices import columns_first
from .store import Ref, Store
from .windows import unfolded

Legs = tuple[Leg, ...]


def squares(store: Store, product: Product, legs: Legs) -> list[Plan]:
    """Σ x²: a norm or a square and a sum, without an intermediate of its own name."""
    (op, *others) = product.operands or (None,)
    if others or not isinstance(op, Map):
        return []
    (tensor,) = op.args
    gone = tuple(leg for leg in dict.fromkeys(tensor.legs) if leg not in legs)
    return [lambda s: sum_of_squares(s, diagonal(s, read(s, tensor)), gone).reordered(legs)]


def selections(store: Store, product: Product, legs: Legs) -> list[Plan]:
    """A selection looks rows up, or adds them at their places."""
    return selected(store, product, legs, WHOLE)


def pooled(store: Store, product: Product, legs: Legs) -> list[Plan]:
    """Of columns, what max pooling and the convolution before it send back, without what pooling scatters."""
    return receptive_fields(store, product, legs, WHOLE)


def digits(store: Store, product: Product, legs: Legs) -> list[Plan]:
    """A leg that others count in mixed radix is read as these."""
    return viewed(store, product, legs, WHOLE)


def unfolding(store: Store, product: Product, legs: Legs) -> list[Plan]:
    """Windows on a tensor become strided views of it; then an ordinary contraction."""
    patterns = [op for op in product.operands if isinstance(op, Window | Selection | Delta)]
    if not patterns or selections(store, product, legs):
        return []
    return [partial(_unfold_all, product=product, legs=legs)]


def _unfold_all(store: Store, product: Product, legs: Legs) -> Ref:
    product = unfolded(store, product, legs)
    operands = [op if isinstance(op, Tensor) else dense(store, op) for op in product.operands]
    return contracted(store, Product(product.scale, tuple(operands)), legs)


def dense(store: Store, operand: Operand) -> Tensor:
    """A window, delta or selection as a 0/1 tensor: right for every pattern, fast for none."""
    if isinstance(operand, Selection):
        return _one_hot(store, operand)
    legs = operand.legs
    if isinstance(operand, Window):
        right = " + ".join(f"{c} * {_arange(leg, legs)}" for c, leg in operand.terms) or "0"
        code = f"({_arange(operand.image, legs)} == {right} + {operand.offset}).to(like)"
    else:
        code = f"({_arange(legs[0], legs)} == {_arange(legs[1], legs)}).to(like)"
    name = store.add(code, sizes_of(legs), Kernel.ELEMENTWISE, Work(moved=((2, legs),)))
    return Tensor(name, legs)


def _arange(leg: Leg, legs: Legs) -> str:
    shape = ", ".join("-1" if other == leg else "1" for other in legs)
    return f"torch.arange({leg.size}, device=like.device).reshape({shape})"


def _one_hot(store: Store, operand: Selection) -> Tensor:
    index = read(store, operand.index)
    inner = tuple(leg for leg in operand.choice if leg not in index.order)
    if inner != operand.choice:
        raise NotImplementedError(f"a selection whose choice is also a leg of its index: {operand}")
    count = 1
    for leg in operand.choice:
        count = count * leg.size
    code = arranged(store, index, tuple((leg,) for leg in index.order))
    code = f"({code}.unsqueeze(-1) == torch.arange({count}, device=like.device)).to(like)"
    legs = (*index.order, *operand.choice)
    name = store.add(
        code, (*sizes_of(index.order), count), Kernel.ELEMENTWISE, Work(moved=((2, legs),))
    )
    return as_tensor(store, Ref(name, legs, legs))


def tiles(store: Store, product: Product, legs: Legs) -> list[Plan]:
    """Of a loop over columns, what is linear in their sum."""
    return columns_first(store, product, legs, WHOLE)


WHOLE: tuple[Lowering, ...] = (squares, convolutions, shifts, selections, pooled, digits, unfolding)
LOWERINGS: tuple[Lowering, ...] = (*WHOLE, tiles)
