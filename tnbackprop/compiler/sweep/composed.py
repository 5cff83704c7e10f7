"""A loss that is written out, as one formula of the model's output: its second derivative where it is diagonal.

Each line is put in the place of the tensor that the next one reads: `(o - y).square().sum(-1).mean()` is
Σ_nc 1/N (o[n,c] - y[n,c])². What cuts or picks elements of the output (a slice, gather) stays a tensor of its own with
one element of the output for each of its own; then H = Σ_v A_vᵀ diag(h_v) A_v is diagonal as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from ...diagram.algebra import diagonal, inline, pull_back, squared, tensor
from ...diagram.core import Delta, Diagram, Leg, Map, Operand, Part, Product, Selection, Tensor, Window, argument
from ...diagram.derivatives import differentiate, map_of
from ...diagram.jacobian import Jacobian
from ...diagram.simplify import as_map, simplify
from ...errors import UnsupportedError
from ...notation.bind import BoundRule
from ..translate.graph import Call

MOST = 64
"""Products of a formula: sums that are multiplied out grow fast."""

LONGEST = 64
"""Operations of a formula for one element: its derivatives are taken of it."""

LONGEST_DERIVED = 512
"""Of its second derivative, which is printed and computed."""


class _NotOneFormulaError(Exception):
    """A line has no formula, or applies a function to a sum."""


@dataclass
class Composed:
    """The lines behind the output, in terms of it and of constants.

    known  what each value is; a piece of the output is itself
    moved  the pieces, in terms of the output
    """

    output: str
    legs: tuple[Leg, ...]
    known: dict[str, Diagram] = field(default_factory=dict)
    moved: dict[str, Diagram] = field(default_factory=dict)

    def add(self, name: str, diagram: Diagram) -> None:
        own = self._put(diagram)
        if len(own.products) > MOST or _operations(own) > LONGEST:
            raise _NotOneFormulaError
        if self._picks(diagram):
            self.moved[name] = inline(_replaced(own, self.moved))
            own = tensor(name, diagram.legs)
        self.known[name] = own

    def _picks(self, diagram: Diagram) -> bool:
        """Whether a line takes some elements of another value, and nothing else."""
        operands = diagram.products[0].operands if len(diagram.products) == 1 else ()
        read = [op for op in operands if isinstance(op, Tensor)]
        rest = [op for op in operands if op not in read]
        return len(read) == 1 and bool(rest) and all(isinstance(op, Delta | Window | Selection) for op in rest)

    def _put(self, diagram: Diagram) -> Diagram:
        products = [
            Product(product.scale, tuple(self._operand(operand) for operand in product.operands))
            for product in diagram.products
        ]
        return inline(Diagram(diagram.legs, tuple(products)))

    def _operand(self, operand: Operand) -> Operand:
        if isinstance(operand, Map):
            return self._map(operand)
        if not isinstance(operand, Tensor) or operand.name not in self.known:
            return operand
        return Part(_called(self.known[operand.name], operand.legs), operand.legs)

    def _map(self, operand: Map) -> Operand:
        """A function of what its arguments are functions of."""
        expr, args = operand.expr, list[Tensor]()
        found: dict[sympy.Expr, sympy.Expr] = {}
        for k, arg in enumerate(operand.args):
            one, own = (argument(0), (arg,)) if arg.name not in self.known else self._expression(arg)
            args += [each for each in own if each not in args]
            found[argument(k)] = one.xreplace({argument(i): argument(args.index(each)) for i, each in enumerate(own)})
        (made,) = map_of(expr.xreplace(found), tuple(args)) or (Map(sympy.Integer(1), ()),)
        return made

    def _expression(self, arg: Tensor) -> tuple[sympy.Expr, tuple[Tensor, ...]]:
        """A value as a function of elements at the same place, with those."""
        diagram = _called(self.known[arg.name], arg.legs)
        args: list[Tensor] = []
        terms = []
        for product in diagram.products:
            factors = [product.scale]
            for operand in product.operands:
                each = as_map(operand)
                if each is None or not set(each.legs) <= set(arg.legs):
                    raise _NotOneFormulaError
                args += [one for one in each.args if one not in args]
                to = {argument(k): argument(args.index(one)) for k, one in enumerate(each.args)}
                factors.append(each.expr.xreplace(to))
            terms.append(sympy.Mul(*factors))
        return sympy.Add(*terms), tuple(args)

    def curvature(self, loss: str) -> Diagram | None:
        """The diagonal second derivative by the output; None where it is another, not known to be, or long."""
        whole = self.known[loss]
        bases = [name for name in (self.output, *self.moved) if name in _read(whole)]
        found = Diagram(self.legs, ())
        for name in bases:
            first = differentiate(whole, name)
            assert first is not None
            if any(differentiate(first.diagram, other) for other in bases if other != name):
                return None  # two pieces meet
            second = differentiate(first.diagram, name)
            own = None if second is None else diagonal(second)
            if second is not None and own is None:
                return None
            if own is not None and own.products:
                led = self._led(name, own)
                if led is None:
                    return None
                found = found + led
        found = simplify(found)
        return found if _operations(found) <= LONGEST_DERIVED else None

    def slope(self, loss: str) -> Diagram | None:
        """The derivative by the output, where the loss is linear in it; else None."""
        whole, found = self.known[loss], Diagram(self.legs, ())
        bases = [name for name in (self.output, *self.moved) if name in _read(whole)]
        for name in bases:
            first = differentiate(whole, name)
            assert first is not None
            if any((second := differentiate(first.diagram, each)) and second.diagram.products for each in bases):
                return None
            if name == self.output:
                found = found + _on_legs(first.diagram, self.legs)
                continue
            jacobian = differentiate(self.moved[name], self.output)
            if jacobian is None:
                return None
            found = found + pull_back(jacobian, _on_legs(first.diagram, jacobian.out), (), self.legs)
        return simplify(found)

    def _led(self, name: str, weights: Diagram) -> Diagram | None:
        """Aᵀ h of a piece; None where an element of it is made of several of the output."""
        if name == self.output:
            return _on_legs(weights, self.legs)
        jacobian = differentiate(self.moved[name], self.output)
        if jacobian is None or not _one_each(jacobian):
            return None
        return pull_back(squared(jacobian), _on_legs(weights, jacobian.out), (), self.legs)


Lines = Sequence[tuple[Call, BoundRule]]


def curvature_of(output: str, legs: tuple[Leg, ...], behind: Lines, loss: str) -> Diagram | None:
    """The diagonal Hessian of a loss that is written out, by the output; None where it is another, or not known to be.

    behind  the lines that lead from the output to the loss
    legs    those of the output
    """
    return _of_the_whole(Composed(output, legs), behind, loss, Composed.curvature)


def slope_of(value: str, legs: tuple[Leg, ...], behind: Lines, loss: str) -> Diagram | None:
    """The same for its first derivative where it is linear in the value; else None."""
    return _of_the_whole(Composed(value, legs), behind, loss, Composed.slope)


def _of_the_whole(
    composed: Composed, behind: Lines, loss: str, what: Callable[[Composed, str], Diagram | None]
) -> Diagram | None:
    try:
        for call, rule in behind:
            (equation, *more) = rule.equations
            if more or equation.diagram is None or (call.by_rule and equation.jacobians):
                return None  # what is declared may be another derivative than the formula's
            composed.add(call.output.name, equation.diagram)
        return what(composed, loss) if loss in composed.known else None
    except (_NotOneFormulaError, UnsupportedError):  # an axis that is read as two, say
        return None


def _called(diagram: Diagram, legs: tuple[Leg, ...]) -> Diagram:
    """With other names for its legs. A tensor may be read with other axes."""
    if [leg.size for leg in diagram.legs] == [leg.size for leg in legs]:
        return diagram.rename(dict(zip(diagram.legs, legs, strict=True)))
    alone = diagram.products[0].operands if len(diagram.products) == 1 and diagram.products[0].scale == 1 else ()
    if len(alone) == 1 and isinstance(alone[0], Tensor) and alone[0].legs == diagram.legs:
        return tensor(alone[0].name, legs)
    raise _NotOneFormulaError


def _on_legs(diagram: Diagram, legs: tuple[Leg, ...]) -> Diagram:
    """On these legs, each of which may be several of the diagram's; all tensors must have those side by side."""
    if [leg.size for leg in diagram.legs] == [leg.size for leg in legs]:
        return diagram.rename(dict(zip(diagram.legs, legs, strict=True)))
    to, rest = dict[tuple[Leg, ...], Leg](), list(diagram.legs)
    for leg in legs:
        own = [rest.pop(0)] if rest else []
        while rest and sympy.Mul(*(each.size for each in own)) != leg.size:
            own.append(rest.pop(0))
        if sympy.Mul(*(each.size for each in own)) != leg.size:
            raise _NotOneFormulaError
        to[tuple(own)] = leg
    if rest or {leg.name for p in diagram.products for leg in p.legs if leg not in diagram.legs} & {
        leg.name for leg in legs
    }:
        raise _NotOneFormulaError
    products = (Product(p.scale, tuple(_operand_on(op, to) for op in p.operands)) for p in diagram.products)
    return Diagram(legs, tuple(products))


def _operand_on(operand: Operand, to: Mapping[tuple[Leg, ...], Leg]) -> Operand:
    if isinstance(operand, Map):
        return Map(operand.expr, tuple(_tensor_on(arg, to) for arg in operand.args))
    if isinstance(operand, Tensor):
        return _tensor_on(operand, to)
    if any(leg in operand.legs for own in to if len(own) > 1 for leg in own):
        raise _NotOneFormulaError
    return operand.rename({own[0]: leg for own, leg in to.items() if len(own) == 1})


def _tensor_on(read: Tensor, to: Mapping[tuple[Leg, ...], Leg]) -> Tensor:
    legs, rest = list[Leg](), read.legs
    while rest:
        own = next((own for own in to if rest[: len(own)] == own), None)
        if own is None:
            raise _NotOneFormulaError
        legs.append(to[own])
        rest = rest[len(own) :]
    return Tensor(read.name, tuple(legs))


def _replaced(diagram: Diagram, to: Mapping[str, Diagram]) -> Diagram:
    """With diagrams in the place of tensors."""

    def put(operand: Operand) -> Operand:
        known = to.get(operand.name) if isinstance(operand, Tensor) else None
        return operand if known is None or not isinstance(operand, Tensor) else Part(
            _called(known, operand.legs), operand.legs
        )

    products = (Product(p.scale, tuple(map(put, p.operands))) for p in diagram.products)
    return Diagram(diagram.legs, tuple(products))


def _one_each(jacobian: Jacobian) -> bool:
    """Whether no element of the value is made of two of the operand: each leg of that is told by those of the value."""
    if len(jacobian.diagram.products) > 1:
        return False
    for product in jacobian.diagram.products:
        known, todo = set(jacobian.out), list(product.operands)
        while todo:
            told = [op for op in todo if _tells(op, known)]
            if not told:
                return False
            known |= {leg for op in told for leg in op.legs}
            todo = [op for op in todo if op not in told]
        if not set(jacobian.into) <= known:
            return False
    return True


def _tells(operand: Operand, known: set[Leg]) -> bool:
    """Whether all legs of a one-hot operand follow from those that are known."""
    match operand:
        case Delta():
            return any(leg in known for leg in operand.legs)
        case Window():
            terms = [leg for _, leg in operand.terms]
            open_terms = [leg for leg in terms if leg not in known]
            return not open_terms or (operand.image in known and len(open_terms) == 1)
        case Selection():
            return set(operand.index.legs) <= known
        case _:
            return False


def _operations(diagram: Diagram) -> int:
    operands = (operand for product in diagram.products for operand in product.operands)
    return sum(int(operand.expr.count_ops()) for operand in operands if isinstance(operand, Map))


def _read(diagram: Diagram) -> set[str]:
    return {tensor.name for p in diagram.products for op in p.operands for tensor in _tensors(op)}


def _tensors(operand: Operand) -> tuple[Tensor, ...]:
    return (operand,) if isinstance(operand, Tensor) else operand.args if isinstance(operand, Map) else ()
