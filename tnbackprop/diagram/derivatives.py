"""The Jacobian of a formula, by the product rule on its operands."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from ..errors import InvariantError, UnsupportedError
from .core import Delta, Diagram, Leg, Map, Operand, Part, Product, Selection, Tensor, argument
from .functions import derivative, divides_by
from .jacobian import Jacobian
from .renamed import fresh
from .simplify import as_map, resummed, simplify


def differentiate(diagram: Diagram, name: str, linear: str = "") -> Jacobian | None:
    """The Jacobian of a formula with respect to the tensor `name`, by the product rule.

    Each occurrence is taken out; its legs are left open and joined by deltas. None: `name` does not occur.
    linear  a tensor that stays a factor of its own
    """
    into: tuple[Leg, ...] | None = None
    products: list[Product] = []
    taken = {leg.name for p in diagram.products for leg in p.legs} | {leg.name for leg in diagram.legs}
    for product in diagram.products:
        for position, operand in enumerate(product.operands):
            above = _numerators(product.operands, position, name, linear)
            others = tuple(op for k, op in enumerate(product.operands) if k != position and k not in above)
            for occurrence, rest in _taken_out(operand, name, tuple(product.operands[k] for k in above)):
                if into is None:
                    into = tuple(fresh(leg, taken) for leg in occurrence.legs)
                if [leg.size for leg in into] != [leg.size for leg in occurrence.legs]:
                    raise UnsupportedError(f"{name} is read with different shapes in one formula: {diagram}")
                deltas = tuple(Delta((a, b)) for a, b in zip(occurrence.legs, into, strict=True))
                products.append(resummed(product, others + rest + deltas, diagram.legs + into))
    if into is None:
        return None
    return Jacobian(simplify(Diagram(diagram.legs + into, tuple(products))), diagram.legs, into)


def _numerators(operands: tuple[Operand, ...], position: int, name: str, linear: str) -> tuple[int, ...]:
    """Where the factors, but for `linear`, of a map that divides by `name` are, on legs of one of them.

    Their quotient is one map. The derivative of 1 / b alone, 1 / b², is 0 or infinite in float32 where a / b² is not.
    """
    operand = operands[position]
    if not isinstance(operand, Map):
        return ()
    if not any(divides_by(operand.expr, argument(k)) for k, arg in enumerate(operand.args) if arg.name == name):
        return ()
    legs, found = set(operand.legs), []
    for k, other in enumerate(operands):
        own, read = set(other.legs), as_map(other)
        alone = k == position or read is None or linear in {arg.name for arg in read.args}
        if not alone and (own <= legs or legs == set(operand.legs) < own):
            legs |= own
            found.append(k)
    return tuple(found)


def _taken_out(
    operand: Operand, name: str, above: tuple[Operand, ...]
) -> Iterable[tuple[Tensor, tuple[Operand, ...]]]:
    """For each occurrence of `name` in the operand: the occurrence, and what is left in its place, times `above`."""
    match operand:
        case Tensor() if operand.name == name:
            yield operand, ()
        case Map():
            others = [each for each in map(as_map, above) if each is not None]
            args = tuple(dict.fromkeys((*operand.args, *(arg for other in others for arg in other.args))))
            factor = sympy.Mul(*(_on(other, args) for other in others))
            constant = sympy.Dummy(real=True) if others else sympy.Integer(1)
            for position, arg in enumerate(operand.args):
                if arg.name == name:
                    slope = derivative(constant * operand.expr, argument(position))
                    yield arg, map_of(slope.xreplace({constant: factor}), args)
        case Selection() if operand.index.name == name:
            raise InvariantError(f"{name} is an index and has no derivative")
        case Part():
            raise InvariantError("a formula has no parts")
        case _:
            pass


def _on(operand: Map, args: tuple[Tensor, ...]) -> sympy.Expr:
    """The expression of a map in the symbols of more arguments."""
    return operand.expr.xreplace({argument(k): argument(args.index(arg)) for k, arg in enumerate(operand.args)})


def map_of(expr: sympy.Expr, args: tuple[Tensor, ...]) -> tuple[Operand, ...]:
    """A map with the arguments that the expression really has; a constant 1 is no operand at all."""
    used = [k for k in range(len(args)) if expr.has(argument(k))]
    renumbered = expr.xreplace({argument(k): argument(i) for i, k in enumerate(used)})
    if renumbered == 1:
        return ()
    if not used:
        return (Map(renumbered, ()),)
    return (Map(renumbered, tuple(args[k] for k in used)),)
