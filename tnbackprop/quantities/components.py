"""Components: what a product of Jᵀ S falls into when the samples and the positions over which it is summed are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from ..diagram.algebra import Uses
from ..diagram.core import BATCH, COLUMN, Leg, Operand, Product, operand_tensors
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


def parameter_of(J: Uses, names: frozenset[str]) -> Parameter:
    return Parameter(J.legs, J.jacobians[0].units if len({j.units for j in J.jacobians}) == 1 else (), names)


def separate(product: Product, parameter: Parameter) -> Separation:
    """The components of one product of Jᵀ S."""
    seeds = [op for op in product.operands if parameter.is_cotangent(op)]
    free = {leg for leg in product.legs if leg in parameter.legs or leg == BATCH or leg.name == COLUMN}
    summed = [leg for op in seeds for leg in op.legs if leg not in free]
    others = legs_of(tuple(op for op in product.operands if op not in seeds))
    candidates = [leg for leg in dict.fromkeys(summed) if leg in others]
    cut = _minimal_cut(product, parameter, candidates)
    components = _components(product, parameter, cut)
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
