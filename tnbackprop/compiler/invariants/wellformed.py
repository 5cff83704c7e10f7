"""What is wrong with one diagram, whatever it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import sympy

from ...diagram.core import (
    Delta,
    Diagram,
    Leg,
    Map,
    N,
    Operand,
    Part,
    Product,
    Selection,
    Size,
    Tensor,
    V,
    Window,
    argument,
)
from ...diagram.jacobian import Jacobian

Count = tuple[int, int]
"""Elements as (number, power of N)."""

ANY = 1009
"""What V counts for: a prime that no size is."""


def flaws(diagram: Diagram, known: Mapping[str, Count | None]) -> Iterator[str]:
    """Everything that is wrong. `known`: elements of each runtime value, None where they are not checked."""
    names = [leg.name for leg in diagram.legs]
    if len(set(names)) != len(names):
        yield f"an output leg is there twice in {diagram}"
    for product in diagram.products:
        sizes: dict[str, Size] = {}
        for leg in (*diagram.legs, *product.legs):
            if sizes.setdefault(leg.name, leg.size) != leg.size:
                yield f"leg {leg} has sizes {sizes[leg.name]} and {leg.size} in {diagram}"
        yield from _flaws_of_scale(product)
        for operand in product.operands:
            yield from (f"{what} in {diagram}" for what in _flaws_of(operand, known))


def flaws_of_jacobian(jacobian: Jacobian, known: Mapping[str, Count | None]) -> Iterator[str]:
    """The diagram's flaws, and legs that are not those of output and operand."""
    if jacobian.diagram.legs != jacobian.out + jacobian.into:
        yield f"legs of the Jacobian are not those of output and operand: {jacobian.diagram}"
    yield from flaws(jacobian.diagram, known)


@lru_cache(2**12)
def count(sizes: tuple[Size, ...]) -> Count:
    """The elements of a tensor with these sizes."""
    number, power = 1, 0
    for size in sizes:
        if isinstance(size, int):
            number *= size
        else:
            factor, symbols = size.xreplace({V: sympy.Integer(ANY)}).as_coeff_Mul()
            number *= int(factor)
            power += int(sympy.degree(symbols, N))
    return number, power


def count_legs(legs: tuple[Leg, ...]) -> Count:
    return count(tuple(leg.size for leg in legs))


def shown(elements: Count) -> str:
    """N·12 elements."""
    return "·".join([*["N"] * elements[1], str(elements[0])])


def _flaws_of_scale(product: Product) -> Iterator[str]:
    if product.scale.free_symbols - {N}:
        yield f"scale {product.scale} has another symbol than N"


def _flaws_of(operand: Operand, known: Mapping[str, Count | None]) -> Iterator[str]:
    match operand:
        case Tensor():
            yield from _flaws_of_tensor(operand, known)
        case Map():
            yield from _flaws_of_map(operand, known)
        case Delta():
            if len(operand.legs) != 2 or operand.legs[0].size != operand.legs[1].size:
                yield f"{operand} does not join two legs of one size"
        case Window():
            if not all(isinstance(c, int) for c in (operand.offset, *(c for c, _ in operand.terms))):
                yield f"{operand} has a coefficient that is no int"
            picks = operand.image.size == N and [c for c, _ in operand.terms] in ([], [1])
            if not picks and any(not isinstance(leg.size, int) for leg in operand.legs):
                yield f"{operand} slides over the batch"
        case Selection():
            yield from _flaws_of_tensor(operand.index, known)
        case Part():
            if tuple(leg.size for leg in operand.legs) != tuple(leg.size for leg in operand.diagram.legs):
                yield f"{operand} has other sizes than its diagram"
            yield from flaws(operand.diagram, known)


def _flaws_of_tensor(tensor: Tensor, known: Mapping[str, Count | None]) -> Iterator[str]:
    if tensor.name not in known:
        yield f"{tensor} is not known here"
        return
    elements, own = known[tensor.name], count_legs(tensor.legs)
    if elements is not None and elements != own:
        yield f"{tensor} reads {shown(own)} elements of {shown(elements)}"


def _flaws_of_map(operand: Map, known: Mapping[str, Count | None]) -> Iterator[str]:
    extra = operand.expr.free_symbols - {argument(k) for k in range(len(operand.args))} - {N}
    if extra:
        yield f"{operand} has no argument for {min(map(str, extra))}"
    for tensor in operand.args:
        yield from _flaws_of_tensor(tensor, known)
