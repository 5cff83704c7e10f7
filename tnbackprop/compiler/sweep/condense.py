"""Condense: what a selection scatters is zero almost everywhere, so it is read before it is scattered.

Max pooling sends g[n, c, h', w'] to one position each of its input. A sum over all positions of that input with the
scattered cotangent is a sum over h', w' with everything else looked up at the chosen position: a fourth of the work for
windows of 3×3 that overlap. With many columns this pays for looking up; the planner tries both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from ...diagram.algebra import inline
from ...diagram.core import Diagram, Leg, Map, Part, Product, Selection, Tensor, summed_legs
from ...diagram.jacobian import Jacobian
from ...diagram.regroup import common, regroup
from .derived import Native

Legs = tuple[Leg, ...]
Terms = Mapping[str, Sequence[Diagram | Native]]
"""What the cotangents are sums of, by their names."""


def gathered(term: Diagram | Native, terms: Terms) -> Diagram | None:
    """A term that sums over what a selection scattered, in terms of the cotangent behind the selection."""
    return condensed(term, terms) if isinstance(term, Diagram) and not _scatters(term) else None


def condensed(g: Diagram, terms: Terms) -> Diagram | None:
    """A cotangent in terms of the one behind the next selection; None if no selection scatters it."""
    while (opened := _opened(g, terms)) is not None:
        if any(isinstance(op, Selection) for product in opened.products for op in product.operands):
            return opened
        g = opened
    return None


def outer_product(terms: Sequence[Diagram | Native], legs: Legs) -> Diagram | None:
    """A cotangent whose only term is an outer product, x[n, d] g[n, h]: None with a tensor of all legs, or a sum.

    What is gathered of a parameter, `w[index]`, has one as large as all that is gathered: it is left in its factors.
    """
    formula = _formula(terms)
    if formula is None or len(formula.products) != 1 or [a.size for a in legs] != [a.size for a in formula.legs]:
        return None
    (product,) = formula.products
    own = [set(op.legs) & set(formula.legs) for op in product.operands]
    plain = all(isinstance(op, Tensor | Map) for op in product.operands) and not summed_legs(product, formula.legs)
    if not plain or set(formula.legs) in own or set().union(*own) != set(formula.legs):
        return None
    return inline(Diagram(legs, (Product(sympy.Integer(1), (Part(formula, legs),)),)))


def _opened(g: Diagram, terms: Terms) -> Diagram | None:
    """g with its cotangent multiplied out, where that is one term which only weighs and scatters another."""
    for product in g.products if len(g.products) == 1 else ():
        for op in product.operands:
            formula = _formula(terms.get(op.name, ())) if isinstance(op, Tensor) else None
            if formula is not None and _scatters(formula) and (formula := _read_with(op.legs, formula)) is not None:
                others = tuple(other for other in product.operands if other is not op)
                return inline(Diagram(g.legs, (Product(product.scale, (*others, Part(formula, op.legs))),)))
    return None


def _formula(terms: Sequence[Diagram | Native]) -> Diagram | None:
    """The only term of a cotangent as a diagram."""
    if len(terms) != 1:
        return None
    return terms[0].formula if isinstance(terms[0], Native) else terms[0]


def _read_with(legs: Legs, formula: Diagram) -> Diagram | None:
    """The formula with as many legs, its own split where those are finer; None where they are anything else."""
    if [leg.size for leg in legs] == [leg.size for leg in formula.legs]:
        return formula
    sizes, own = (tuple(leg.size for leg in each if isinstance(leg.size, int)) for each in (legs, formula.legs))
    if common(own, sizes) != sizes:
        return None
    symbolic, rest = (tuple(leg for leg in formula.legs if isinstance(leg.size, int) is kept) for kept in (False, True))
    return regroup(Jacobian(formula, symbolic, rest), into=sizes).diagram


def _scatters(formula: Diagram) -> bool:
    """Whether nothing is summed but the places that are scattered."""
    if len(formula.products) != 1:
        return False
    (product,) = formula.products
    places = {leg for op in product.operands if isinstance(op, Selection) for leg in op.index.legs}
    plain = all(isinstance(op, Tensor | Map | Selection) for op in product.operands)
    return plain and set(summed_legs(product, formula.legs)) <= places
