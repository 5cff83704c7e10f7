"""A picture before it is written down: shapes, wires and words at fixed places. x goes right, y goes down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

Point = tuple[float, float]
End = tuple[int, ...]
"""A shape by its position in the scene, then in the picture inside of it, and so on."""


class Kind(Enum):
    """What a shape stands for."""

    TENSOR = "tensor"
    MAP = "map"
    DELTA = "delta"
    WINDOW = "window"
    SELECTION = "selection"
    PART = "part"  # its legs end at the operands inside
    SUM = "sum"  # a part with a scale or several terms, each with its own ends; legs end at the frame
    DOT = "dot"  # a hyperedge, or a leg that is summed alone
    END = "end"  # the name at the end of an open leg
    CALL = "call"
    VALUE = "value"
    PHASE = "phase"


class Line(Enum):
    """What a wire stands for."""

    LEG = "leg"
    BATCH = "batch"
    FLOW = "flow"


@dataclass(frozen=True)
class Box:
    """A rectangle by its centre."""

    x: float
    y: float
    w: float
    h: float

    @property
    def left(self) -> float:
        return self.x - self.w / 2

    @property
    def right(self) -> float:
        return self.x + self.w / 2

    @property
    def top(self) -> float:
        return self.y - self.h / 2

    @property
    def bottom(self) -> float:
        return self.y + self.h / 2

    def moved(self, dx: float, dy: float) -> Box:
        return replace(self, x=self.x + dx, y=self.y + dy)

    def mirrored(self, sx: int, sy: int) -> Box:
        return replace(self, x=sx * self.x, y=sy * self.y)


@dataclass(frozen=True)
class Shape:
    """A node with its lines of text, a longer `note`, and for a part the picture inside."""

    kind: Kind
    box: Box
    lines: tuple[str, ...] = ()
    note: str = ""
    batch: bool = False
    inner: Scene | None = None

    def moved(self, dx: float, dy: float) -> Shape:
        inner = self.inner.moved(dx, dy) if self.inner else None
        return replace(self, box=self.box.moved(dx, dy), inner=inner)


@dataclass(frozen=True)
class Wire:
    """A line between two shapes. A bent one has its Bézier control in the middle."""

    ends: tuple[End, End]
    path: tuple[Point, ...]
    kind: Line
    leg: str
    note: str = ""
    bent: bool = False
    label: Box | None = None  # where the leg's name is shown, if here

    @property
    def points(self) -> tuple[Point, ...]:
        """Points on the wire, close enough for straight pieces between them."""
        if not self.bent:
            return self.path
        a, c, b = self.path
        shares = ((u * u, 2 * u * (1 - u), (1 - u) * (1 - u)) for u in (1, 0.75, 0.5, 0.25, 0))
        return tuple((r * a[0] + s * c[0] + t * b[0], r * a[1] + s * c[1] + t * b[1]) for r, s, t in shares)

    def moved(self, dx: float, dy: float) -> Wire:
        path = tuple((x + dx, y + dy) for x, y in self.path)
        return replace(self, path=path, label=self.label.moved(dx, dy) if self.label else None)


@dataclass(frozen=True)
class Words:
    """Free text: scale, plus, title, caption."""

    text: str
    box: Box
    size: float = 1.0

    def moved(self, dx: float, dy: float) -> Words:
        return replace(self, box=self.box.moved(dx, dy))


@dataclass(frozen=True)
class Scene:
    """Wires below shapes below words."""

    shapes: tuple[Shape, ...] = ()
    wires: tuple[Wire, ...] = ()
    words: tuple[Words, ...] = ()

    def moved(self, dx: float, dy: float) -> Scene:
        return Scene(
            tuple(s.moved(dx, dy) for s in self.shapes),
            tuple(w.moved(dx, dy) for w in self.wires),
            tuple(w.moved(dx, dy) for w in self.words),
        )

    def mirrored(self, sx: int, sy: int) -> Scene:
        """Reflected at the origin; -1 turns that direction. What is written stays upright."""
        shapes = (
            replace(s, box=s.box.mirrored(sx, sy), inner=s.inner.mirrored(sx, sy) if s.inner else None)
            for s in self.shapes
        )
        wires = (
            replace(
                w, path=tuple((sx * x, sy * y) for x, y in w.path), label=w.label.mirrored(sx, sy) if w.label else None
            )
            for w in self.wires
        )
        return Scene(tuple(shapes), tuple(wires), tuple(replace(w, box=w.box.mirrored(sx, sy)) for w in self.words))

    @property
    def bounds(self) -> Box:
        """The rectangle around everything."""
        boxes = [s.box for s in self.shapes] + [w.box for w in self.words] + [w.label for w in self.wires if w.label]
        points = [point for wire in self.wires for point in wire.points]
        xs = [x for b in boxes for x in (b.left, b.right)] + [x for x, _ in points]
        ys = [y for b in boxes for y in (b.top, b.bottom)] + [y for _, y in points]
        if not xs:
            return Box(0, 0, 0, 0)
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        return Box((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)

    @property
    def axis(self) -> float:
        """The height of the middle of its operands, on which pictures side by side are aligned."""
        boxes = [s.box for s in self.shapes if s.kind not in (Kind.DOT, Kind.END)] or [self.bounds]
        return (min(box.top for box in boxes) + max(box.bottom for box in boxes)) / 2

    def at(self, x: float, y: float) -> Scene:
        """The same picture with its centre there."""
        return self.moved(x - self.bounds.x, y - self.bounds.y)


def together(scenes: Iterable[Scene]) -> Scene:
    """One scene of several that are already in their places."""
    shapes: list[Shape] = []
    wires: list[Wire] = []
    words: list[Words] = []
    for scene in scenes:
        first = len(shapes)
        shapes += scene.shapes
        wires += (replace(w, ends=(_later(w.ends[0], first), _later(w.ends[1], first))) for w in scene.wires)
        words += scene.words
    return Scene(tuple(shapes), tuple(wires), tuple(words))


def _later(end: End, by: int) -> End:
    return end[0] + by, *end[1:]


def side_by_side(scenes: Sequence[Scene], gap: float) -> Scene:
    """From left to right, with the middles of their operands on one line."""
    placed, x = [], 0.0
    for scene in scenes:
        w = scene.bounds.w
        placed.append(scene.moved(x - scene.bounds.left, -scene.axis))
        x += w + gap
    return together(placed)


def stacked(scenes: Sequence[Scene], gap: float, centred: bool = True) -> Scene:
    """From top to bottom, centred or with one left margin."""
    placed, y = [], 0.0
    for scene in scenes:
        bounds = scene.bounds
        placed.append(scene.at(0.0 if centred else bounds.w / 2, y + bounds.h / 2))
        y += bounds.h + gap
    return together(placed)


def in_lines(scenes: Sequence[Scene], gap: float, limit: float) -> Scene:
    """Side by side, with a new line where `limit` would be passed."""
    lines: list[list[Scene]] = [[]]
    for scene in scenes:
        if lines[-1] and sum(s.bounds.w + gap for s in lines[-1]) + scene.bounds.w > limit:
            lines.append([])
        lines[-1].append(scene)
    return stacked([side_by_side(line, gap) for line in lines], gap)
