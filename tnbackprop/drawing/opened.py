"""Where wires end in an operand: at its box, or for an open part at the operands inside, through the frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from .place import Item, Terminal
from .scene import Box, End, Kind, Point, Scene, Shape, Wire

_PADDING = 12.0


@dataclass(frozen=True)
class Anchor:
    """Where a leg ends inside of an open part."""

    end: End
    at: Point
    core: Point
    solid: int


@dataclass(frozen=True)
class Node:
    """An operand at the origin, and where its legs end by the name shown; not listed: at its box."""

    shape: Shape
    item: Item
    anchors: Mapping[str, Anchor] = field(default_factory=dict)

    def terminal(self, k: int, leg: str) -> tuple[End, Terminal]:
        """The shape and the place where the leg ends, for operand k."""
        anchor = self.anchors.get(leg)
        if anchor is None:
            return (k,), Terminal(k, core=core(self.shape))
        return (k, *anchor.end), Terminal(k, anchor.at, anchor.core, anchor.solid)

    def mirrored(self, sx: int, sy: int) -> Node:
        """An open part reflected: -1 turns that direction."""
        assert self.shape.inner
        solids = tuple(box.mirrored(sx, sy) for box in self.item.solids)
        segments = tuple(((sx * a[0], sy * a[1]), (sx * b[0], sy * b[1])) for a, b in self.item.segments)
        anchors = {leg: replace(a, at=(sx * a.at[0], sy * a.at[1])) for leg, a in self.anchors.items()}
        shape = replace(self.shape, inner=self.shape.inner.mirrored(sx, sy))
        return Node(shape, replace(self.item, solids=solids, segments=segments), anchors)


def closed(shape: Shape) -> Node:
    """Wires end at the box of the shape."""
    return Node(shape, Item((shape.box.w, shape.box.h), (shape.box,)))


def opened(inner: Scene, note: str) -> Node:
    """A frame around a scene at the origin, without the ends of its open legs: those wires go on outside."""
    last = {wire.leg: wire.ends[0] for wire in inner.wires if _is_end(inner, wire.ends[1])}
    keep = [k for k, shape in enumerate(inner.shapes) if shape.kind is not Kind.END]
    new = {old: k for k, old in enumerate(keep)}
    inside = [_renumbered(wire, new) for wire in inner.wires if not _is_end(inner, wire.ends[1])]
    rest = Scene(tuple(inner.shapes[k] for k in keep), tuple(inside)).at(0, 0)
    solids = list(_solids(rest))
    anchors = {}
    for leg, old in last.items():
        end = (new[old[0]], *old[1:])
        where = next(k for k, (own, _) in enumerate(solids) if own == end)
        shape = _at(rest, end)
        anchors[leg] = Anchor(end, (shape.box.x, shape.box.y), core(shape), where)
    box = Box(0, 0, rest.bounds.w + 2 * _PADDING, rest.bounds.h + 2 * _PADDING)
    wires = [wire.points for scene in _scenes(rest) for wire in scene.wires]
    segments = tuple(piece for line in wires for piece in pairwise(line))
    item = Item((box.w, box.h), tuple(solid for _, solid in solids), segments)
    return Node(Shape(Kind.PART, box, (), note, inner=rest), item, anchors)


def sealed(inner: Scene, note: str) -> Node:
    """A frame around a scene that keeps the ends of its open legs; wires end at the frame."""
    inner = inner.at(0, 0)
    box = Box(0, 0, inner.bounds.w + 2 * _PADDING, inner.bounds.h + 2 * _PADDING)
    return closed(Shape(Kind.SUM, box, (), note, inner=inner))


def core(shape: Shape) -> Point:
    """How far from its centre wires may end: on its middle line, or anywhere well inside of a frame."""
    inset = _PADDING if shape.kind is Kind.SUM else min(shape.box.w, shape.box.h) / 2
    return max(shape.box.w / 2 - inset, 0.0), max(shape.box.h / 2 - inset, 0.0)


def _is_end(scene: Scene, end: End) -> bool:
    return _at(scene, end).kind is Kind.END


def _at(scene: Scene, end: End) -> Shape:
    shape = scene.shapes[end[0]]
    if len(end) == 1:
        return shape
    assert shape.inner
    return _at(shape.inner, end[1:])


def _renumbered(wire: Wire, new: Mapping[int, int]) -> Wire:
    one, other = ((new[end[0]], *end[1:]) for end in wire.ends)
    return replace(wire, ends=(one, other))


def _solids(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, Box]]:
    """What is drawn inside, open parts in pieces; names on wires come without an end."""
    for k, shape in enumerate(scene.shapes):
        if shape.kind is Kind.PART and shape.inner:
            yield from _solids(shape.inner, (*prefix, k))
        else:
            yield (*prefix, k), shape.box
    yield from (((), wire.label) for wire in scene.wires if wire.label)


def _scenes(scene: Scene) -> Iterator[Scene]:
    """The scene and those of its open parts."""
    yield scene
    for shape in scene.shapes:
        if shape.kind is Kind.PART and shape.inner:
            yield from _scenes(shape.inner)
