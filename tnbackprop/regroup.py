"""Regroup: the same row-major axis as other legs. A leg of size 6 is read as legs (2, 3), and so are its deltas."""

from __future__ import annotations

from .diagram import (
    Delta,
    Diagram,
    Leg,
    Map,
    Operand,
    Product,
    Selection,
    Size,
    Tensor,
    Window,
    fresh_names,
)
from .errors import UnsupportedError
from .jacobian import Jacobian

Legs = tuple[Leg, ...]


def refinement(one: tuple[Size, ...], other: tuple[Size, ...]) -> tuple[int, ...]:
    """The coarsest sizes that both row-major shapes can be read with. Raises `UnsupportedError` if there are none."""
    a, b = [int(s) for s in reversed(one)], [int(s) for s in reversed(other)]
    fine: list[int] = []
    while a and b:
        x, y = a.pop(), b.pop()
        small, large = min(x, y), max(x, y)
        # Row-major: the outer factor comes first, so the larger one keeps its inner part.
        if large % small:
            raise UnsupportedError(
                f"a parameter is used with the shapes {list(one)} and {list(other)}, which no common legs can read.\n"
                "  Use it with one shape, or with shapes that split its axes."
            )
        fine.append(small)
        if small != large:
            (a if x == large else b).append(large // small)
    return tuple(size for size in fine if size != 1)


def refine(jacobian: Jacobian, out: tuple[Size, ...] | None = None, into: tuple[Size, ...] | None = None) -> Jacobian:
    """The Jacobian with its output or operand legs read as legs of the sizes given, where those are finer."""
    if out is not None:
        jacobian = _refined(jacobian, jacobian.out, out)
    if into is not None:
        jacobian = _refined(jacobian, jacobian.into, into)
    return jacobian


def _refined(jacobian: Jacobian, legs: Legs, sizes: tuple[Size, ...]) -> Jacobian:
    if tuple(leg.size for leg in legs) == sizes:
        return jacobian
    diagram = jacobian.diagram
    taken = {leg.name for p in diagram.products for leg in p.legs} | {leg.name for leg in diagram.legs}
    split: dict[Leg, Legs] = {}
    rest = list(sizes)
    for leg in legs:
        group: list[Leg] = []
        total = 1
        while total != leg.size:
            size = rest.pop(0)
            group.append(_named(f"{leg.name}{len(group)}", size, taken))
            total *= int(size)
        if len(group) != 1:
            split[leg] = tuple(group)
    _follow_deltas(diagram, split, taken)
    products = tuple(_split_product(p, split) for p in diagram.products)

    def final(old: Legs) -> Legs:
        return tuple(new for leg in old for new in split.get(leg, (leg,)))

    return Jacobian(Diagram(final(diagram.legs), products), final(jacobian.out), final(jacobian.into))


def _named(start: str, size: Size, taken: set[str]) -> Leg:
    name = start if start not in taken else next(fresh_names(taken, start))
    taken.add(name)
    return Leg(name, size)


def _follow_deltas(diagram: Diagram, split: dict[Leg, Legs], taken: set[str]) -> None:
    """A leg that a delta ties to a split leg is split alike."""
    deltas = [op for p in diagram.products for op in p.operands if isinstance(op, Delta)]
    changed = True
    while changed:
        changed = False
        for delta in deltas:
            for a, b in (delta.legs, delta.legs[::-1]):
                if a in split and b not in split:
                    split[b] = tuple(_named(f"{b.name}{k}", leg.size, taken) for k, leg in enumerate(split[a]))
                    changed = True


def _split_product(product: Product, split: dict[Leg, Legs]) -> Product:
    """Tensors are read with the finer legs; a pattern on a split leg keeps it, tied to them in mixed radix."""
    patterns = [op for op in product.operands if isinstance(op, Window | Selection)]
    pinned = {leg for op in patterns for leg in (op.legs if isinstance(op, Window) else op.choice) if leg in split}
    operands: list[Operand] = []
    for op in product.operands:
        if isinstance(op, Delta) and op.legs[0] in split:
            pairs = zip(split[op.legs[0]], split[op.legs[1]], strict=True)
            operands += [Delta(pair) for pair in pairs]
        else:
            operands.append(_split_operand(op, split))
    for leg in sorted(pinned, key=lambda leg: leg.name):
        place, terms = 1, []
        for digit in reversed(split[leg]):
            terms.append((place, digit))
            place *= int(digit.size)
        operands.append(Window(leg, tuple(reversed(terms))))
    return Product(product.scale, tuple(operands))


def _split_operand(operand: Operand, split: dict[Leg, Legs]) -> Operand:
    if isinstance(operand, Map):
        return Map(operand.expr, tuple(_split_tensor(a, split) for a in operand.args))
    if isinstance(operand, Selection):
        return Selection(_split_tensor(operand.index, split), operand.choice, operand.near)
    return _split_tensor(operand, split) if isinstance(operand, Tensor) else operand


def _split_tensor(tensor: Tensor, split: dict[Leg, Legs]) -> Tensor:
    legs = tuple(new for leg in tensor.legs for new in split.get(leg, (leg,)))
    return Tensor(tensor.name, legs)
