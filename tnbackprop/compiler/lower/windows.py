"""Windows as strided views: pad, narrow, unfold. No copy is made until a kernel needs one."""

from __future__ import annotations

from ...diagram.core import Leg, Product, Tensor, Window
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Expr, Ref, Slice, Word
from ..program.store import Store
from .arrange import copy_work, in_order, sizes_of
from .contract import read

Legs = tuple[Leg, ...]


def unfolded(store: Store, product: Product, output: Legs) -> Product:
    """The product with every window that slides over one tensor replaced by a view of the tensor."""
    for op in product.operands:
        if isinstance(op, Tensor):
            mine = [w for w in product.operands if isinstance(w, Window) and slides_over(w, op, product, output)]
            if mine:
                view = _view(store, op, mine)
                rest = tuple(other for other in product.operands if other is not op and other not in mine)
                return unfolded(store, Product(product.scale, (view, *rest)), output)
    return product


def turned(product: Product, output: Legs) -> Product:
    """Shifts read from their other side where only that is a view: image = leg + c is leg = image - c."""

    def other(window: Window) -> Window:
        match window.terms:
            case ((1, leg),) if leg not in output and isinstance(leg.size, int):
                holders = [op for op in product.operands if op is not window and leg in op.legs]
                back = Window(leg, ((1, window.image),), -window.offset)
                if len(holders) == 1 and isinstance(holders[0], Tensor) and window.image not in holders[0].legs:
                    return back
        return window

    operands = (other(op) if isinstance(op, Window) else op for op in product.operands)
    return Product(product.scale, tuple(operands))


def slides_over(window: Window, tensor: Tensor, product: Product, output: Legs) -> bool:
    """Whether the window's image is a leg of this tensor only, and the pattern is one that a view can have."""
    image = window.image
    elsewhere = [op for op in product.operands if op not in (window, tensor) and image in op.legs]
    alone = image in tensor.legs and image not in output and not elsewhere
    legs = [leg for _, leg in window.terms]
    plain = len(set(legs)) == len(legs) <= 2 and all(c > 0 and isinstance(leg.size, int) for c, leg in window.terms)
    return alone and plain and isinstance(image.size, int) and not any(leg in tensor.legs for leg in legs)


def reach(window: Window) -> tuple[int, int, int]:
    """Zeros needed on the left, the first index used after that, and the length that the pattern covers."""
    length = 1 + sum(c * (int(leg.size) - 1) for c, leg in window.terms)
    return max(0, -window.offset), max(0, window.offset), length


def padded(store: Store, ref: Ref, windows: list[Window]) -> Expr:
    """The value, with every window's image padded and narrowed to just what the pattern covers."""
    axes = list(ref.order)
    pads = [(0, 0)] * len(axes)
    cuts: list[tuple[int, int, int]] = []
    for window in windows:
        axis, size = axes.index(window.image), int(window.image.size)
        left, first, length = reach(window)
        right = max(0, first + length - (size + left))
        pads[axis] = (left, right)
        if size + left + right != length:
            cuts.append((axis, first, length))
    expr = in_order(store, ref)
    if any(p != (0, 0) for p in pads):
        sizes = zip(sizes_of(ref.order), pads, strict=True)
        shape = tuple(s if isinstance(s, int) and p == (0, 0) else s + sum(p) for s, p in sizes)
        first_axis = next(k for k, p in enumerate(pads) if p != (0, 0))
        amounts = tuple(amount for pad in reversed(pads[first_axis:]) for amount in pad)
        legs = tuple(Leg(leg.name, s) for leg, s in zip(ref.order, shape, strict=True))
        expr = store.add(Call(f.PAD, (expr, amounts)), shape, Kernel.COPY, copy_work(legs))
    for axis, first, length in cuts:
        expr = Call(f.NARROW, (expr, axis, first, length))
    return expr


def _view(store: Store, tensor: Tensor, windows: list[Window]) -> Tensor:
    ref = read(store, tensor)
    expr = padded(store, ref, windows)
    legs = list(ref.order)
    for window in windows:
        axis = legs.index(window.image)
        match window.terms:
            case ():
                expr = Call(f.SELECT, (expr, axis, 0))
                legs.pop(axis)
            case ((step, leg),):
                every = (*(Slice() for _ in range(axis)), Slice(step=step))
                expr = Call(f.ITEM, (expr, every)) if step != 1 else expr
                legs[axis] = leg
            case ((step, leg), (gap, inner)):
                expr = Call(f.UNFOLD, (expr, axis, gap * (int(inner.size) - 1) + 1, step))
                expr = Call(f.ITEM, (expr, (ELLIPSIS, Slice(step=gap)))) if gap != 1 else expr
                legs[axis] = leg
                legs.append(inner)
    last = [term for window in windows if window.image == ref.order[-1] for term in window.terms]
    near = {legs.index(leg): step for step, leg in last}
    value = store.add(expr, sizes_of(tuple(legs)), Kernel.VIEW, strided=True, near=near)
    return Tensor(store.key_of(value), tuple(legs))


ELLIPSIS = Word("...", ...)
