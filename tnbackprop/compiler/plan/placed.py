"""Terms that stand at some indices of one leg and are zero elsewhere: the cotangents of a split go side by side.

What reads slices of a value (`chunk`, `split`, `unbind`, heads in one projection) sends terms Π[i=a+first] t[a]. Their
sum is a concatenation: nothing is multiplied by patterns, and nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...diagram.core import Diagram, Product, Window
from ..lower.arrange import copy_work, sizes_of
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Expr, Ref
from ..program.store import Store


@dataclass(frozen=True)
class Placed:
    """What stands at the indices first … first + length - 1 of an axis; `block` has a leg for them if they are many."""

    term: Diagram
    axis: int
    first: int
    length: int
    block: Diagram

    @property
    def end(self) -> int:
        return self.first + self.length


def placed(term: Diagram) -> Placed | None:
    """The term by its place; None where it has none, or all of an axis."""
    if len(term.products) != 1:
        return None
    (product,) = term.products
    windows = (op for op in product.operands if isinstance(op, Window))
    return next((found for window in windows if (found := _at(term, product, window)) is not None), None)


def _at(term: Diagram, product: Product, window: Window) -> Placed | None:
    image, others = window.image, tuple(op for op in product.operands if op is not window)
    if image not in term.legs or any(image in op.legs for op in others) or not isinstance(image.size, int):
        return None
    inner = tuple(leg for _, leg in window.terms)
    if len(inner) > 1 or any(c != 1 or leg in term.legs or not isinstance(leg.size, int) for c, leg in window.terms):
        return None
    axis, length = term.legs.index(image), int(inner[0].size) if inner else 1
    if window.offset < 0 or window.offset + length > image.size or length == image.size:
        return None
    legs = (*term.legs[:axis], *inner, *term.legs[axis + 1 :])
    return Placed(term, axis, window.offset, length, Diagram(legs, (Product(product.scale, others),)))


def side_by_side(terms: Iterable[Diagram]) -> tuple[list[list[Placed]], list[Diagram]]:
    """Groups of terms that do not meet along an axis, from the first index on; and what has no place."""
    found = [(term, placed(term)) for term in terms]
    rest = [term for term, place in found if place is None]
    groups: list[list[Placed]] = []
    for each in sorted((place for _, place in found if place is not None), key=lambda place: (place.axis, place.first)):
        fits = [group for group in groups if group[-1].axis == each.axis and group[-1].end <= each.first]
        groups += [] if fits else [[]]
        (fits or groups[-1:])[0].append(each)
    return groups, rest


def joined(store: Store, group: list[Placed], built: Callable[[Diagram, tuple[object, ...]], Expr]) -> Ref:
    """The sum of a group, with zeros in its gaps; `built` is a block in a shape."""
    legs = group[0].term.legs
    axis, whole = group[0].axis, int(legs[group[0].axis].size)

    def shape(length: int) -> tuple[object, ...]:
        sizes = list(sizes_of(legs))
        return (*sizes[:axis], length, *sizes[axis + 1 :])

    parts: list[Expr] = []
    end = 0
    for place in group:
        block = built(place.block, shape(place.length))
        if place.first > end:
            parts.append(Call(f.NEW_ZEROS, (block, *shape(place.first - end))))
        parts.append(block)
        end = place.end
    if end < whole:
        parts.append(Call(f.NEW_ZEROS, (parts[-1], *shape(whole - end))))
    value = store.add(Call(f.CAT, (parts, axis)), sizes_of(legs), Kernel.COPY, copy_work(legs), own=True)
    return Ref(value, legs, legs)
