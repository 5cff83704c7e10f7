"""Canonical form: a key that is equal for two diagrams iff they differ in leg names and orders only."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from .core import Delta, Diagram, Leg, Map, Operand, Part, Product, Selection, Tensor, Window

Key = tuple[object, ...]


@lru_cache(2**14)
def key(diagram: Diagram) -> Key:
    """The canonical key. Output legs keep their order (it is part of the value), summed legs lose their names."""
    start = {leg: (0, k) for k, leg in enumerate(diagram.legs)}
    products = tuple(sorted((product_key(p, start) for p in diagram.products), key=repr))
    return (tuple(str(leg.size) for leg in diagram.legs), products)


def same(one: Diagram, other: Diagram) -> bool:
    """Equality up to leg names, operand order and product order."""
    return key(one) == key(other)


def product_key(product: Product, start: dict[Leg, tuple[int, int]]) -> Key:
    """Key of one product when the legs in `start` are fixed and all others are summed."""
    colours: dict[Leg, int] = {}
    seeds = {leg: repr((start.get(leg), str(leg.size))) for leg in product.legs}
    ranks = {seed: rank for rank, seed in enumerate(sorted(set(seeds.values())))}
    colours = {leg: ranks[seed] for leg, seed in seeds.items()}
    shown = {leg: seeds[leg] for leg in product.legs}
    return (str(product.scale), _search(product, colours, shown))


def _search(product: Product, colours: dict[Leg, int], shown: dict[Leg, str]) -> str:
    """Refine; where legs stay alike, single one out in turn and keep the smallest serialisation.

    What is connected by such legs alone is serialised by itself: k equal factors are k searches, not k! of them.
    """
    colours = _refine(product, colours)
    groups: dict[int, list[Leg]] = {}
    for leg, colour in colours.items():
        groups.setdefault(colour, []).append(leg)
    alike = next((group for _, group in sorted(groups.items()) if len(group) > 1), None)
    names = {leg: f"{colours[leg]}:{shown[leg]}" for leg in colours}
    if alike is None:
        return repr(sorted(_describe(op, names) for op in product.operands))
    several = {leg for group in groups.values() if len(group) > 1 for leg in group}
    parts = _connected(product.operands, several)
    if len(parts) > 1:
        pieces = (Product(product.scale, part) for part in parts)
        names = {leg: name if leg in several else f"one {name}" for leg, name in names.items()}
        return repr(sorted(_search(piece, {leg: colours[leg] for leg in piece.legs}, names) for piece in pieces))
    top = 2 * max(colours.values()) + 2
    return min(_search(product, {**colours, leg: top}, shown) for leg in alike)


def _connected(operands: tuple[Operand, ...], by: set[Leg]) -> list[tuple[Operand, ...]]:
    """Operands in groups, of which no two share one of these legs."""
    groups: list[tuple[set[Leg], tuple[Operand, ...]]] = []
    for op in operands:
        legs = by & set(op.legs)
        joined = [group for group in groups if group[0] & legs]
        groups = [group for group in groups if not group[0] & legs]
        groups.append((legs.union(*(own for own, _ in joined)), (*(o for _, own in joined for o in own), op)))
    return [own for _, own in groups]


def _refine(product: Product, colours: dict[Leg, int]) -> dict[Leg, int]:
    """Split colours by the operands that a leg meets, until nothing splits."""
    while True:
        described: dict[Leg, list[str]] = {leg: [] for leg in colours}
        names = {leg: str(colour) for leg, colour in colours.items()}
        for op in product.operands:
            for leg in set(op.legs):
                described[leg].append(_describe(op, {**names, leg: "*" + names[leg]}))
        signatures = {leg: (colours[leg], tuple(sorted(described[leg]))) for leg in colours}
        ranks = {s: rank for rank, s in enumerate(sorted(set(signatures.values())))}
        refined = {leg: ranks[s] for leg, s in signatures.items()}
        if len(ranks) == len(set(colours.values())):
            return refined
        colours = refined


def _describe(operand: Operand, names: dict[Leg, str]) -> str:
    def listed(legs: Iterable[Leg]) -> str:
        return ",".join(names[leg] for leg in legs)

    match operand:
        case Tensor():
            return f"T{operand.name}[{listed(operand.legs)}]"
        case Map():
            return f"M{operand.expr}({';'.join(_describe(a, names) for a in operand.args)})"
        case Delta():
            return f"D[{','.join(sorted(names[leg] for leg in operand.legs))}]"
        case Window():
            terms = sorted(f"{c}*{names[leg]}" for c, leg in operand.terms)
            return f"W[{names[operand.image]}={terms}{operand.offset:+d}]"
        case Selection():
            return f"S[{_describe(operand.index, names)}=({listed(operand.choice)})]"
        case Part():
            return f"P{key(operand.diagram)}[{listed(operand.legs)}]"
