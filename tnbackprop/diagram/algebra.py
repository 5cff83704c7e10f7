"""Algebra on diagrams: derivatives, products with cotangents, halves put back in.

The operators ``*``, ``+``, ``-``, ``/``, ``sum`` and ``relabel`` are methods of `Diagram`. Here is what
quantities see of a parameter: ``J.T @ g``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import sympy

from ..errors import InvariantError
from .core import (
    BATCH,
    Delta,
    Diagram,
    Leg,
    Map,
    Operand,
    Part,
    Product,
    Renaming,
    Selection,
    Tensor,
    ordered_union,
    summed_legs,
)
from .jacobian import Jacobian
from .reading import Axes, Readings
from .renamed import fresh
from .simplify import simplify


@dataclass(frozen=True)
class Side:
    """One of the sides into which a parameter's Kronecker factors fall.

    legs      the parameter's that are here: a factor of this side is [*blocks, *legs, *legs']
    loss      whether the cotangent is on this side: B, else A
    diagonal  whether its factor is kept as its diagonal (a one-hot input, what is too large)
    blocks    legs of the parameter that all sides have: its block is block-diagonal along them
    """

    legs: tuple[Leg, ...]
    loss: bool
    diagonal: bool
    blocks: tuple[Leg, ...] = ()


@dataclass(frozen=True)
class Uses:
    """All uses of one parameter: the Jacobian of each use. ``J.T @ g`` sums over them before anything is squared.

    name  the parameter's dotted name
    legs  the parameter's, row-major
    """

    jacobians: tuple[Jacobian, ...]
    legs: tuple[Leg, ...]
    axes: tuple[tuple[Leg, ...], ...] = ()  # the legs of each axis of the parameter; one each if it is empty
    name: str = ""
    readings: Readings = field(default_factory=Readings, compare=False, repr=False)
    separated: Callable[..., tuple[Side, ...]] | None = field(default=None, compare=False, repr=False)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def operand(self, key: str, legs: Axes | None = None) -> Diagram:
        """A tensor of this parameter that is handed in when the program is called, ``operands={key: {name: tensor}}``.

        legs  of its axes: `J.legs` (the default: it has the shape of the parameter), ``"n"``, ``tn.Leg(name, size)``,
              or a tuple of legs that are one axis together. One that equals a leg of `J.legs` is that leg
        Raises `InputError` for a leg that nobody knows.
        """
        return self.readings.read(key, self.legs if legs is None else tuple(legs), self.name, self.legs)

    def sides(self, sharing: object = None) -> tuple[Side, ...]:
        """The sides of its Kronecker factors, in the order of its axes, as `KFLR` has them with the same `sharing`.

        They are the same legs at every call of `extract`. One side with all legs where it has no factors.
        """
        if self.separated is None:
            raise InvariantError("the sides of a parameter are known in a sweep only")
        return self.separated() if sharing is None else self.separated(sharing)


@dataclass(frozen=True)
class Transposed:
    """Jᵀ, waiting for a cotangent."""

    uses: Uses

    def __matmul__(self, cotangents: Cotangents) -> Diagram:
        """Jᵀ g with legs [n, *columns, *parameter]: the individual gradients."""
        if not isinstance(cotangents, Cotangents):
            return NotImplemented
        nothing = Diagram((*cotangents.kept, *self.uses.legs), ())
        jacobians = self.uses.jacobians if cotangents.jacobians is None else cotangents.jacobians
        terms = [
            pull_back(jacobian, g, keep=cotangents.kept, into=self.uses.legs)
            for jacobian, g in zip(jacobians, cotangents.each, strict=True)
        ]
        return simplify(reduce(lambda a, b: a + b, terms, nothing)).part()


@dataclass(frozen=True)
class Cotangents:
    """The cotangent g at each use of a parameter, and the scale that the loss gave it.

    g_n = scale · ∂ℓ_n/∂output with L = Σ_n scale·ℓ_n: 1/N for a loss that averages, 1 for one that sums.
    """

    each: tuple[Diagram, ...]
    scale: sympy.Expr
    kept: tuple[Leg, ...] = (BATCH,)
    names: frozenset[str] = frozenset()  # of the runtime values that are cotangents
    averaged: bool = False  # each stands for one side of a matrix for the whole batch, which has its name
    weight: Diagram | None = None  # of each column: the matrix that is propagated is Σ_v weight_v g_v g_vᵀ
    partner: tuple[Diagram, ...] = ()  # the other side of columns that come in pairs: Σ_v g_v partner_vᵀ
    readings: Readings = field(default_factory=Readings, compare=False, repr=False)
    jacobians: tuple[Jacobian, ...] | None = None  # of the uses, where another sweep than the parameter's is meant

    def operand(self, key: str, legs: Axes = ("n",)) -> Diagram:
        """A tensor that is handed in when the program is called, one for all parameters: ``operands={key: tensor}``.

        legs  of its axes: ``"n"`` for one number of each sample (the default), ``tn.Leg(name, size)``
        Raises `InputError` for a leg that nobody knows, and for one that is called as a leg of the parameter.
        """
        return self.readings.read(key, tuple(legs))

    def dual(self, J: Uses) -> Diagram:
        """W with Σ_v V_v W_vᵀ = Jᵀ M J for V = Jᵀ g and the matrix M that is propagated; V itself for a root."""
        if self.partner:
            return J.T @ replace(self, each=self.partner, partner=())
        V = J.T @ self
        return V if self.weight is None else V * self.weight


def pull_back(jacobian: Jacobian, g: Diagram, keep: tuple[Leg, ...], into: tuple[Leg, ...]) -> Diagram:
    """Jᵀ g: contract the output legs, except those in `keep`; the operand's legs are called `into`."""
    taken = {leg.name for p in jacobian.diagram.products for leg in p.legs}
    taken |= {leg.name for leg in (*jacobian.out, *jacobian.into, *g.legs, *into, *keep)}
    # The result must not confuse a summed output leg with an operand leg of the same name.
    clash = {leg: fresh(leg, taken) for leg in jacobian.out if leg in into and leg not in keep}
    clash |= {leg: fresh(leg, taken) for leg in g.legs if leg in into and leg not in keep and leg not in clash}
    j = jacobian.diagram.rename(clash)
    g = g.rename({leg: new for leg, new in clash.items() if leg in g.legs})
    final = dict(zip(jacobian.into, into, strict=True))
    legs = ordered_union(tuple(leg for leg in keep if leg in g.legs or leg in j.legs), jacobian.into)
    products = []
    for left in j.products:
        for right in g.products:
            moved = _with_own_legs(right, g.legs, {leg.name for leg in (*left.legs, *j.legs, *into)})
            operands = left.operands + moved.operands
            present = ordered_union(*(op.legs for op in operands))
            summed = [leg for leg in ordered_union(j.legs, g.legs) if leg not in legs and leg not in present]
            scale = sympy.Mul(left.scale, moved.scale, *(leg.size for leg in summed))
            products.append(Product(scale, operands))
    return simplify(Diagram(legs, tuple(products))).rename(final)


def identity(legs: tuple[Leg, ...]) -> Jacobian:
    """The Jacobian of a value by itself."""
    into = tuple(Leg(f"{leg.name}'", leg.size) for leg in legs)
    deltas = tuple(Delta(pair) for pair in zip(legs, into, strict=True))
    return Jacobian(Diagram((*legs, *into), (Product(sympy.Integer(1), deltas),)), legs, into)


def squared(jacobian: Jacobian) -> Jacobian:
    """J∘J, elementwise: what the diagonal of a matrix is propagated with where all else of it is dropped."""
    return Jacobian(inline(jacobian.diagram * jacobian.diagram), jacobian.out, jacobian.into)


def on_diagonal(second: Jacobian) -> Diagram:
    """The diagonal of a second derivative, whatever else it has; legs are its output legs."""
    sampled = len(second.out) == len(second.into)
    first = second.out if sampled else tuple(leg for leg in second.out if leg != BATCH)
    same = second.diagram.rename(dict(zip(second.into, first, strict=True)))
    return simplify(Diagram(second.out, same.products))


def diagonal(second: Jacobian) -> Diagram | None:
    """The weights of a second derivative that is diagonal, with its output legs; None for any other.

    A value made of parameters has no sample, but its cotangent has: the batch leg is then only among the output legs.
    """
    first = second.out if len(second.out) == len(second.into) else tuple(leg for leg in second.out if leg != BATCH)
    if len(first) != len(second.into):
        return None
    products = [_on_diagonal(p, first, second.into) for p in second.diagram.products]
    found = tuple(p for p in products if p is not None)
    return Diagram(second.out, found) if len(found) == len(products) else None


def _on_diagonal(product: Product, first: tuple[Leg, ...], second: tuple[Leg, ...]) -> Product | None:
    """The product without the deltas that make it diagonal; None if they do not."""
    pairs = [frozenset(pair) for pair in zip(first, second, strict=True)]
    deltas = [op for op in product.operands if isinstance(op, Delta) and frozenset(op.legs) in pairs]
    rest = tuple(op for op in product.operands if op not in deltas)
    back = dict(zip(second, first, strict=True))
    if len({frozenset(d.legs) for d in deltas}) != len(pairs):
        return None
    return Product(product.scale, tuple(op.rename(back) for op in rest))


def inline(diagram: Diagram, keep: frozenset[Diagram] = frozenset()) -> Diagram:
    """Put every part that is not in `keep` back in place: multiplied out, without that half."""
    products: list[Product] = []
    for product in diagram.products:
        loose = (op for op in product.operands if isinstance(op, Part) and not op.materialized)
        opened = tuple(op for op in loose if op.diagram not in keep)
        kept = tuple(_within(op, keep) for op in product.operands if op not in opened)
        partial = [Product(product.scale, kept)]
        taken = {leg.name for leg in (*product.legs, *diagram.legs)}
        for part in opened:
            body = _with_own_legs_in(inline(part.diagram, keep), taken)
            body = body.rename(dict(zip(body.legs, part.legs, strict=True)))
            partial = [_joined(a, b, part.legs, taken) for a in partial for b in body.products]
        products.extend(_with_lost_sums(product, p, diagram.legs) for p in partial)
    return simplify(Diagram(diagram.legs, tuple(products)))


def _within(operand: Operand, keep: frozenset[Diagram]) -> Operand:
    """A part that stays, with its own parts put back in place."""
    if not isinstance(operand, Part):
        return operand
    return Part(inline(operand.diagram, keep), operand.legs, operand.materialized, operand.with_inner)


def parts(diagram: Diagram) -> tuple[Diagram, ...]:
    """The parts that a plan may build or put back, inner ones first, each once."""
    return tuple(part.diagram for part in all_parts(diagram) if not part.materialized)


def all_parts(diagram: Diagram) -> tuple[Part, ...]:
    """Every part, inner ones first, one for each diagram."""
    found: dict[Diagram, Part] = {}
    for product in diagram.products:
        for op in product.operands:
            if isinstance(op, Part):
                for part in (*all_parts(op.diagram), op):
                    found.setdefault(part.diagram, part)
    return tuple(found.values())


def tensor(name: str, legs: tuple[Leg, ...]) -> Diagram:
    """The diagram of one runtime value."""
    return Diagram(legs, (Product(sympy.Integer(1), (Tensor(name, legs),)),))


def of_tensors(diagram: Diagram, to: Mapping[str, str]) -> Diagram:
    """The same diagram of other runtime tensors: those in `to` by their other name."""
    products = (Product(p.scale, tuple(_of_tensors(op, to) for op in p.operands)) for p in diagram.products)
    return Diagram(diagram.legs, tuple(products))


def _of_tensors(operand: Operand, to: Mapping[str, str]) -> Operand:
    match operand:
        case Tensor(name=name, legs=legs):
            return Tensor(to.get(name, name), legs)
        case Map(expr=expr, args=args):
            return Map(expr, tuple(Tensor(to.get(each.name, each.name), each.legs) for each in args))
        case Selection(index=index):
            return replace(operand, index=Tensor(to.get(index.name, index.name), index.legs))
        case Part(diagram=inner):
            return replace(operand, diagram=of_tensors(inner, to))
        case _:
            return operand


def _with_lost_sums(before: Product, after: Product, output: tuple[Leg, ...]) -> Product:
    lost = [leg.size for leg in summed_legs(before, output) if leg not in after.legs]
    return Product(sympy.Mul(after.scale, *lost), after.operands)


def _joined(a: Product, b: Product, shared: tuple[Leg, ...], taken: set[str]) -> Product:
    """a·b, with b's private legs renamed to none that was seen so far."""
    mapping = {}
    for leg in b.legs:
        if leg not in shared and leg.name in taken | {other.name for other in a.legs}:
            mapping[leg] = fresh(leg, taken | {other.name for other in (*a.legs, *b.legs)})
            taken.add(mapping[leg].name)
    b = b.rename(mapping)
    return Product(a.scale * b.scale, a.operands + b.operands)


def _with_own_legs(product: Product, output: tuple[Leg, ...], taken: set[str]) -> Product:
    """The product with its summed legs renamed out of the way of `taken`."""
    names = taken | {leg.name for leg in (*product.legs, *output)}
    mapping: dict[Leg, Leg] = {}
    for leg in summed_legs(product, output):
        if leg.name in taken:
            mapping[leg] = fresh(leg, names)
    return product.rename(mapping)


def _with_own_legs_in(diagram: Diagram, taken: set[str]) -> Diagram:
    return Diagram(diagram.legs, tuple(_with_own_legs(p, diagram.legs, taken) for p in diagram.products))


def renaming(old: tuple[Leg, ...], new: tuple[Leg, ...]) -> Renaming:
    """The renaming that takes one tuple of legs to another."""
    return dict(zip(old, new, strict=True))
