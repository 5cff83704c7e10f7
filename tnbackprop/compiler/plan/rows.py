"""Rows: a window on the batch picks some of its samples; what is read there is read in these rows only."""

from __future__ import annotations

from dataclasses import replace

from ...diagram.core import Diagram, Map, N, Operand, Part, Product, Selection, Tensor, Window
from ...errors import InvariantError
from ..lower.arrange import in_order, sizes_of
from ..lower.contract import as_tensor, build, read
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Slice
from ..program.store import Store


def in_rows(store: Store, diagram: Diagram) -> Diagram:
    """The diagram without windows on the batch: a part is computed for all samples, and everything is then sliced."""
    return replace(diagram, products=tuple(_in_rows(store, product) for product in diagram.products))


def _in_rows(store: Store, product: Product) -> Product:
    operands = product.operands
    for window in [op for op in operands if isinstance(op, Window) and op.image.size == N]:
        rest = (op for op in operands if op is not window)
        operands = tuple(_sliced(store, op, window) for op in rest)
    return Product(product.scale, operands)


def _sliced(store: Store, op: Operand, window: Window) -> Operand:
    if window.image not in op.legs:
        return op
    match op:
        case Tensor():
            return _view(store, op, window)
        case Map():
            return Map(op.expr, tuple(_view(store, arg, window) for arg in op.args))
        case Selection():
            return Selection(_view(store, op.index, window), op.choice, op.near)
        case Part():
            built = as_tensor(store, build(store, op.diagram))
            return _view(store, built.rename(dict(zip(op.diagram.legs, op.legs, strict=True))), window)
        case _:
            raise InvariantError(f"{op} has the batch, and cannot be read in the rows of {window}")


def _view(store: Store, tensor: Tensor, window: Window) -> Tensor:
    if window.image not in tensor.legs:
        return tensor
    ref, axis = read(store, tensor), tensor.legs.index(window.image)
    rows = tuple(leg for _, leg in window.terms)
    stop = window.offset + rows[0].size if rows else N
    every = tuple(Slice() for _ in range(axis))
    picked = Slice(window.offset or None, None if stop == N else stop) if rows else window.offset
    expr = Call(f.ITEM, (in_order(store, ref), (*every, picked)))
    legs = (*tensor.legs[:axis], *rows, *tensor.legs[axis + 1 :])
    solid = axis == 0 and ref.order == ref.stored and not ref.value.strided
    return Tensor(store.key_of(store.add(expr, sizes_of(legs), Kernel.VIEW, strided=not solid)), legs)
