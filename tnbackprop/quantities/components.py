"""Components: what a product of Jᵀ S falls into when the samples and the positions over which it is summed are cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy

from ..diagram.algebra import Uses
from ..diagram.core import BATCH, COLUMN, Leg, Map, Operand, Product, Tensor, operand_tensors
from ..diagram.jacobian import Unit

Legs = tuple[Leg, ...]


@dataclass(frozen=True)
class Component:
    """Operands that stay together. `own`: the parameter's legs that are here; with the cotangent it has the `loss`."""

    operands: tuple[Operand, ...]
    own: Legs
    loss: bool
    units: tuple[int, ...] = ()  # those of the parameter's axes of size 1 that are here

    @property
    def separate(self) -> bool:
        """Whether it has an axis of the parameter."""
        return bool(self.own or self.units)

    @property
    def constant(self) -> bool:
        """Whether it is the same for every sample, made of parameters."""
        values = all(isinstance(op, Tensor | Map) for op in self.operands)
        return not self.loss and values and BATCH not in legs_of(self.operands)


@dataclass(frozen=True)
class Parameter:
    """Its legs, and its axes of size 1, which have none: they are with the cotangent or with what they are met by."""

    legs: Legs
    units: tuple[Unit, ...]
    names: frozenset[str]  # of the values that are cotangents

    def of(self, operands: tuple[Operand, ...]) -> Component:
        """These operands with the axes that are theirs."""
        loss = any(self.is_cotangent(op) for op in operands)
        own = legs_of(operands)
        names = {t.name for op in operands for t in operand_tensors(op)}
        units = (unit.axis for unit in self.units if (unit.output if loss else unit.met & names and not unit.output))
        return Component(operands, tuple(leg for leg in self.legs if leg in own), loss, tuple(units))

    def place(self, component: Component) -> list[int]:
        """Where its axes are among all axes, to sort by."""
        axes = [k for k in range(len(self.legs) + len(self.units)) if k not in {unit.axis for unit in self.units}]
        return sorted([*(axes[self.legs.index(leg)] for leg in component.own), *component.units]) or [-1]

    def is_cotangent(self, op: Operand) -> bool:
        return any(t.name in self.names for t in operand_tensors(op))


@dataclass(frozen=True)
class Separation:
    """One product of Jᵀ S in components, in the order of the parameter's axes.

    blocks     legs of the parameter that several components have: the block is block-diagonal along them
    cut        positions that were cut between components
    positions  those, and the ones that only the cotangent has: a bias is used at each of them
    """

    components: tuple[Component, ...]  # `own` without the blocks
    blocks: Legs
    cut: Legs
    positions: Legs
    scale: sympy.Expr

    @property
    def structure(self) -> tuple[Legs, tuple[tuple[Legs, bool], ...]]:
        """What uses must have in common for their factors to add up."""
        return self.blocks, tuple((c.own, c.loss) for c in self.components)

    def differing(self, other: Separation) -> list[int] | None:
        """Which components differ from those of the other; None where nothing but those is compared."""
        one, two = ((*each.structure, frozenset(each.cut), frozenset(each.positions)) for each in (self, other))
        if one != two:
            return None
        pairs = zip(self.components, other.components, strict=True)
        return [k for k, (c, d) in enumerate(pairs) if Counter(c.operands) != Counter(d.operands)]


@dataclass(frozen=True)
class Use:
    """Products of Jᵀ S that are one use of the parameter: they differ in one component, whose sum is meant."""

    terms: tuple[Separation, ...]
    varying: int = 0

    @property
    def first(self) -> Separation:
        return self.terms[0]

    def pairs(self, k: int) -> list[tuple[Separation, Separation, sympy.Expr]]:
        """The terms whose component k is multiplied, with their scales relative to that of the component with the loss.

        That has its own scale twice.
        """
        loss = self.first.components[k].loss
        if k != self.varying:
            return [(self.first, self.first, self.first.scale**2 if loss else sympy.Integer(1))]
        unit = sympy.Integer(1) if loss else self.first.scale**2
        return [(one, other, one.scale * other.scale / unit) for one in self.terms for other in self.terms]

    def halves(self, k: int) -> list[tuple[Separation, sympy.Expr]]:
        """The same for one copy of a component without the cotangent."""
        each = self.terms if k == self.varying else self.terms[:1]
        return [(one, one.scale / self.first.scale) for one in each]


def uses_of(products: Sequence[Product], parameter: Parameter) -> tuple[Use, ...]:
    """The products of Jᵀ S by use: what has the same cotangent is one, where its components stay separate."""
    groups: dict[Legs | tuple[Operand, ...], list[Product]] = {}
    for product in products:
        groups.setdefault(tuple(filter(parameter.is_cotangent, product.operands)), []).append(product)
    return tuple(use for group in groups.values() for use in _one_use(group, parameter))


def _one_use(products: Sequence[Product], parameter: Parameter) -> list[Use]:
    """Values of parameters are with the cotangent where all that is multiplied is: nothing is left to separate."""
    terms = [separate(product, parameter) for product in products]
    constant = all(c.constant or c.loss for each in terms for c in each.components)
    terms = [separate(product, parameter, constant) for product in products] if constant else terms
    found = [terms[0].differing(term) for term in terms]
    if any(differ is None for differ in found) or len({k for differ in found for k in differ or ()}) > 1:
        return [Use((term,)) for term in terms]
    return [Use(tuple(terms), next((k for differ in found for k in differ or ()), 0))]


def parameter_of(J: Uses, names: frozenset[str]) -> Parameter:
    return Parameter(J.legs, J.jacobians[0].units if len({j.units for j in J.jacobians}) == 1 else (), names)


def separate(product: Product, parameter: Parameter, together: bool = False) -> Separation:
    """The components of one product of Jᵀ S; `together`: what is constant is with the cotangent."""
    seeds = [op for op in product.operands if parameter.is_cotangent(op)]
    free = {leg for leg in product.legs if leg in parameter.legs or leg == BATCH or leg.name == COLUMN}
    summed = [leg for op in seeds for leg in op.legs if leg not in free]
    others = legs_of(tuple(op for op in product.operands if op not in seeds))
    candidates = [leg for leg in dict.fromkeys(summed) if leg in others]
    cut = () if together else _minimal_cut(product, parameter, candidates)
    components = [parameter.of(product.operands)] if together else _components(product, parameter, cut)
    alone = [leg for leg in dict.fromkeys(summed) if leg not in candidates]
    blocks = tuple(leg for leg in parameter.legs if sum(leg in legs_of(c.operands) for c in components) > 1)
    owned = [replace(c, own=tuple(leg for leg in c.own if leg not in blocks)) for c in components]
    return Separation(tuple(sorted(owned, key=parameter.place)), blocks, cut, (*cut, *alone), product.scale)


def _minimal_cut(product: Product, parameter: Parameter, candidates: list[Leg]) -> Legs:
    """The candidates that must be cut to get as many components with parameter legs as possible."""

    def separated(cut: Legs) -> int:
        return sum(component.separate for component in _components(product, parameter, cut))

    # Of two cuts that separate as much, the one along positions: those are the legs that data share, not parameters.
    data = legs_of(tuple(op for op in product.operands if BATCH in op.legs and not parameter.is_cotangent(op)))
    candidates = sorted(candidates, key=lambda leg: leg in data)
    cut = tuple(candidates)
    most = separated(cut)
    for leg in candidates:
        rest = tuple(other for other in cut if other != leg)
        if separated(rest) == most:
            cut = rest
    return cut


def _components(product: Product, parameter: Parameter, cut: Legs) -> list[Component]:
    """Operands joined by legs that are not cut; the parameter's legs do not join the cotangent with the others."""
    groups = [[op] for op in product.operands]
    merged = True
    while merged:
        merged = False
        for i in range(len(groups)):
            for j in range(i + 1, len(groups)):
                if _joined(groups[i], groups[j], parameter, cut):
                    groups[i] += groups.pop(j)
                    merged = True
                    break
            if merged:
                break
    found = [parameter.of(tuple(group)) for group in groups]
    kept = [k for k, c in enumerate(found) if c.separate or c.loss]
    for one in (c for k, c in enumerate(found) if k not in kept):  # a norm's deviation, a mask: with what it scales
        shared = [set(legs_of(one.operands)).isdisjoint(legs_of(found[k].operands)) for k in kept]
        k = kept[min(range(len(kept)), key=lambda j: (found[kept[j]].loss, shared[j], j))]
        found[k] = replace(found[k], operands=(*found[k].operands, *one.operands))
    return [found[k] for k in kept]


def _joined(one: list[Operand], other: list[Operand], parameter: Parameter, cut: Legs) -> bool:
    shared = set(legs_of(tuple(one))) & set(legs_of(tuple(other)))
    seeds = [any(parameter.is_cotangent(op) for op in group) for group in (one, other)]
    if seeds[0] != seeds[1]:
        shared -= set(parameter.legs)
    return any(leg not in cut and leg != BATCH and leg.name != COLUMN for leg in shared)


def legs_of(operands: tuple[Operand, ...]) -> Legs:
    return tuple(dict.fromkeys(leg for op in operands for leg in op.legs))
