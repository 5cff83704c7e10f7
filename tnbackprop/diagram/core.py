"""The diagram: a sum of products of operands on named legs.

A `Product` multiplies its operands elementwise on shared legs and sums every leg that is not an
output leg of its `Diagram` (Einstein summation with hyperedges). Two legs are the same leg iff they
have the same name, and then they must have the same size. Everything is frozen and hashable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy

from ..errors import InputError

Size: TypeAlias = int | sympy.Expr
Scalar: TypeAlias = int | float | sympy.Expr

N = sympy.Symbol("N", integer=True, positive=True)
"""The batch size."""

V = sympy.Symbol("V", integer=True, positive=True)
"""How many columns are handed to a layer on its own. These two are the only symbolic sizes."""


@dataclass(frozen=True, slots=True)
class Leg:
    """An index with a name and a size (an int, or a sympy expression in N or V)."""

    name: str
    size: Size
    _hash: int = field(init=False, repr=False, compare=False)  # legs are looked up all the time

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.name, self.size)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.name


Renaming = Mapping[Leg, Leg]

BATCH = Leg("n", N)
"""The batch leg. Derivatives never cross it."""

COLUMN, COLUMN_COPY = "ν", "μ"
"""Names of the leg that counts columns (of a root, say), and of its copy. No rule has one: they are not ASCII."""


def argument(position: int) -> sympy.Symbol:
    """The placeholder of a map's argument: x0, x1, …"""
    return sympy.Symbol(f"x{position}", real=True)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A runtime value by name, read in row-major order as one axis per leg.

    The legs may split or merge the stored axes as long as the row-major order stays.
    """

    name: str
    legs: tuple[Leg, ...]

    def rename(self, to: Renaming) -> Tensor:
        return Tensor(self.name, _renamed(self.legs, to))

    def __str__(self) -> str:
        return f"{hint_of(self.name)}[{_names(self.legs)}]"


def hint_of(name: str) -> str:
    """How the name of a runtime value is shown. With a colon in it it is no name that a model can give."""
    return name.strip(":").replace("::", ":").replace(":", "_")


@dataclass(frozen=True, slots=True)
class Map:
    """A sympy expression in x0, x1, … applied elementwise to tensors that broadcast by leg name."""

    expr: sympy.Expr
    args: tuple[Tensor, ...]

    @property
    def legs(self) -> tuple[Leg, ...]:
        return ordered_union(*(a.legs for a in self.args))

    def rename(self, to: Renaming) -> Map:
        return Map(self.expr, tuple(a.rename(to) for a in self.args))

    def __str__(self) -> str:
        shown = {argument(i): sympy.Symbol(str(a)) for i, a in enumerate(self.args)}
        return f"({sympy.sstr(self.expr.xreplace(shown))})"


@dataclass(frozen=True, slots=True)
class Delta:
    """Kronecker delta: 1 where both legs agree."""

    legs: tuple[Leg, ...]

    def rename(self, to: Renaming) -> Delta:
        return Delta(_renamed(self.legs, to))

    def __str__(self) -> str:
        return f"δ[{_names(self.legs)}]"


@dataclass(frozen=True, slots=True)
class Window:
    """Affine index pattern: 1 where image = Σ coefficient·leg + offset, else 0.

    A convolution has terms ((stride, p), (dilation, k)) and offset -padding.
    """

    image: Leg
    terms: tuple[tuple[int, Leg], ...]
    offset: int = 0

    @property
    def legs(self) -> tuple[Leg, ...]:
        return ordered_union((self.image,), tuple(leg for _, leg in self.terms))

    def rename(self, to: Renaming) -> Window:
        terms = tuple((c, to.get(leg, leg)) for c, leg in self.terms)
        return Window(to.get(self.image, self.image), terms, self.offset)

    def __str__(self) -> str:
        right = "+".join(f"{c}·{leg}" if c != 1 else str(leg) for c, leg in self.terms)
        return f"Π[{self.image}={right}{self.offset:+d}]" if self.offset else f"Π[{self.image}={right}]"


@dataclass(frozen=True, slots=True)
class Selection:
    """One-hot of an integer tensor: 1 where `index` equals the row-major position in `choice`.

    An index outside of the range selects nothing. Where `near` has a window for each leg of the choice, every index
    lies in all of them: choice = coefficient·position + coefficient·k + offset for some k, as in max pooling.
    """

    index: Tensor
    choice: tuple[Leg, ...]
    near: tuple[Window, ...] = ()

    @property
    def legs(self) -> tuple[Leg, ...]:
        return ordered_union(self.index.legs, self.choice)

    def rename(self, to: Renaming) -> Selection:
        return Selection(self.index.rename(to), _renamed(self.choice, to), tuple(w.rename(to) for w in self.near))

    def __str__(self) -> str:
        return f"𝟙[{self.index}=({_names(self.choice)})]"


@dataclass(frozen=True, slots=True)
class Part:
    """The value of a whole diagram as an operand (one half of a square, say).

    `legs[k]` is the name that the diagram's output leg k has here. A materialized part is always
    computed as such; one `with_inner` is, whenever a part inside it is.
    """

    diagram: Diagram
    legs: tuple[Leg, ...]
    materialized: bool = False
    with_inner: bool = False

    def rename(self, to: Renaming) -> Part:
        return Part(self.diagram, _renamed(self.legs, to), self.materialized, self.with_inner)

    def __str__(self) -> str:
        inner = self.diagram.rename(dict(zip(self.diagram.legs, self.legs, strict=True)))
        return f"({inner.body()})"


Operand = Tensor | Map | Delta | Window | Selection | Part


@dataclass(frozen=True, slots=True)
class Product:
    """An exact scale times operands. Legs that are not output legs of the diagram are summed."""

    scale: sympy.Expr
    operands: tuple[Operand, ...]

    @property
    def legs(self) -> tuple[Leg, ...]:
        """Every leg of an operand, in order of appearance."""
        return ordered_union(*(op.legs for op in self.operands))

    def rename(self, to: Renaming) -> Product:
        return Product(self.scale, tuple(op.rename(to) for op in self.operands))

    def __str__(self) -> str:
        shown = [str(op) for op in self.operands]
        if self.scale != 1 or not shown:
            shown.insert(0, _number(self.scale))
        return " ".join(shown)


@dataclass(frozen=True, slots=True)
class Diagram:
    """A sum of products with ordered output legs. An output leg in no operand is constant along it."""

    legs: tuple[Leg, ...]
    products: tuple[Product, ...]

    def rename(self, to: Renaming) -> Diagram:
        """Rename output legs (and any other leg named in `to`); summed legs step out of the way."""
        return Diagram(_renamed(self.legs, to), tuple(p.rename(_avoiding(p, self.legs, to)) for p in self.products))

    def __mul__(self, other: Diagram | Scalar) -> Diagram:
        """Elementwise on legs of equal name, outer on the others; the factors stay recognisable as halves."""
        if not isinstance(other, Diagram):
            return self._scaled(other)
        operands = (*self.part().products[0].operands, *other.part().products[0].operands)
        return Diagram(ordered_union(self.legs, other.legs), (Product(sympy.Integer(1), operands),))

    def __pow__(self, exponent: int) -> Diagram:
        """Elementwise, the product of so many: a whole number > 0. Roots are torch code, of `between` or a `Stream`."""
        if not isinstance(exponent, int) or exponent < 1:
            raise InputError(f"a diagram to the power {exponent!r}: give a whole number > 0; roots are for between()")
        found = self
        for _ in range(exponent - 1):
            found = found * self
        return found

    def __rmul__(self, other: Scalar) -> Diagram:
        return self._scaled(other)

    def __truediv__(self, other: Scalar) -> Diagram:
        if isinstance(other, Diagram):
            return NotImplemented
        return self._scaled(other, -1)

    def __add__(self, other: Diagram) -> Diagram:
        """Sum by leg name; the one with fewer legs is constant along the others."""
        if not isinstance(other, Diagram):
            return NotImplemented
        larger, smaller = (self, other) if len(self.legs) >= len(other.legs) else (other, self)
        if not set(smaller.legs) <= set(larger.legs):
            raise ValueError(f"cannot add diagrams with legs [{_names(self.legs)}] and [{_names(other.legs)}]")
        renamed = (p.rename(_aside(p, smaller.legs, {leg.name for leg in larger.legs})) for p in smaller.products)
        return Diagram(larger.legs, (*larger.products, *renamed) if larger is self else (*renamed, *larger.products))

    def __neg__(self) -> Diagram:
        return self._scaled(sympy.Integer(-1))

    def __sub__(self, other: Diagram) -> Diagram:
        return self + -other if isinstance(other, Diagram) else NotImplemented

    def sum(self, *names: str) -> Diagram:
        """Sum output legs by name. A leg that no operand has multiplies by its size."""
        gone = {self.leg(name) for name in names}
        products = []
        for p in self.products:
            orphans = [leg.size for leg in gone if leg not in p.legs]
            products.append(Product(sympy.Mul(p.scale, *orphans), p.operands))
        return Diagram(tuple(leg for leg in self.legs if leg not in gone), tuple(products))

    def part(self, materialized: bool = False, with_inner: bool = False) -> Diagram:
        """The same value as one part, so that a plan may compute it once, or put it back in place.

        materialized  it is always computed
        with_inner    it is computed wherever a part inside it is (a centred value, where the uncentred one exists)
        """
        if not (materialized or with_inner) and len(self.products) == 1 and self.products[0].scale == 1:
            operands = self.products[0].operands
            if len(operands) == 1 and isinstance(operands[0], Part) and operands[0].legs == self.legs:
                return self
        return Diagram(self.legs, (Product(sympy.Integer(1), (Part(self, self.legs, materialized, with_inner),)),))

    held = part  # its earlier name

    def sum_parameter(self) -> Diagram:
        """Sum every output leg but the batch leg, its copies and root columns: legs of one's own, too."""
        return self.sum(*(leg.name for leg in self.legs if not is_head(leg)))

    def ordered(self, *names: str) -> Diagram:
        """The same value with the output legs of these names first."""
        first = tuple(self.leg(name) for name in names)
        return Diagram((*first, *(leg for leg in self.legs if leg not in first)), self.products)

    def relabel(self, **names: str) -> Diagram:
        """Rename output legs by name: ``G.relabel(n="m")``."""
        return self.rename({self.leg(old): Leg(new, self.leg(old).size) for old, new in names.items()})

    def leg(self, name: str) -> Leg:
        """The output leg of that name."""
        for leg in self.legs:
            if leg.name == name:
                return leg
        raise KeyError(f"no leg {name!r} among [{_names(self.legs)}]")

    def _scaled(self, number: Scalar, power: int = 1) -> Diagram:
        factor = sympy.sympify(number)
        if not isinstance(factor, sympy.Expr) or factor.has(sympy.I):
            raise InputError(f"a diagram times {number!r}: a factor is a real number, of sizes too (tn.N)")
        factor = factor**power
        if factor.has(sympy.nan, sympy.zoo, sympy.oo):
            raise ValueError("the scale of a diagram is not finite")
        return Diagram(self.legs, tuple(Product(p.scale * factor, p.operands) for p in self.products))

    def body(self) -> str:
        """The right-hand side of the formula."""
        return " + ".join(_product_text(p, self.legs) for p in self.products) or "0"

    def __str__(self) -> str:
        return f"[{_names(self.legs)}] = {self.body()}"


def is_head(leg: Leg) -> bool:
    """Whether it counts samples or columns: such legs come first in a result."""
    return leg.size == N or leg.name in (COLUMN, COLUMN_COPY)


def ordered_union(*groups: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """The legs of all groups, each once, in order of first appearance."""
    return tuple(dict.fromkeys(leg for group in groups for leg in group))


def summed_legs(product: Product, output: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """The legs of `product` that are summed when its output legs are `output`."""
    return tuple(leg for leg in product.legs if leg not in output)


def fresh_names(taken: set[str], start: str) -> Iterator[str]:
    """start', start'', … as far as they are not taken."""
    name = start
    while True:
        name += "'"
        if name not in taken:
            yield name


def leaves(diagram: Diagram) -> tuple[str, ...]:
    """Names of the runtime tensors that the diagram reads, each once."""
    found: dict[str, None] = {}
    for product in diagram.products:
        for op in product.operands:
            for tensor in operand_tensors(op):
                found[tensor.name] = None
    return tuple(found)


def operand_tensors(operand: Operand) -> tuple[Tensor, ...]:
    """The tensors inside an operand, those of a part's diagram included."""
    match operand:
        case Tensor():
            return (operand,)
        case Map():
            return operand.args
        case Selection():
            return (operand.index,)
        case Part():
            return tuple(t for p in operand.diagram.products for op in p.operands for t in operand_tensors(op))
        case _:
            return ()


def _avoiding(product: Product, output: tuple[Leg, ...], to: Renaming) -> dict[Leg, Leg]:
    """`to`, extended so that no summed leg of `product` collides with a new output name."""
    new = {to.get(leg, leg).name for leg in output} | {leg.name for leg in to.values()}
    return _aside(product, (*output, *to), new) | dict(to)


def _aside(product: Product, output: tuple[Leg, ...], names: set[str]) -> dict[Leg, Leg]:
    """A renaming that takes the summed legs of `product` out of the way of `names`."""
    mapping: dict[Leg, Leg] = {}
    taken = names | {leg.name for leg in product.legs}
    for leg in summed_legs(product, output):
        if leg.name in names:
            mapping[leg] = Leg(next(fresh_names(taken, leg.name)), leg.size)
            taken.add(mapping[leg].name)
    return mapping


def _product_text(product: Product, output: tuple[Leg, ...]) -> str:
    summed = summed_legs(product, output)
    return (f"Σ_{{{_names(summed)}}} " if summed else "") + str(product)


def _renamed(legs: tuple[Leg, ...], to: Renaming) -> tuple[Leg, ...]:
    return tuple(to.get(leg, leg) for leg in legs)


def _names(legs: tuple[Leg, ...]) -> str:
    return ",".join(leg.name for leg in legs)


def _number(scale: sympy.Expr) -> str:
    exact = sympy.sstr(scale)
    return f"({exact})" if len(exact) < 24 else f"({sympy.sstr(scale.evalf(6))})"
