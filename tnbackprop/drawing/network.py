"""A diagram as a scene: every product a tensor network, with its scale in front and + between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import sympy

from ..diagram.core import (
    Delta,
    Diagram,
    Leg,
    Map,
    N,
    Operand,
    Part,
    Product,
    Selection,
    Tensor,
    Window,
    hint_of,
    ordered_union,
)
from .geometry import Array
from .grid import arrange
from .labels import Names, expression, one_hot, pattern, scale_text
from .opened import Node, closed, opened, sealed
from .place import DOT, STUB, Joint, Spot, Terminal
from .scene import Box, End, Kind, Line, Point, Scene, Shape, Wire, Words, in_lines, side_by_side
from .words import LINE, width, wrapped

GAP = 16.0
LIMIT = 1100.0
"""A sum that is wider goes on in the next line."""


def diagram_scene(diagram: Diagram, names: Names, flat: bool = False) -> Scene:
    """The sum of products; of a part that is alone, what is inside. Flat: operands in at most two rows."""
    match diagram.products:
        case (Product(sympy.Integer(p=1), (Part() as part,)),) if part.legs == diagram.legs:
            return diagram_scene(_inside(part), names, flat)
    terms = [_term(product, diagram.legs, names, k == 0, flat) for k, product in enumerate(diagram.products)]
    return in_lines(terms, GAP, LIMIT) if terms else words("0", 1.3)


def words(text: str, size: float = 1.0) -> Scene:
    """Text alone."""
    return Scene(words=(Words(text, Box(0, 0, width(text, size), LINE * size), size),))


def _term(product: Product, output: tuple[Leg, ...], names: Names, first: bool, flat: bool) -> Scene:
    negative = bool(product.scale.could_extract_minus_sign())
    scale = -product.scale if negative else product.scale
    parts = [words("−" if negative else "+", 1.4)] if negative or not first else []
    constant = tuple(leg for leg in output if leg not in product.legs and leg.size != 1)
    if scale != 1 or not (product.operands or constant):
        parts.append(words(scale_text(scale), 1.2))
    parts += [_pieces(ops, output, names, flat) for ops in _components(product.operands)]
    parts += [_constant(leg, names) for leg in constant]
    return side_by_side(parts, GAP)


def _components(operands: tuple[Operand, ...]) -> list[list[Operand]]:
    """Operands that hang together by legs, in the order of the first of each."""
    groups: list[list[int]] = []
    for k, operand in enumerate(operands):
        touching = [g for g in groups if any(set(operands[j].legs) & set(operand.legs) for j in g)]
        merged = sorted([k, *(j for g in touching for j in g)])
        groups = sorted([*(g for g in groups if g not in touching), merged])
    return [[operands[j] for j in g] for g in groups]


@dataclass(frozen=True)
class _Joined:
    leg: Leg
    joint: Joint
    ends: tuple[End, ...]  # the shapes of the joint's terminals
    name: str

    @property
    def line(self) -> Line:
        return Line.BATCH if self.leg.size == N else Line.LEG

    @property
    def note(self) -> str:
        return f"{self.leg}: size {self.leg.size}"

    def wire(
        self, ends: tuple[End, End], path: tuple[Point, ...], bent: bool = False, label: Box | None = None
    ) -> Wire:
        return Wire(ends, path, self.line, self.name, self.note, bent, label)


def _pieces(operands: Sequence[Operand], output: tuple[Leg, ...], names: Names, flat: bool) -> Scene:
    """Operands that hang together, laid out."""
    choices = []
    for nodes in _mirrored([_node(operand, names) for operand in operands]):
        joined = [_joined(leg, operands, nodes, leg in output, names) for leg in _legs(operands)]
        arranged = arrange(tuple(node.item for node in nodes), tuple(j.joint for j in joined), flat)
        choices.append((arranged.cost, nodes, joined, arranged))
    _, nodes, joined, arranged = min(choices, key=lambda choice: choice[0])
    centres, spots = arranged.centres, arranged.spots
    placed = [node.shape.moved(float(x), float(y)) for node, (x, y) in zip(nodes, centres, strict=True)]
    wires: list[Wire] = []
    for item, spot in zip(joined, spots, strict=True):
        starts = [_toward(centres[end.item], end, spot.point) for end in item.joint.ends]
        _draw_leg(item, spot, starts, placed, wires)
    return Scene(tuple(placed), tuple(wires))


def _mirrored(nodes: list[Node]) -> Iterator[list[Node]]:
    """The nodes; two open parts also with the second one upside down, and turned left to right."""
    yield nodes
    if len(nodes) == 2 and all(node.shape.kind is Kind.PART for node in nodes):
        for sx, sy in ((1, -1), (-1, 1)):
            yield [nodes[0], nodes[1].mirrored(sx, sy)]


def _joined(leg: Leg, operands: Sequence[Operand], nodes: Sequence[Node], out: bool, names: Names) -> _Joined:
    """The leg with its ends in these nodes."""
    name = names.get(leg.name, leg.name)
    meets = [k for k, op in enumerate(operands) for own in _all_legs(op) if own == leg]
    shapes, terminals = zip(*(nodes[k].terminal(k, name) for k in meets), strict=True)
    return _Joined(leg, Joint(terminals, out, width(name) + 2, LINE), shapes, name)


def _legs(operands: Sequence[Operand]) -> tuple[Leg, ...]:
    """All of them, without those of size 1 that only parts have, of which nothing inside depends on them."""
    legs = ordered_union(*(operand.legs for operand in operands))
    return tuple(leg for leg in legs if leg.size != 1 or any(_depends(operand, leg) for operand in operands))


def _depends(operand: Operand, leg: Leg) -> bool:
    if isinstance(operand, Part):
        return any(_depends(inner, leg) for product in _inside(operand).products for inner in product.operands)
    return leg in operand.legs


def _all_legs(operand: Operand) -> tuple[Leg, ...]:
    """Its legs, one as often as the operand has it (a diagonal); maps and selections go by name."""
    return (operand.image, *(leg for _, leg in operand.terms)) if isinstance(operand, Window) else operand.legs


def _draw_leg(item: _Joined, spot: Spot, starts: Sequence[Array], shapes: list[Shape], wires: list[Wire]) -> None:
    """Add the wires of a leg, and its dot and its end."""
    joint, label = item.joint, Box(*_point(spot.label), item.joint.width, item.joint.height)
    if joint.plain:
        a, b = starts
        control = 2 * spot.point - (a + b) / 2
        bent = bool(np.abs(control - (a + b) / 2).max() > 0.5)
        path = (_point(a), _point(control), _point(b)) if bent else (_point(a), _point(b))
        wires.append(item.wire((item.ends[0], item.ends[1]), path, bent, label))
        return
    batch, new = item.line is Line.BATCH, (len(shapes),)
    end = Shape(Kind.END, label, (item.name,), item.note, batch)
    if not joint.dotted:
        shapes.append(end)
        wires.append(item.wire((item.ends[0], new), (_point(starts[0]), _point(spot.point))))
        return
    shapes.append(Shape(Kind.DOT, Box(*_point(spot.point), DOT, DOT), (), item.note, batch))
    named = None if joint.open else label
    for k, (operand, start) in enumerate(zip(item.ends, starts, strict=True)):
        path, bent = (_point(start), _point(spot.point)), item.ends.count(operand) > 1
        if bent:  # a diagonal: two wires between the same two
            side = 0.7 * (-1) ** item.ends[:k].count(operand)
            across = side * np.array([start[1] - spot.point[1], spot.point[0] - start[0]])
            path = (path[0], _point((start + spot.point) / 2 + across), path[1])
        wires.append(item.wire((operand, new), path, bent, named))
        named = None
    if spot.tip is not None:
        shapes.append(end)
        wires.append(item.wire((new, (new[0] + 1,)), (_point(spot.point), _point(spot.tip))))


def _toward(centre: Array, end: Terminal, point: Array) -> Array:
    """Where in the terminal's core a wire to that point begins."""
    middle, core = centre + np.array(end.at), np.array(end.core)
    return np.asarray(middle + np.clip(point - middle, -core, core))


def _point(at: Array) -> Point:
    return float(at[0]), float(at[1])


def _constant(leg: Leg, names: Names) -> Scene:
    """An output leg that no operand has: ones."""
    name, line = names.get(leg.name, leg.name), Line.BATCH if leg.size == N else Line.LEG
    note = f"{leg}: size {leg.size}, constant"
    dot = Shape(Kind.DOT, Box(0, 0, DOT, DOT), (), note, line is Line.BATCH)
    end = Shape(Kind.END, Box(0, -STUB - LINE / 2, width(name) + 2, LINE), (name,), note, line is Line.BATCH)
    return Scene((dot, end), (Wire(((0,), (1,)), ((0.0, 0.0), (0.0, -STUB)), line, name, note),))


def _node(operand: Operand, names: Names) -> Node:
    """An operand at the origin."""
    note = str(operand)
    match operand:
        case Tensor():
            name = names.get(hint_of(operand.name), hint_of(operand.name))
            return closed(Shape(Kind.TENSOR, Box(0, 0, max(34.0, width(name) + 20), 34.0), (name,), note))
        case Delta():
            return closed(Shape(Kind.DELTA, Box(0, 0, 10.0, 10.0), (), note))
        case Map():
            return _boxed(Kind.MAP, wrapped(expression(operand, names)), note, 18)
        case Window():
            return _boxed(Kind.WINDOW, (pattern(operand, names),), note, 44)
        case Selection():
            return _boxed(Kind.SELECTION, (one_hot(operand, names),), note, 48)
        case Part():
            inside = _inside(operand)
            single = len(inside.products) == 1 and inside.products[0].scale == 1
            distinct = len(set(operand.legs)) == len(operand.legs)
            return (opened if single and distinct else sealed)(diagram_scene(inside, names, flat=True), note)


def _inside(part: Part) -> Diagram:
    """The part's diagram in the names of its legs here."""
    return part.diagram.rename(dict(zip(part.diagram.legs, part.legs, strict=True)))


def _boxed(kind: Kind, lines: tuple[str, ...], note: str, padding: float) -> Node:
    return closed(Shape(kind, Box(0, 0, max(map(width, lines)) + padding, LINE * len(lines) + 16), lines, note))
