"""Legs of size 1 say nothing: they are dropped from every bound formula, since tensors are read row-major anyway.

A window's image keeps its leg, whatever its size: the pattern asks for index 0 there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ...diagram.core import Delta, Diagram, Leg, Map, Operand, Product, Selection, Tensor, Window, operand_tensors
from ...diagram.jacobian import Jacobian, Unit
from ...notation.bind import BoundRule, Equation

Legs = tuple[Leg, ...]


def without_units(rule: BoundRule) -> BoundRule:
    """The bound rule without legs of size 1."""
    equations = tuple(_equation(equation) for equation in rule.equations)
    saved = tuple(replace(s, legs=_kept(s.legs, frozenset())) for s in rule.saved)
    return replace(rule, equations=equations, saved=saved)


def _equation(equation: Equation) -> Equation:
    if equation.diagram is None:
        jacobians = {name: _jacobian(j) for name, j in equation.jacobians.items()}
        return replace(equation, legs=_kept(equation.legs, frozenset()), jacobians=jacobians)
    images = _images(equation.diagram.products)
    jacobians = {name: _jacobian(j) for name, j in equation.jacobians.items()}
    diagram = _diagram(equation.diagram, images)
    return Equation(equation.name, _kept(equation.legs, images), diagram, jacobians, _units(equation, images))


def _units(equation: Equation, images: frozenset[Leg]) -> dict[str, tuple[Unit, ...]]:
    """The axes that are dropped of every operand, and where else they are; none of one that is read in several ways."""
    found: dict[str, set[tuple[Unit, ...]]] = {}
    for product in equation.diagram.products if equation.diagram is not None else ():
        for op in product.operands:
            others = [other for other in product.operands if other is not op]
            for tensor in operand_tensors(op):
                gone = [(k, leg) for k, leg in enumerate(tensor.legs) if leg.size == 1 and leg not in images]
                units = (Unit(k, leg in equation.legs, _met(leg, others)) for k, leg in gone)
                found.setdefault(tensor.name, set()).add(tuple(units))
    return {name: units for name, ways in found.items() if len(ways) == 1 for units in ways if units}


def _met(leg: Leg, others: list[Operand]) -> frozenset[str]:
    """The tensors that have a leg, or that are read by a window with it."""
    images = {other.image for other in others if isinstance(other, Window) and leg in other.legs}
    return frozenset(t.name for other in others for t in operand_tensors(other) if {leg, *images} & set(t.legs))


def _jacobian(jacobian: Jacobian) -> Jacobian:
    images = _images(jacobian.diagram.products)
    diagram = _diagram(jacobian.diagram, images)
    return Jacobian(diagram, _kept(jacobian.out, images), _kept(jacobian.into, images))


def _images(products: Iterable[Product]) -> frozenset[Leg]:
    return frozenset(op.image for p in products for op in p.operands if isinstance(op, Window))


def _kept(legs: Legs, images: frozenset[Leg]) -> Legs:
    return tuple(leg for leg in legs if leg.size != 1 or leg in images)


def _diagram(diagram: Diagram, images: frozenset[Leg]) -> Diagram:
    products = []
    for product in diagram.products:
        operands = (_operand(op, images) for op in product.operands)
        products.append(Product(product.scale, tuple(op for op in operands if op is not None)))
    return Diagram(_kept(diagram.legs, images), tuple(products))


def _operand(op: Operand, images: frozenset[Leg]) -> Operand | None:
    match op:
        case Tensor():
            return Tensor(op.name, _kept(op.legs, images))
        case Map():
            return Map(op.expr, tuple(Tensor(a.name, _kept(a.legs, images)) for a in op.args))
        case Delta():
            legs = _kept(op.legs, images)
            return Delta(legs) if len(legs) == len(op.legs) else None
        case Window():
            return Window(op.image, tuple((c, leg) for c, leg in op.terms if leg.size != 1 or leg in images), op.offset)
        case Selection():
            choice = _kept(op.choice, images)
            return Selection(Tensor(op.index.name, _kept(op.index.legs, images)), choice, op.near)
        case _:
            return op
