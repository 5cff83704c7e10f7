"""Kronecker factors by tie and cut: derived from the diagram of Jᵀ S, not declared per layer.

The GGN block is (JᵀS)(JᵀS)ᵀ. Its legs n (and v) and the positions over which JᵀS is summed are cut; the parameter's
legs then fall into components. *Expand* ties the positions of the two copies of a component, *reduce* sums each copy
over them first (Eschenhagen et al. 2023, arXiv:2311.00636). Every cut leg contributes 1/size once, to each component
but the one with the cotangent, which carries all scale of the loss. Terms of one use, w·x + w·sin x, are one: the sum
of what they have in a component is separated. What is the same for every sample is not: it is with the cotangent.

A component M that is too large is cut further into its axes, all but one of them tied in each factor:

    F_1 = Σ M Mᵀ / (d_2 ⋯ d_k) over everything but axis 1,   F_j = d_j Σ M Mᵀ / tr(Σ M Mᵀ) over everything but axis j,

so that each cut axis contributes 1/size once, the scale is in F_1, and tr(F_1 ⊗ … ⊗ F_k) is that of the component;
exact where M is one matrix-normal tensor (TNT: Ren & Goldfarb 2021, arXiv:2106.02925; the factors of Shampoo: Gupta et
al. 2018, arXiv:1802.09568). An axis that is too large has its diagonal, and a parameter without factors its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import reduce
from math import prod

import sympy

from ..diagram.algebra import Cotangents, Side, Uses, diagonal, inline
from ..diagram.core import BATCH, COLUMN, Diagram, Leg, Operand, Product, Tensor, Window
from ..diagram.jacobian import Jacobian
from ..diagram.simplify import simplify
from ..errors import UnsupportedError
from .components import Legs, Parameter, Separation, Use, legs_of, parameter_of, uses_of

LARGEST = 4096
"""Rows of the largest dense factor, unless a quantity says otherwise."""
SHARE = 16
"""What has several axes with the loss in one piece, a table that is added, has no structure that its factor would keep:
it is left in one piece up to a 16th of that."""


class Sharing(Enum):
    """What a layer's weight that is used at many positions is taken to be: one use each, or one use of their sum."""

    EXPAND = "expand"
    REDUCE = "reduce"


@dataclass(frozen=True)
class Factors:
    """Diagrams of the factors, in the order of the parameter's axes: [blocks, d, d'], or [blocks, d] if diagonal.

    rows  of a factor of which the blocks on its diagonal are kept, [blocks, d / rows, rows, rows]; 0: of no other one
    """

    diagrams: tuple[Diagram, ...]
    blocks: Legs  # legs that all factors share: the block is block-diagonal along them
    legs: tuple[Legs, ...]  # the parameter's legs of each factor
    parameter: Legs  # all of them, row-major
    assumption: str
    means: tuple[Diagram | None, ...] = ()  # [blocks, d]: the mean of one copy of a factor without the cotangent
    diagonal: tuple[bool, ...] = ()  # which factors are kept as their diagonal (a one-hot input); none if it is empty
    leads: tuple[int, ...] = ()  # of each factor, the one with the scale of its component; itself if it is empty
    dropped: tuple[str, ...] = ()  # why a factor is no more than its diagonal; "" where nothing else is lost
    sharing: Sharing = Sharing.EXPAND
    loss: tuple[bool, ...] = ()  # which factors are of the component with the cotangent; not said if it is empty
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """What is not said of the factors is said of each: none is a diagonal, nothing is dropped."""
        each = len(self.diagrams)
        object.__setattr__(self, "diagonal", self.diagonal or (False,) * each)
        object.__setattr__(self, "dropped", self.dropped or ("",) * each)
        object.__setattr__(self, "rows", self.rows or (0,) * each)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """[blocks, d, d] or [blocks, d] of each factor, its legs and the blocks as one axis each."""
        blocks = (prod(int(leg.size) for leg in self.blocks),) if self.blocks else ()
        found = []
        for legs, flat, rows in zip(self.legs, self.diagonal, self.rows, strict=True):
            d = _rows(legs)
            found.append((*blocks, *((d,) if flat else (d // rows, rows, rows) if rows else (d, d))))
        return tuple(found)

    @property
    def relative(self) -> tuple[bool, ...]:
        """Which factors are divided by the mean of their diagonal: the scale is in another of their component."""
        return tuple(lead != k for k, lead in enumerate(self.leads)) or (False,) * len(self.diagrams)

    @property
    def whole(self) -> bool:
        """Whether nothing was lost but what the separation of the components loses."""
        return not any(self.dropped) and not any(self.relative)


@dataclass(frozen=True)
class _Cut:
    """The first of a component's legs in groups, each with a block: leg = size·group + inner; none of size 1."""

    leg: Leg
    group: Leg
    inner: Leg | None
    rows: int

    @classmethod
    def of(cls, own: Legs, most: int) -> _Cut | None:
        """Blocks of at most so many rows, or of those of the other legs; None where it is one block."""
        first, *rest = own
        size, others = int(first.size), _rows(tuple(rest))
        inside = max(b for b in range(1, size + 1) if size % b == 0 and (b == 1 or b * others <= most))
        if inside == size:
            return None
        if inside == 1:
            return cls(first, first, None, others)
        group, inner = Leg(f"{first.name}_group", size // inside), Leg(f"{first.name}_inside", inside)
        return cls(first, group, inner, inside * others)

    def windows(self) -> tuple[Operand, ...]:
        if self.inner is None:
            return ()
        return (Window(self.leg, ((int(self.inner.size), self.group), (1, self.inner))),)


@dataclass(frozen=True)
class _Rules:
    """How components become factors."""

    cotangents: Cotangents
    sharing: Sharing
    scale: sympy.Expr
    largest: int
    axes: tuple[Legs, ...]
    uses: tuple[Use, ...]  # all of one structure
    rows: int = 0  # of the largest block of a factor, 1: its diagonal alone; 0: whole factors

    @property
    def each(self) -> list[Separation]:
        """One of every use."""
        return [use.first for use in self.uses]

    def factor(self, k: int, own: Legs, dense: bool = True, cut: _Cut | None = None) -> Diagram:
        """Two copies of component k with all but `own` tied: [blocks, own, own'], or its diagonal [blocks, own]."""
        loss = self.each[0].components[k].loss
        pairs = [pair for use in self.uses for pair in use.pairs(k)]
        total = _total([self._paired(one, other, k, own, dense, cut) * scale for one, other, scale in pairs])
        return simplify(total * self.scale if loss else total / len(self.uses))

    def _paired(
        self, use: Separation, other: Separation, k: int, own: Legs, dense: bool, cut: _Cut | None
    ) -> Diagram:
        """A component of one term with that of another one."""
        component, second, expand = use.components[k], other.components[k], self.sharing is Sharing.EXPAND
        windows = cut.windows() if cut else ()
        every = legs_of((*component.operands, *second.operands, *windows))
        tied = {BATCH, *use.blocks, *(use.positions if expand else ()), *(leg for leg in every if leg.name == COLUMN)}
        tied |= set(component.own) - (set(own) if dense else set())
        groups = (cut.group,) if cut else ()
        own = own if cut is None else own[1:] if cut.inner is None else (cut.inner, *own[1:])
        copy = {leg: Leg(f"{leg.name}_copy", leg.size) for leg in every if leg not in {*tied, *groups}}
        front = (*(leg for leg in use.blocks if leg in every), *groups)
        legs = (*front, *own, *((copy[leg] for leg in own) if dense else ()))
        averaged = self.cotangents.names if self.cotangents.averaged else frozenset()
        twin = tuple(op.rename(copy) for op in (*second.operands, *windows))
        samples = BATCH.size if BATCH in every else sympy.Integer(1)
        uses = sympy.Mul(*(leg.size for leg in use.cut if leg in every)) ** (1 if expand else 2)
        scale = sympy.Integer(1) if component.loss else 1 / (samples * uses)
        found: Diagram = _paired((*component.operands, *windows), twin, legs, averaged) * scale
        return found

    def mean(self, k: int) -> Diagram | None:
        """The mean of one copy of a component without the cotangent."""
        if self.each[0].components[k].loss:
            return None
        halves = []
        for term, scale in (half for use in self.uses for half in use.halves(k)):
            component = term.components[k]
            half = Diagram((*term.blocks, *component.own), (Product(scale, component.operands),))
            every = legs_of(component.operands)
            halves.append(half / sympy.Mul(*(leg.size for leg in (BATCH, *term.cut) if leg in every)))
        return simplify(_total(halves) / len(self.uses))


@dataclass(frozen=True)
class _Factor:
    """One factor; `place` is where its axes are among the parameter's."""

    diagram: Diagram
    legs: Legs
    component: int
    place: list[int]
    diagonal: bool = False
    dropped: str = ""
    mean: Diagram | None = None
    relative: bool = field(default=False)
    rows: int = 0


def kronecker(
    J: Uses,
    g: Cotangents,
    sharing: Sharing,
    scale: sympy.Expr,
    means: bool = False,
    largest: int = LARGEST,
    strict: bool = False,
    rows: int = 0,
) -> Factors:
    """Factors of (Jᵀg)(Jᵀg)ᵀ·scale; the diagonal of it where the cut does not separate.

    means    also the means of the factors' halves, which join a weight with the bias behind it
    largest  rows of the largest dense factor: a larger one is cut into its axes, a larger axis has its diagonal
    strict   raises `UnsupportedError`, with the reason, in place of the diagonal of a parameter without factors
    rows     of each factor the blocks on its diagonal alone, of at most so many rows (or those of all axes of its
             component but the first): they are computed without the factor. 1: its diagonal; 0: whole factors
    """
    gradient = inline(J.T @ g)
    if not gradient.products:
        return _only_diagonal(J, Diagram(J.legs, ()), "the parameter has no use: zero", sharing)
    parameter = parameter_of(J, g.names)
    uses = uses_of(gradient.products, parameter)
    each = tuple(use.first for use in uses)
    why, remedy = _inseparable(each, len(J.jacobians), sharing)
    if why and strict:
        raise UnsupportedError(f"{why}: {gradient}\n  {remedy}")
    if why:
        found = _averaged_diagonal(gradient, parameter) if g.averaged else _own_diagonal(J, g)
        dropped = "what is between its uses" if g.averaged else "what is off its diagonal"
        text = f"no Kronecker factors: {why}"
        assumption = f"the diagonal of the block, nothing of {dropped}: {text}"
        return _only_diagonal(J, simplify(found * scale), assumption, sharing, text)
    rules = _Rules(g, sharing, scale, largest, J.axes or tuple((leg,) for leg in J.legs), uses, rows)
    built = [one for k in range(len(each[0].components)) for one in _of_component(rules, k, parameter, means)]
    built.sort(key=lambda one: one.place)
    leads = {one.component: k for k, one in enumerate(built) if not one.relative}
    return Factors(
        diagrams=tuple(one.diagram for one in built),
        blocks=each[0].blocks,
        legs=tuple(one.legs for one in built),
        parameter=J.legs,
        assumption=_assumption(rules, built),
        means=tuple(one.mean for one in built) if means else (),
        diagonal=tuple(one.diagonal for one in built),
        leads=tuple(leads[one.component] for one in built),
        dropped=tuple(one.dropped for one in built),
        sharing=sharing,
        loss=tuple(each[0].components[one.component].loss for one in built),
        rows=tuple(one.rows for one in built),
    )


def sides(J: Uses, g: Cotangents, sharing: Sharing = Sharing.EXPAND) -> tuple[Side, ...]:
    """The sides of the factors of (Jᵀg)(Jᵀg)ᵀ, in the order of the parameter's axes."""
    found = kronecker(J, g, sharing, sympy.Integer(1))
    each = zip(found.legs, found.loss, found.diagonal, strict=True)
    return tuple(Side(legs, loss, flat, found.blocks) for legs, loss, flat in each)


def _inseparable(each: Sequence[Separation], uses: int, sharing: Sharing) -> tuple[str, str]:
    """Why a parameter has no factors, and what to do; ("", "") where it has."""
    what = "uses of the parameter" if uses > 1 else "terms of the parameter's use"
    if len({one.structure for one in each}) > 1:
        remedy = (
            "Untie or freeze it (requires_grad_(False)), take its diagonal (strict=False), or ask for what needs no "
            "factors: DiagGGN, GGNTrace."
        )
        return f"the {what} have different Kronecker structure, and do not add up", remedy
    if len(each) > 1 and sharing is Sharing.REDUCE:
        why = f"the reduce approximation of several uses is not defined here, and there are {len(each)} {what}"
        return why, "Ask for Sharing.EXPAND, which takes the uses as positions, or take its diagonal (strict=False)."
    return "", ""


def _only_diagonal(J: Uses, diagram: Diagram, assumption: str, sharing: Sharing, why: str = "") -> Factors:
    """One factor on all axes, kept as its diagonal."""
    return Factors(
        (diagram,), (), (J.legs,), J.legs, assumption, diagonal=(True,), dropped=(why,), sharing=sharing, loss=(True,)
    )  # fmt: skip


def _own_diagonal(J: Uses, g: Cotangents) -> Diagram:
    """Σ_v Σ_n (Jᵀg)², as the diagonal of the GGN is."""
    V = J.T @ g
    return (V * V).sum(*(leg.name for leg in g.kept if leg in V.legs))


def _averaged_diagonal(gradient: Diagram, parameter: Parameter) -> Diagram:
    """The same from one matrix for the whole batch; there is none between two uses, which are positions, then."""
    total = Diagram(parameter.legs, ())
    seeds = [
        {op.name for op in p.operands if isinstance(op, Tensor) and parameter.is_cotangent(op)}
        for p in gradient.products
    ]
    for one, first in zip(gradient.products, seeds, strict=True):
        for other, second in zip(gradient.products, seeds, strict=True):
            if first == second:
                tied = {BATCH, *parameter.legs}
                copy = {leg: Leg(f"{leg.name}_copy", leg.size) for leg in other.legs if leg not in tied}
                twin = tuple(op.rename(copy) for op in other.operands)
                pair = _paired(one.operands, twin, parameter.legs, parameter.names)
                total = total + pair * (one.scale * other.scale)
    return total


def _of_component(rules: _Rules, k: int, parameter: Parameter, means: bool) -> list[_Factor]:
    """The factor of a component, or one for each of its axes."""
    component = rules.each[0].components[k]
    place = parameter.place(component)
    cut = _Cut.of(component.own, rules.rows) if rules.rows > 1 and component.own else None
    if rules.rows == 1 or (cut is not None and cut.rows == 1):
        return [_Factor(rules.factor(k, component.own, dense=False), component.own, k, place, diagonal=True)]
    full = rules.factor(k, component.own)
    short = _diagonal(full, component.own)
    mean = rules.mean(k) if means else None
    if short is not None:
        return [_Factor(short, component.own, k, place, diagonal=True, mean=mean)]
    if cut is not None:
        return [_Factor(rules.factor(k, component.own, cut=cut), component.own, k, place, rows=cut.rows)]
    axes = [axis for whole in rules.axes if (axis := tuple(leg for leg in whole if leg in component.own))]
    limit = rules.largest // SHARE if component.loss and len(axes) > 1 else rules.largest
    rows = _rows(component.own)
    if rows <= max(limit, 1):
        return [_Factor(full, component.own, k, place, mean=mean)]
    found = []
    for j, axis in enumerate(axes):
        dense, size = _rows(axis) <= rules.largest, _rows(axis)
        diagram = rules.factor(k, axis, dense)
        diagram = diagram if j else diagram / (rows // size)
        why = "" if dense else f"{size} rows are more than largest={rules.largest}"
        at = parameter.place(replace(component, own=axis, units=component.units if j == 0 else ()))
        found.append(_Factor(diagram, axis, k, at, not dense, why, relative=j > 0))
    return found


def _diagonal(diagram: Diagram, own: Legs) -> Diagram | None:
    """The diagonal of a factor that has nothing else, [d]; None for any other, and for one with blocks."""
    if not own or not diagram.products or len(diagram.legs) != 2 * len(own):
        return None
    return diagonal(Jacobian(diagram, diagram.legs[: len(own)], diagram.legs[len(own) :]))


def _assumption(rules: _Rules, built: Sequence[_Factor]) -> str:
    first, g = rules.each[0], rules.cotangents
    tied = "tied" if rules.sharing is Sharing.EXPAND else "summed"
    shown = f"{', '.join(map(str, first.positions))} {tied}" if first.positions else "no positions"
    text = "one averaged matrix of cotangents for all samples; " if g.averaged else ""
    if len(first.components) > 1:
        text += f"the factors are independent over the samples; {shown} ({rules.sharing.value})"
    elif first.positions and rules.sharing is Sharing.EXPAND:
        text += f"one factor, without what is between different positions: {shown} ({rules.sharing.value})"
    else:
        text += ("" if text else "none: ") + "one factor, the block itself"
    if len(rules.each) > 1:
        text += f"; {len(rules.each)} uses taken as positions"
    if any(one.relative for one in built):
        cut = [", ".join(map(str, one.legs)) for one in built if sum(one.component == o.component for o in built) > 1]
        text += f"; axes ({'), ('.join(cut)}) taken to be independent, with the trace of all of them together"
    for one in (one for one in built if one.dropped):
        text += f"; of ({', '.join(map(str, one.legs))}) the diagonal: {one.dropped}"
    return text


def _paired(one: tuple[Operand, ...], other: tuple[Operand, ...], legs: Legs, averaged: frozenset[str]) -> Diagram:
    """The product of two copies, which have the legs that are tied in common.

    averaged  tensors that stand for one side of a matrix for the whole batch: their two copies are that matrix
    """
    sides = [[op for op in ops if isinstance(op, Tensor) and op.name in averaged] for ops in (one, other)]
    matrices = tuple(_matrix(a, b) for a, b in zip(*sides, strict=True))
    rest = tuple(op for ops, own in zip((one, other), sides, strict=True) for op in ops if op not in own)
    mean = 1 / BATCH.size if matrices and BATCH in legs_of(rest) else sympy.Integer(1)
    return simplify(Diagram(legs, (Product(mean, (*matrices, *rest)),)))


def _matrix(one: Tensor, other: Tensor) -> Tensor:
    return Tensor(one.name, tuple(leg for leg in (*one.legs, *other.legs) if leg != BATCH))


def _rows(legs: Legs) -> int:
    return prod(int(leg.size) for leg in legs)


def _total(diagrams: Sequence[Diagram]) -> Diagram:
    return reduce(lambda a, b: a + b, diagrams)
