"""Regroup: the same row-major axis as other legs. A leg of size 6 is read as legs (2, 3), and legs (3, 2) are."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from .core import (
    Delta,
    Diagram,
    Leg,
    Map,
    Operand,
    Part,
    Product,
    Selection,
    Size,
    Tensor,
    Window,
    fresh_names,
)
from .jacobian import Jacobian
from .radix import counted

Legs = tuple[Leg, ...]
Sizes = tuple[Size, ...]


def common(*shapes: Sizes) -> Sizes:
    """The sizes that all the row-major shapes of one value are read with.

    A shape cuts the axis at the strides of its legs, and all cuts that nest are made: (6,) and (2, 3) are read as
    (2, 3). Of (2, 3) and (3, 2) the first is; the other goes through one leg of 6.
    """
    if len(shapes) == 1 or 0 in shapes[0]:
        return shapes[0]
    made: set[int] = set()
    for cuts in sorted(map(_cuts, shapes), key=len, reverse=True):
        made |= {cut for cut in cuts if all(cut % other == 0 or other % cut == 0 for other in made)}
    return tuple(a // b for a, b in pairwise(sorted(made, reverse=True)))


def grouped(legs: Legs, shape: Sizes) -> tuple[Legs, ...]:
    """The legs of each axis of a shape, axes of size 1 left out; one each where the legs do not split the axes."""
    found: list[Legs] = []
    axes = [size for size in shape if size != 1]
    for leg in legs:
        before = found[-1] if found and prod(int(own.size) for own in found[-1]) < int(axes[len(found) - 1]) else ()
        found = [*found[: len(found) - bool(before)], (*before, leg)]
        if len(found) > len(axes) or prod(int(own.size) for own in found[-1]) > int(axes[len(found) - 1]):
            return tuple((own,) for own in legs)
    return tuple(found)


def _cuts(shape: Sizes) -> set[int]:
    """How many elements lie behind each place between two legs, the two ends included."""
    return {prod(int(size) for size in shape[k:]) for k in range(len(shape) + 1)}


def regroup(jacobian: Jacobian, out: Sizes | None = None, into: Sizes | None = None) -> Jacobian:
    """The Jacobian with its output or operand legs read as legs of the sizes given.

    Where the output is, the operand's legs are split alike; where the operand is, the output's stay what they are:
    a cotangent has them.
    """
    if out is not None:
        jacobian = _regrouped(jacobian, jacobian.out, out, jacobian.into)
    if into is not None:
        jacobian = _regrouped(jacobian, jacobian.into, into, ())
    return jacobian


def _regrouped(jacobian: Jacobian, legs: Legs, sizes: Sizes, along: Legs) -> Jacobian:
    """along: legs that are split as those are which a delta ties them to."""
    if tuple(leg.size for leg in legs) == sizes:
        return jacobian
    diagram = jacobian.diagram
    taken = {leg.name for p in diagram.products for leg in p.legs} | {leg.name for leg in diagram.legs}
    if 0 in sizes:  # of no element; there is nothing to split
        empty = tuple(_named(f"e{k}", size, taken) for k, size in enumerate(sizes))
        out, into = (empty if group == legs else group for group in (jacobian.out, jacobian.into))
        return Jacobian(Diagram((*out, *into), ()), out, into)
    split: dict[Leg, Legs] = {}
    crossed: dict[Legs, Legs] = {}
    for old, new in _blocks(legs, sizes):
        if new != tuple(leg.size for leg in old):
            into = tuple(_named(f"{old[0].name}{k}", size, taken) for k, size in enumerate(new))
            crossed |= {old: into} if len(old) > 1 else {}
            split |= {old[0]: into} if len(old) == 1 else {}
    _follow_deltas(diagram, split, along, taken)
    products = tuple(_crossing(_split_product(p, split), crossed, taken) for p in diagram.products)
    placed = split | {leg: new if leg == old[0] else () for old, new in crossed.items() for leg in old}

    def final(old: Legs) -> Legs:
        return tuple(new for leg in old for new in placed.get(leg, (leg,)))

    return Jacobian(Diagram(final(diagram.legs), products), final(jacobian.out), final(jacobian.into))


def _blocks(legs: Legs, sizes: Sizes) -> list[tuple[Legs, Sizes]]:
    """The legs, and the sizes for them, between the cuts that both have."""
    left, right = list(legs), list(sizes)
    found: list[tuple[Legs, Sizes]] = []
    while left:
        old: list[Leg] = [left.pop(0)]
        new: list[Size] = []
        while (a := prod(int(leg.size) for leg in old)) != (b := prod(int(size) for size in new)):
            if a > b:
                new.append(right.pop(0))
            else:
                old.append(left.pop(0))
        found.append((tuple(old), tuple(new)))
    return found


def _named(start: str, size: Size, taken: set[str]) -> Leg:
    name = start if start not in taken else next(fresh_names(taken, start))
    taken.add(name)
    return Leg(name, size)


def _follow_deltas(diagram: Diagram, split: dict[Leg, Legs], along: Legs, taken: set[str]) -> None:
    """A leg of `along` that a delta ties to a split leg is split alike."""
    deltas = [op for p in diagram.products for op in p.operands if isinstance(op, Delta)]
    changed = True
    while changed:
        changed = False
        for delta in deltas:
            for a, b in (delta.legs, delta.legs[::-1]):
                if a in split and b in along and b not in split:
                    split[b] = tuple(_named(f"{b.name}{k}", leg.size, taken) for k, leg in enumerate(split[a]))
                    changed = True


def _split_product(product: Product, split: dict[Leg, Legs]) -> Product:
    """Tensors are read with the finer legs; a pattern on a split leg keeps it, tied to them in mixed radix."""
    operands: list[Operand] = []
    kept: set[Leg] = set()
    for op in product.operands:
        parts, whole = _split_operand(op, split)
        operands += parts
        kept.update(leg for leg in whole if leg in split)
    operands += [counted(leg, split[leg]) for leg in sorted(kept, key=lambda leg: leg.name)]
    return Product(product.scale, tuple(operands))


def _split_operand(operand: Operand, split: dict[Leg, Legs]) -> tuple[tuple[Operand, ...], Legs]:
    """What the operand is with the finer legs, and the legs that it keeps."""
    match operand:
        case Tensor():
            return (_split_tensor(operand, split),), ()
        case Map():
            return (Map(operand.expr, tuple(_split_tensor(a, split) for a in operand.args)),), ()
        case Selection():
            near = operand.near if split.keys().isdisjoint(operand.index.legs) else ()
            return (Selection(_split_tensor(operand.index, split), operand.choice, near),), operand.choice
        case Delta():
            one, other = (split.get(leg, (leg,)) for leg in operand.legs)
            if [leg.size for leg in one] == [leg.size for leg in other]:
                return tuple(Delta(pair) for pair in zip(one, other, strict=True)), ()
        case Window() | Part():
            pass
    return (operand,), operand.legs


def _split_tensor(tensor: Tensor, split: dict[Leg, Legs]) -> Tensor:
    legs = tuple(new for leg in tensor.legs for new in split.get(leg, (leg,)))
    return Tensor(tensor.name, legs)


def _crossing(product: Product, crossed: dict[Legs, Legs], taken: set[str]) -> Product:
    """The product with new legs in the place of old ones, which are summed: both count one leg."""
    legs, operands = product.legs, list(product.operands)
    for old, new in crossed.items():
        if not set(legs).isdisjoint(old):
            place = _named(f"{old[0].name}_", prod(int(leg.size) for leg in old), taken)
            operands += [counted(place, old), counted(place, new)]
    return Product(product.scale, tuple(operands))
