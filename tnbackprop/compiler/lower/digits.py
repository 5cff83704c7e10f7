"""Digits: what has a leg that a window counts in mixed radix is built on its own, and then a view of it has the digits.

A slice of a flattened weight meets the weight's own legs so: Σ_i Π[i = 30·o + r] Π[i = s + 5] g[n, s]. As a table of
0 and 1 the first window has the square of the weight's elements.
"""

from __future__ import annotations

import sympy

from ...diagram.core import Diagram, Leg, Operand, Product, Tensor, Window, ordered_union
from ...diagram.radix import digits_of
from ..program.expr import Ref
from ..program.store import Store
from .candidate import Candidate
from .contract import as_tensor

Legs = tuple[Leg, ...]
Operands = tuple[Operand, ...]


def viewed(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """A plan for each window that counts a summed leg, where no operand has both that leg and its digits."""
    found: list[Candidate] = []
    for window in product.operands:
        digits = digits_of(window) if isinstance(window, Window) and window.image not in legs else None
        if isinstance(window, Window) and digits:
            others = tuple(op for op in product.operands if op is not window)
            own, others = _counted(window, digits, others, legs)
            side = _side(own, digits, others, legs)
            if not all(isinstance(op, Window) for op in side):
                rest = tuple(op for op in others if op not in side)
                found.append(_candidate(side, own, rest, digits, legs))
    return found


def _counted(window: Window, digits: Legs, others: Operands, legs: Legs) -> tuple[Legs, Operands]:
    """The leg that a window counts, and the operands; where only another window has it, the digits of that one."""
    holders = [op for op in others if window.image in op.legs]
    other = holders[0] if len(holders) == 1 else None
    same = digits_of(other) if isinstance(other, Window) and other.image == window.image else None
    if same is None or set(same) & {*legs, *digits}:
        return (window.image,), others
    return same, tuple(op for op in others if op is not other)


def _side(own: Legs, digits: Legs, others: Operands, legs: Legs) -> Operands:
    """The operands with a leg of `own`, and those joined to them by a leg that nothing else has."""
    side = [op for op in others if set(own) & set(op.legs)]
    if any(set(digits) & set(op.legs) for op in side):
        return ()
    outer = {*legs, *_legs(tuple(op for op in others if set(digits) & set(op.legs)))}
    for op in side:
        side += [other for other in others if other not in side and set(op.legs) & set(other.legs) - outer]
    return tuple(side)


def _candidate(side: Operands, own: Legs, rest: Operands, digits: Legs, legs: Legs) -> Candidate:
    free = tuple(leg for leg in _legs(side) if leg in {*legs, *_legs(rest)} and leg not in own)

    def viewed_in_digits(store: Store, built: Ref) -> Diagram:
        return _of((*rest, Tensor(as_tensor(store, built).name, (*free, *digits))), legs)

    return Candidate(viewed_in_digits, (_of(side, (*free, *own)),))


def _legs(operands: Operands) -> Legs:
    return ordered_union(*(op.legs for op in operands))


def _of(operands: Operands, legs: Legs) -> Diagram:
    return Diagram(legs, (Product(sympy.Integer(1), operands),))
