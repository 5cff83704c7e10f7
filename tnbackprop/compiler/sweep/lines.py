"""Lines: what a line of a rule reads, and its Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...diagram.algebra import diagonal
from ...diagram.core import Diagram, Selection, leaves
from ...diagram.derivatives import differentiate
from ...diagram.jacobian import Jacobian
from ...diagram.simplify import simplify
from ...notation.bind import COTANGENTS, BoundRule, Equation
from ..translate.graph import Call, Graph


def jacobian_of(equation: Equation, operand: str) -> Jacobian | None:
    """The Jacobian of one line with respect to an operand, declared or derived; None where it has neither."""
    if operand in equation.jacobians:
        return equation.jacobians[operand]
    found = differentiate(equation.diagram, operand) if equation.diagram is not None else None
    return replace(found, units=equation.units.get(operand, ())) if found is not None else None


def operands_of(equation: Equation) -> tuple[str, ...]:
    """What its formula reads, and what its declared Jacobians are with respect to."""
    from_formula = leaves(equation.diagram) if equation.diagram is not None else ()
    return tuple(dict.fromkeys((*from_formula, *equation.jacobians)))


def lines_to(equations: tuple[Equation, ...], operands: set[str]) -> set[str]:
    """The operands and the lines through which they reach the output."""
    wanted = set(operands)
    for equation in equations[:-1]:
        if wanted & set(operands_of(equation)):
            wanted.add(equation.name)
    return wanted


def elementwise(equation: Equation, operand: str) -> bool:
    """Whether the Jacobian is diagonal."""
    jacobian = jacobian_of(equation, operand)
    return jacobian is not None and diagonal(jacobian) is not None


def columns_by_formula(rule: BoundRule, operand: str) -> bool:
    """Whether several columns go by the formula: what does not depend on them is computed once for all of them."""
    return COTANGENTS not in rule.vjp[operand].holes and not rule.fallback


def unchanged(along: Callable[[Jacobian], Jacobian], equation: Equation, operand: str) -> bool:
    """Whether what is propagated with in the place of the Jacobian is the Jacobian."""
    jacobian = jacobian_of(equation, operand)
    return jacobian is not None and along(jacobian).diagram == simplify(jacobian.diagram)


def selects(diagram: Diagram) -> bool:
    """Whether some index selects in it."""
    return any(isinstance(op, Selection) for product in diagram.products for op in product.operands)


def casts(graph: Graph, call: Call, name: str) -> bool:
    """Whether a call changes the dtype of a floating operand: its cotangent is cast back, by native code."""
    return graph.values[name].dtype != call.output.dtype


def casts_alone(graph: Graph, call: Call, name: str) -> bool:
    """Whether no other call reads a parameter that is cast, or nothing is cast: it has the uses of the result then."""
    if not casts(graph, call, name):
        return True
    return name in graph.parameters and len(graph.readers.get(name, ())) == 1
