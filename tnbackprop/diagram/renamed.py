"""Other names: of the tensors of a diagram, of a leg among others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .core import Diagram, Leg, Map, Operand, Part, Selection, Tensor, fresh_names


def renamed(diagram: Diagram, shown: Callable[[str], str]) -> Diagram:
    """The same diagram, with another name for each tensor."""
    products = (replace(p, operands=tuple(_operand(op, shown) for op in p.operands)) for p in diagram.products)
    return replace(diagram, products=tuple(products))


def _operand(operand: Operand, shown: Callable[[str], str]) -> Operand:
    match operand:
        case Tensor():
            return _tensor(operand, shown)
        case Map():
            return replace(operand, args=tuple(_tensor(arg, shown) for arg in operand.args))
        case Selection():
            return replace(operand, index=_tensor(operand.index, shown))
        case Part():
            return replace(operand, diagram=renamed(operand.diagram, shown))
    return operand


def _tensor(tensor: Tensor, shown: Callable[[str], str]) -> Tensor:
    return replace(tensor, name=shown(tensor.name))


def fresh(leg: Leg, taken: set[str]) -> Leg:
    """A leg of that size whose name is not taken; now it is."""
    name = next(fresh_names(taken, leg.name))
    taken.add(name)
    return Leg(name, leg.size)
