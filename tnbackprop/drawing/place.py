"""Where legs go between operands that are in their places: for every leg the best of a few hundred positions.

Legs go one after another. A position costs what it hides or crosses, and the length of its wires; a leg of two
operands is a wire through its name, any other is a dot with a wire to each operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .scene import Box, Point

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

DOT = 8.0
STUB = 20.0
_HIDDEN, _THROUGH, _CROSSED = 2000.0, 700.0, 150.0
_AROUND = np.array([(np.cos(a), np.sin(a)) for a in np.arange(0, 2 * np.pi, np.pi / 8)])


@dataclass(frozen=True)
class Item:
    """An operand: its box, and what no foreign wire may pass, all relative to its centre.

    A part is drawn open: wires go through its frame to the operands inside, which are its solids.
    """

    size: tuple[float, float]
    solids: tuple[Box, ...]
    segments: tuple[tuple[Point, Point], ...] = ()


@dataclass(frozen=True)
class Terminal:
    """Where a leg ends: a place in an item, the core around it where wires may end, and which solid that is."""

    item: int
    at: Point = (0.0, 0.0)
    core: Point = (0.0, 0.0)
    solid: int = 0


@dataclass(frozen=True)
class Joint:
    """A leg and what it joins: one terminal for each time that an operand has it, and the outside."""

    ends: tuple[Terminal, ...]
    open: bool
    width: float  # of its name
    height: float

    @property
    def items(self) -> tuple[int, ...]:
        """The operands that have it, each once."""
        return tuple(sorted({end.item for end in self.ends}))

    @property
    def plain(self) -> bool:
        """One wire between two operands."""
        return not self.open and len(self.ends) == 2 == len(self.items)

    @property
    def dotted(self) -> bool:
        """Drawn with a dot."""
        return not (self.plain or (self.open and len(self.ends) == 1))


@dataclass(frozen=True)
class Spot:
    """Where a leg is: its dot, the end of its stub or the middle of its wire; the far end of a dot's stub; its name."""

    point: Array
    tip: Array | None
    label: Array


@dataclass(frozen=True)
class _Options:
    points: Array  # [C, 2]
    labels: Array
    cost: Array  # [C]
    tips: Array | None = None


@dataclass
class Board:
    """Operands with their places, and the legs placed so far."""

    items: Sequence[Item]
    centres: Array  # [k, 2]
    names: list[Array] = field(default_factory=list)  # [4] centre and size
    dots: list[Array] = field(default_factory=list)
    segments: list[Array] = field(default_factory=list)  # [m, 2, 2]
    leaving: dict[Terminal, list[tuple[Array, Array]]] = field(default_factory=dict)  # where and in which direction
    cost: float = 0.0

    def __post_init__(self) -> None:
        self.sizes = np.array([item.size for item in self.items])
        self.boxes = np.concatenate([self.centres, self.sizes], 1)
        rows = [
            (k, j, box.x + self.centres[k, 0], box.y + self.centres[k, 1], box.w, box.h)
            for k, item in enumerate(self.items)
            for j, box in enumerate(item.solids)
        ]
        table = np.array(rows)
        self.solid_of, self.solids = table[:, :2].astype(int), table[:, 2:]
        for centre, item in zip(self.centres, self.items, strict=True):
            self.segments.append(np.array(item.segments, dtype=float).reshape(-1, 2, 2) + centre)

    def place(self, joints: Sequence[Joint]) -> list[Spot]:
        """A spot for every joint, in the order given."""
        first = {True: 0, False: 1}
        order = sorted(
            range(len(joints)), key=lambda k: (first[joints[k].plain], -len(joints[k].ends), self._span(joints[k]), k)
        )
        spots = {k: self._best(joints[k]) for k in order}
        return [spots[k] for k in range(len(joints))]

    def at(self, end: Terminal) -> Array:
        """The middle of a terminal."""
        return np.asarray(self.centres[end.item] + np.array(end.at))

    def attach(self, end: Terminal, points: Array) -> Array:
        """The points of the terminal's core that are closest."""
        centre, core = self.at(end), np.array(end.core)
        return np.asarray(centre + np.clip(points - centre, -core, core))

    def _span(self, joint: Joint) -> float:
        at = np.array([self.at(end) for end in joint.ends]).reshape(-1, 2)
        return float(np.round(np.abs(at - at.mean(0)).sum(), 3)) if len(at) else 0.0

    def _out(self, end: Terminal, start: Array, direction: Array) -> float:
        """How far from there a ray leaves the box of the terminal's item."""
        inside = (start - self.centres[end.item]) * np.sign(direction)
        return float(((self.sizes[end.item] / 2 - inside) / np.maximum(np.abs(direction), 1e-9)).min())

    def _best(self, joint: Joint) -> Spot:
        options = self._options(joint)
        paths = self._paths(joint, options)
        cost = options.cost + self._obstacles(joint, options, paths) + self._crowding(joint, options)
        k = int(np.argmin(np.round(cost, 4)))
        self.cost += float(cost[k])
        self._keep(joint, options, paths, k)
        return Spot(options.points[k], options.tips[k] if options.tips is not None else None, options.labels[k])

    def _keep(self, joint: Joint, options: _Options, paths: Array, k: int) -> None:
        self.names.append(np.array([*options.labels[k], joint.width, joint.height]))
        self.segments.append(paths[k])
        if joint.dotted:
            self.dots.append(np.array([*options.points[k], DOT, DOT]))
        for end in joint.ends:
            start = self.attach(end, options.points[k])
            self.leaving.setdefault(end, []).append((start, _unit(options.points[k] - start)))

    def _options(self, joint: Joint) -> _Options:
        if joint.plain:
            return self._between(joint)
        if len(joint.ends) == 1:
            return self._stubs(joint)
        return self._dots(joint)

    def _between(self, joint: Joint) -> _Options:
        """Along the line across the middle of the gap between two operands."""
        a, b = joint.ends
        one, other = self.attach(a, self.at(b)), self.attach(b, self.at(a))
        one, other = self.attach(a, other), self.attach(b, one)
        along = _unit(other - one)
        middle = (one + along * self._out(a, one, along) + other - along * self._out(b, other, -along)) / 2
        offsets = np.array([0.0, *(sign * 8.0 * k for k in range(2, 21) for sign in (1, -1))])
        points = middle + offsets[:, None] * np.array([-along[1], along[0]])
        return _Options(points, points, np.abs(offsets) * 0.6)

    def _stubs(self, joint: Joint) -> _Options:
        """Out of the one operand in sixteen directions from its middle, straight up and down along its width."""
        (end,) = joint.ends
        centre, core = self.at(end), np.array(end.core)
        starts = [(centre, d) for d in _AROUND]
        for share in (-1.0, -0.5, 0.5, 1.0):
            starts += [(centre + np.array((share * core[0], 0.0)), np.array((0.0, sign))) for sign in (-1.0, 1.0)]
            starts += [(centre + np.array((0.0, share * core[1])), np.array((sign, 0.0))) for sign in (-1.0, 1.0)]
        points, labels, cost = [], [], []
        name = np.array([joint.width, joint.height]) / 2
        for start, d in starts:
            reach = self._out(end, start, d)
            for length in (STUB, 2 * STUB):
                points.append(start + d * (reach + length))
                labels.append(points[-1] + d * (_exit(name, d) + (3.0 + DOT / 2 if joint.dotted else 2.0)))
                cost.append(length + 14.0 * (np.abs(d).min() > 1e-6) + 0.02 * np.abs(start - centre).sum())
        return _Options(np.array(points), np.array(labels), np.array(cost))

    def _dots(self, joint: Joint) -> _Options:
        """On a lattice through and around the operands; the name beside the dot, or at the end of a stub."""
        low, high = (self.centres - self.sizes / 2).min(0), (self.centres + self.sizes / 2).max(0)
        ends = np.array([self.at(end) for end in joint.ends])
        lattice = []
        for axis in (0, 1):
            own = np.unique(
                np.round([*self.centres[:, axis], *ends[:, axis], ends[:, axis].mean(), *_gaps(self, axis)], 2)
            )
            outer = [low[axis] - 30, low[axis] - 54, high[axis] + 30, high[axis] + 54]
            lattice.append(np.unique(np.round([*own, *(own + 18), *(own - 18), *outer], 2)))
        grid = np.array([(x, y) for x in lattice[0] for y in lattice[1]])
        around = _AROUND[::2]
        name = np.array([joint.width, joint.height]) / 2
        tips = around * STUB if joint.open else around * 0.0
        beyond = np.array([d * (_exit(name, d) + (2.0 if joint.open else DOT / 2 + 3.0)) for d in around])
        tilted = 10.0 * (np.abs(around).min(1) > 1e-6)
        points = np.repeat(grid, len(around), 0)
        where = points + np.tile(tips, (len(grid), 1))
        cost = np.tile(tilted, len(grid))
        inside = ((where > low - 4) & (where < high + 4)).all(1)
        cost = cost + 60.0 * inside * joint.open
        return _Options(points, where + np.tile(beyond, (len(grid), 1)), cost, where if joint.open else None)

    def _paths(self, joint: Joint, options: _Options) -> Array:
        """The straight pieces of all its wires, [C, m, 2, 2]."""
        points = options.points
        if joint.plain:
            a, b = (self.attach(end, points) for end in joint.ends)
            bend = 2 * points - (a + b) / 2
            ts = np.linspace(0, 1, 7)
            curve = [(1 - t) ** 2 * a + 2 * t * (1 - t) * bend + t**2 * b for t in ts]
            pieces = list(pairwise(curve))
        else:
            pieces = [(self.attach(end, points), points) for end in joint.ends]
            if options.tips is not None:
                pieces.append((points, options.tips))
        if not pieces:
            return np.zeros((len(points), 0, 2, 2))
        return np.stack([np.stack(piece, 1) for piece in pieces], 1)

    def _obstacles(self, joint: Joint, options: _Options, paths: Array) -> Array:
        """What a position hides, passes through and crosses, and how long it is."""
        name = _boxes(options.labels, (joint.width, joint.height))
        boxes, (solids, own, own_of) = self.boxes, self._in_the_way(joint)
        placed = np.array(self.names).reshape(-1, 4)
        dots = np.array(self.dots).reshape(-1, 4)
        old = np.concatenate([np.zeros((0, 2, 2)), *self.segments])
        cost: Array = np.linalg.norm(paths[:, :, 1] - paths[:, :, 0], axis=-1).sum(1)
        cost += _HIDDEN * (_overlap(name, boxes, 4).sum(1) + _overlap(name, placed, 4).sum(1))
        cost += _HIDDEN * _overlap(name, dots, 3).sum(1)
        cost += _THROUGH * _through(old[None], name[:, None], 1.0).sum((1, 2))
        cost += _THROUGH * _through(paths, solids[None], 3.0).sum((1, 2))
        cost += _THROUGH * _through(paths, placed[None], 1.0).sum((1, 2))
        cost += _THROUGH * _through(paths, dots[None], 3.0).sum((1, 2))
        cost += _CROSSED * _crossings(paths, old)
        for k, end in enumerate(joint.ends if joint.dotted else ()):  # no wire through another end of the leg
            others = np.array([(end.item, end.solid) != tuple(which) for which in own_of], dtype=bool)
            cost += _THROUGH * _through(paths[:, k : k + 1], own[None, others], 1.0).sum((1, 2))
        if options.tips is not None:  # its own wires and its own stub
            cost += _THROUGH * _through(paths[:, -1:], own[None], 2.0).sum((1, 2))
            cost += _THROUGH * _through(paths[:, :-1], name[:, None], 1.0).sum((1, 2))
        elif joint.dotted:
            cost += _THROUGH * _through(paths, name[:, None], 1.0).sum((1, 2))
        if joint.dotted:
            dot = _boxes(options.points, (DOT, DOT))
            cost += _HIDDEN * (_overlap(dot, boxes, 7).sum(1) + _overlap(dot, placed, 3).sum(1))
            cost += _HIDDEN * _overlap(dot, dots, 12).sum(1)
            cost += _THROUGH * _through(old[None], dot[:, None], 3.0).sum((1, 2))
        return cost

    def _in_the_way(self, joint: Joint) -> tuple[Array, Array, NDArray[np.int_]]:
        """What its wires must not pass, and what they end in: solids of its items, whole boxes of others."""
        ends = {(end.item, end.solid) for end in joint.ends}
        mine = np.array([tuple(which) in ends for which in self.solid_of])
        inside = np.isin(self.solid_of[:, 0], joint.items)
        others = np.array([k not in joint.items for k in range(len(self.items))])
        return np.concatenate([self.solids[inside & ~mine], self.boxes[others]]), self.solids[mine], self.solid_of[mine]

    def _crowding(self, joint: Joint, options: _Options) -> Array:
        """Wires leave an operand in different directions."""
        cost = np.zeros(len(options.points))
        leaving = [(self.attach(end, options.points), end) for end in joint.ends]
        for start, end in leaving:
            d = _unit(options.points - start)
            for other, direction in self.leaving.get(end, ()):
                cosine = d @ direction
                near = np.linalg.norm(start - other, axis=-1) < 12
                cost += (4 + 8 * near) * (1 + cosine) + 200 * near * (cosine > 0.94) * (cosine - 0.94) / 0.06
        if options.tips is not None:
            d = _unit(options.tips - options.points)
            for start, _ in leaving:
                cosine = (d * _unit(start - options.points)).sum(1)
                cost += 8 * (1 + cosine) + 200 * (cosine > 0.9)
        for k, (start, _) in enumerate(leaving):
            for other, _ in leaving[k + 1 :]:
                cosine = (_unit(start - options.points) * _unit(other - options.points)).sum(1)
                cost += 6 * (1 + cosine) + 200 * (cosine > 0.94)
        return cost


def _gaps(board: Board, axis: int) -> list[float]:
    """The middles between columns (rows) of operands."""
    at = np.unique(np.round(board.centres[:, axis], 2))
    return [float(x) for x in (at[1:] + at[:-1]) / 2]


def _unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9))


def _exit(half: Array, direction: Array) -> float:
    """How far from its centre a ray leaves a box."""
    return float((half / np.maximum(np.abs(direction), 1e-9)).min())


def _boxes(centres: Array, size: tuple[float, float]) -> Array:
    return np.concatenate([centres, np.broadcast_to(np.array(size), centres.shape)], -1)


def _overlap(one: Array, other: Array, gap: float) -> Mask:
    """Which boxes of two lists come closer than `gap`: [C, B]."""
    apart = np.abs(one[:, None, :2] - other[None, :, :2])
    return np.asarray((apart < (one[:, None, 2:] + other[None, :, 2:]) / 2 + gap).all(-1))


def _through(segments: Array, boxes: Array, gap: float) -> Mask:
    """Which segments [C, m, 2, 2] meet which boxes [C, B, 4]: [C, m, B]; either C may be 1."""
    start, step = segments[:, :, None, 0], (segments[:, :, 1] - segments[:, :, 0])[:, :, None]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    half = boxes[:, None, :, 2:] / 2 + gap
    one, other = (boxes[:, None, :, :2] - half - start) / step, (boxes[:, None, :, :2] + half - start) / step
    enter, leave = np.minimum(one, other).max(-1), np.maximum(one, other).min(-1)
    return np.asarray((leave >= np.maximum(enter, 0)) & (enter <= 1))


def _crossings(paths: Array, old: Array) -> Array:
    """How often the paths of each option cross the segments that are there: [C]."""

    def side(a: Array, b: Array, c: Array) -> Array:
        u, v = b - a, c - a
        return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])

    a, b = paths[:, :, None, 0], paths[:, :, None, 1]
    c, d = old[None, None, :, 0], old[None, None, :, 1]
    apart = (side(a, b, c) * side(a, b, d) < -1e-6) & (side(c, d, a) * side(c, d, b) < -1e-6)
    return np.asarray(apart.sum((1, 2)))
