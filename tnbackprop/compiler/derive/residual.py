"""Residual: what the Hessian has beyond the GGN. Line by line, Σ_z g_z ∂²z/∂u∂w for the operands u, w of the line z.

The Hessian of L is Σ Jᵀ (∂²L/∂output²) J plus, for every line of every rule, Dᵤᵀ R_uw D_w with the derivatives D of
the line's operands by the parameters (Dangel et al. 2020, arXiv:1912.10985, App. A.3; here on any graph).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import sympy

from ...diagram.algebra import diagonal, inline, on_diagonal, pull_back, tensor
from ...diagram.core import BATCH, Diagram, Leg, N, Part, Product, Tensor, leaves
from ...diagram.derivatives import differentiate
from ...diagram.jacobian import Jacobian
from ...diagram.regroup import common, regroup
from ...diagram.simplify import simplify
from ...errors import FormulaError, UnsupportedError
from ...notation.bind import BoundRule, Equation
from ..sweep.lines import jacobian_of, operands_of
from ..sweep.state import Sweep
from ..sweep.sweep import cotangent_of
from ..translate.graph import Call

Legs = tuple[Leg, ...]


@dataclass(frozen=True)
class Weighted:
    """A residual that is diagonal in `value`, which has these legs: Σ_i D_i weight[i] D_iᵀ. None: the weight is 1."""

    value: str
    legs: Legs
    weight: Diagram | None


@dataclass(frozen=True)
class Paired:
    """Any other: Σ_i D_i (R D)_iᵀ, with i along `value`. R leads to `other`; twice, where that is not `value`."""

    value: str
    other: str
    residual: Jacobian
    factor: int


def residuals(sweep: Sweep, bound: tuple[tuple[Call, BoundRule], ...], behind: set[str]) -> list[Weighted | Paired]:
    """Of every line that the gradient reaches, those of the loss (`behind` the model's output) left out."""
    weights: dict[tuple[str, tuple[object, ...]], Weighted] = {}
    pairs: list[Paired] = []
    for call, rule in bound:
        if call.output.name in behind:
            continue
        for equation in rule.equations:
            for found in _of_line(sweep, call, rule, equation):
                if isinstance(found, Paired):
                    pairs.append(found)
                    continue
                place = (found.value, tuple(leg.size for leg in found.legs))
                weights[place] = _added(weights[place], found) if place in weights else found
    return [*weights.values(), *pairs]


def _added(one: Weighted, other: Weighted) -> Weighted:
    assert one.weight is not None and other.weight is not None
    same = other.weight.rename(dict(zip(other.weight.legs, one.weight.legs, strict=True)))
    return Weighted(one.value, one.legs, simplify(one.weight + same))


def _of_line(sweep: Sweep, call: Call, rule: BoundRule, equation: Equation) -> Iterator[Weighted | Paired]:
    depends = {name: found for name in operands_of(equation) if (found := sweep.depends.get(name))}
    if rule.fallback and call.output.differentiable:
        raise FormulaError(
            f"{call.where} has no rule, so its second derivative is not known, and the Hessian needs it.\n"
            "  Declare a rule (docs/add-a-layer.md), or ask for the GGN: DiagGGN."
        )
    if not depends or not sweep.reached(equation.name):
        return
    for u, w in combinations_with_replacement(depends, 2):
        second = _second(sweep, call, rule, equation, u, w) if depends[u] & depends[w] else None
        if second is None:
            continue
        weight = diagonal(second) if u == w else None
        if weight is not None:
            legs = tuple(leg for leg in weight.legs if leg != BATCH or sweep.samples[u])
            yield Weighted(u, legs, weight)
        else:
            yield _pair(u, w, second)


COTANGENT = "~g"
"""Stands for the cotangent while its line is differentiated again: what it is made of may be an operand, too."""


def _second(
    sweep: Sweep, call: Call, rule: BoundRule, equation: Equation, u: str, w: str
) -> Jacobian | None:
    """Σ_z g_z ∂²z/∂u∂w of one line: out are the legs of u (and n), into those of w. None: it is zero."""
    jacobian = jacobian_of(equation, u)
    if jacobian is None:
        return None
    jacobian, cotangent = cotangent_of(sweep, equation, jacobian)
    pulled = _pulled(jacobian, tensor(COTANGENT, cotangent.legs))
    _check_saved(sweep, call, rule, equation, pulled)
    second = _total(equation, pulled, w)
    return second and Jacobian(_filled(second.diagram, cotangent), second.out, second.into)


def _pulled(jacobian: Jacobian, g: Diagram) -> Diagram:
    """Jᵀ g of one line for one operand; its legs are those of the operand (n among them where the operand has it)."""
    # Names that no line has: these legs stay open while other Jacobians are multiplied on.
    into = tuple(BATCH if leg.size == N else Leg(f"{leg.name}~", leg.size) for leg in jacobian.into)
    keep = () if BATCH in into else (BATCH,)
    return pull_back(jacobian, g, keep, into)


def _filled(diagram: Diagram, g: Diagram) -> Diagram:
    """The cotangent in the place of its stand-in."""
    products = []
    for p in diagram.products:
        named = (op for op in p.operands if isinstance(op, Tensor) and op.name == COTANGENT)
        parts = tuple(Part(g, op.legs) for op in named)
        others = tuple(op for op in p.operands if not (isinstance(op, Tensor) and op.name == COTANGENT))
        products.append(Product(p.scale, (*others, *parts)))
    return inline(Diagram(diagram.legs, tuple(products)))


def _check_saved(sweep: Sweep, call: Call, rule: BoundRule, equation: Equation, diagram: Diagram) -> None:
    """A declared Jacobian may read a saved value that depends on the operand in a way that nobody has declared."""
    varying = {name for name, behind in sweep.depends.items() if behind}
    for saved in rule.saved:
        if varying & saved.code.numbers:
            varying.add(saved.name)
    unknown = varying & {saved.name for saved in rule.saved} & set(leaves(diagram))
    if equation.jacobians and unknown:
        raise UnsupportedError(
            f"{call.where} declares its Jacobian with saved values, whose derivative is not known, and the Hessian "
            "needs it.\n  Write the layer as a formula, or ask for the GGN: DiagGGN."
        )


def _total(equation: Equation, pulled: Diagram, name: str) -> Jacobian | None:
    """∂(Jᵀg)/∂operand, also through the line's own value where a declared Jacobian reads that."""
    direct = differentiate(pulled, name, COTANGENT)
    inner = differentiate(pulled, equation.name, COTANGENT)
    jacobian = jacobian_of(equation, name)
    if inner is None or jacobian is None:
        return direct if direct is not None and direct.diagram.products else None
    jacobian, inner = _with_like_legs(jacobian, inner)
    own = inner.diagram.rename(dict(zip(inner.into, jacobian.out, strict=True)))
    into = direct.into if direct is not None else tuple(Leg(f"{leg.name}~'", leg.size) for leg in jacobian.into)
    if [leg.size for leg in into] != [leg.size for leg in jacobian.into]:
        raise UnsupportedError(f"{name} is read with different shapes in one line: {pulled}")
    chained = pull_back(jacobian, own, inner.out, into)
    total = chained if direct is None else simplify(direct.diagram + chained)
    return Jacobian(total, inner.out, into) if total.products else None


def _with_like_legs(jacobian: Jacobian, inner: Jacobian) -> tuple[Jacobian, Jacobian]:
    """The value of the line is read with other legs where its users do: a value made of parameters."""
    here, there = (tuple(leg.size for leg in legs) for legs in (jacobian.out, inner.into))
    if here == there:
        return jacobian, inner
    sizes = common(here, there)
    return regroup(jacobian, out=sizes), regroup(inner, into=sizes)


def residual_diagonal(
    sweep: Sweep, call: Call, rule: BoundRule, equation: Equation, operand: str
) -> Diagram | None:
    """diag R_uu of one line, [n, *operand]: what is not on the diagonal, and other operands, are left out."""
    if not sweep.reached(equation.name):
        return None
    second = _second(sweep, call, rule, equation, operand, operand)
    found = None if second is None else on_diagonal(second)
    return found if found is not None and found.products else None


def _pair(u: str, w: str, second: Jacobian) -> Paired:
    """Columns along the operand with fewer elements."""
    factor = 1 if u == w else 2
    if _count(second.into) < _count(second.out):
        return Paired(w, u, Jacobian(second.diagram, second.into, second.out), factor)
    return Paired(u, w, second, factor)


def _count(legs: Legs) -> sympy.Expr:
    return sympy.Mul(*(leg.size for leg in legs if leg.size != N))
