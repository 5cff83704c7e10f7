"""Where legs go between operands that are in their places: for every leg the best of a few hundred positions.

Legs go one after another. A position costs what it hides or crosses, and the length of its wires; a leg of two
operands is a wire through its name, any other is a dot with a wire to each operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from .geometry import Array, boxes, crossings, grown, leaving, length, norm, overlap, through, unit
from .scene import Box, Point

DOT = 8.0
STUB = 20.0
_HIDDEN, _THROUGH, _CROSSED = 2000.0, 700.0, 150.0
_AT_ONCE = 12, 60, 300  # points, before those that cost more at least
_AROUND = np.array([(np.cos(a), np.sin(a)) for a in np.arange(0, 2 * np.pi, np.pi / 8)])
_ALONG = [(share, sign) for share in (-1.0, -0.5, 0.5, 1.0) for sign in (-1.0, 1.0)]
_SHARES = np.array([(0.0, 0.0) for _ in _AROUND] + [at for s, _ in _ALONG for at in ((s, 0.0), (0.0, s))])
_DIRECTIONS = np.concatenate([_AROUND, [d for _, sign in _ALONG for d in ((0.0, sign), (sign, 0.0))]])
"""Where in the core of an operand a stub begins, and where it goes: from the middle, and straight from elsewhere."""


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
    """Points, and for each the ways to go on from there: a stub where the leg is open, and the name."""

    points: Array  # [C, 2]
    cost: Array  # [C]
    labels: Array  # [C, a, 2]
    aside: Array  # [C, a]: what the name costs there
    tips: Array | None = None  # [C, a, 2]

    def at(self, which: NDArray[np.intp]) -> _Options:
        """Some of the points."""
        tips = self.tips if self.tips is None else self.tips[which]
        return _Options(self.points[which], self.cost[which], self.labels[which], self.aside[which], tips)


@dataclass(frozen=True)
class _Around:
    """What is near a leg: boxes."""

    foreign: Array  # that its wires must not pass: solids of its items, other items whole
    own: Array  # in which its wires end
    others: tuple[Array, ...]  # for each end, those of the other ends


@dataclass
class Board:
    """Operands with their places, and the legs placed so far."""

    items: Sequence[Item]
    centres: Array  # [k, 2]
    names: Array = field(default_factory=lambda: np.zeros((0, 4)))
    dots: Array = field(default_factory=lambda: np.zeros((0, 4)))
    left: dict[Terminal, list[tuple[Array, Array]]] = field(default_factory=dict)  # where and in which direction
    cost: float = 0.0

    def __post_init__(self) -> None:
        self.sizes = np.array([item.size for item in self.items])
        self.boxes = np.concatenate([self.centres, self.sizes], 1)
        self.solid_of = [(k, j) for k, item in enumerate(self.items) for j in range(len(item.solids))]
        solids = [self.items[k].solids[j].moved(*map(float, self.centres[k])) for k, j in self.solid_of]
        self.solids = np.array([(box.x, box.y, box.w, box.h) for box in solids])
        inside = [np.array(item.segments, dtype=float).reshape(-1, 2, 2) for item in self.items]
        self.segments = np.concatenate([own + at for own, at in zip(inside, self.centres, strict=True)])

    def place(self, joints: Sequence[Joint], most: float) -> list[Spot] | None:
        """A spot for every joint, in the order given; None where they cost more than that."""
        first = {True: 0, False: 1}
        order = sorted(
            range(len(joints)), key=lambda k: (first[joints[k].plain], -len(joints[k].ends), self._span(joints[k]), k)
        )
        spots, rest = {}, self.least(joints)
        for k in order:
            if self.cost + rest > most:
                return None
            rest -= self.least([joints[k]])
            spots[k] = self._best(joints[k])
        return [spots[k] for k in range(len(joints))]

    def least(self, joints: Sequence[Joint]) -> float:
        """What the joints cost at least: from one end to the farthest other."""
        total = 0.0
        for joint in joints:
            cores = [(self.at(end), np.array(end.core)) for end in joint.ends]
            distance = [np.maximum(np.abs(a - b) - c - d, 0.0) for (a, c), (b, d) in combinations(cores, 2)]
            total += max([float(np.hypot(*each)) for each in distance], default=0.0) + STUB * joint.open
        return total

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

    def _out(self, end: Terminal, starts: Array, directions: Array) -> Array:
        """How far from there rays leave the box of the terminal's item."""
        inside = (starts - self.centres[end.item]) * np.sign(directions)
        return leaving(self.sizes[end.item] / 2 - inside, directions)

    def _best(self, joint: Joint) -> Spot:
        """The cheapest option, the first of equals: looked at in the order of what they cost at least."""
        options = self._options(joint)
        wires = self._wires(joint, options.points)
        least = options.cost + length(wires) + self._crowding(joint, options.points)
        order = np.argsort(least, kind="stable")
        best, k, a = np.inf, 0, 0
        around = self._around(joint)
        for first, last in pairwise((0, *_AT_ONCE, len(order))):
            some = np.sort(order[first:last][least[order[first:last]] < best + 1e-3])
            if not len(some):
                break
            cost = least[some] + self._in_the_way(joint, around, options.points[some], wires[some])
            some, cost = some[cost < best + 1e-3], cost[cost < best + 1e-3]
            if len(some):
                total = np.round(cost[:, None] + self._near_operands(joint, around, options.at(some), wires[some]), 4)
                at, way = divmod(int(np.argmin(total)), total.shape[1])
                best, k, a = min((best, k, a), (float(total[at, way]), int(some[at]), way))
        self.cost += best
        spot = Spot(options.points[k], None if options.tips is None else options.tips[k, a], options.labels[k, a])
        self._keep(joint, spot, wires[k])
        return spot

    def _keep(self, joint: Joint, spot: Spot, wires: Array) -> None:
        self.names = np.concatenate([self.names, boxes(spot.label[None], (joint.width, joint.height))])
        stub = [] if spot.tip is None else [np.array([[spot.point, spot.tip]])]
        self.segments = np.concatenate([self.segments, wires, *stub])
        if joint.dotted:
            self.dots = np.concatenate([self.dots, boxes(spot.point[None], (DOT, DOT))])
        for end in joint.ends:
            start = self.attach(end, spot.point)
            self.left.setdefault(end, []).append((start, unit(spot.point - start)))

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
        along = unit(other - one)
        middle = (one + along * self._out(a, one, along) + other - along * self._out(b, other, -along)) / 2
        offsets = np.array([0.0, *(sign * 8.0 * k for k in range(2, 21) for sign in (1, -1))])
        points = middle + offsets[:, None] * np.array([-along[1], along[0]])
        return _Options(points, np.abs(offsets) * 0.6, points[:, None], np.zeros((len(points), 1)))

    def _stubs(self, joint: Joint) -> _Options:
        """Out of the one operand in sixteen directions from its middle, straight up and down along its width."""
        (end,) = joint.ends
        starts = self.at(end) + _SHARES * np.array(end.core)
        reach = self._out(end, starts, _DIRECTIONS)
        lengths = np.array([STUB, 2 * STUB])
        points = (starts[:, None] + _DIRECTIONS[:, None] * (reach[:, None] + lengths)[..., None]).reshape(-1, 2)
        name = leaving(np.array([joint.width, joint.height]) / 2, _DIRECTIONS)
        labels = points + np.repeat(_DIRECTIONS * (name + (3.0 + DOT / 2 if joint.dotted else 2.0))[:, None], 2, 0)
        cost = 14.0 * (np.abs(_DIRECTIONS).min(1) > 1e-6) + 0.02 * np.abs(starts - self.at(end)).sum(1)
        return _Options(points, (cost[:, None] + lengths).reshape(-1), labels[:, None], np.zeros((len(points), 1)))

    def _dots(self, joint: Joint) -> _Options:
        """On a lattice through and around the operands; the name next to the dot, or at the end of a stub."""
        low, high = (self.centres - self.sizes / 2).min(0), (self.centres + self.sizes / 2).max(0)
        ends = np.array([self.at(end) for end in joint.ends])
        lattice = []
        for axis in (0, 1):
            own = np.unique(
                np.round([*self.centres[:, axis], *ends[:, axis], ends[:, axis].mean(), *_gaps(self, axis)], 2)
            )
            outer = [low[axis] - 30, low[axis] - 54, high[axis] + 30, high[axis] + 54]
            lattice.append(np.unique(np.round([*own, *(own + 18), *(own - 18), *outer], 2)))
        points = np.stack(np.meshgrid(*lattice, indexing="ij"), -1).reshape(-1, 2)
        around = _AROUND[::2]
        name = leaving(np.array([joint.width, joint.height]) / 2, around)
        tips = points[:, None] + around * (STUB if joint.open else 0.0)
        labels = tips + around * (name + (2.0 if joint.open else DOT / 2 + 3.0))[:, None]
        inside = ((tips > low - 4) & (tips < high + 4)).all(-1)
        aside = 10.0 * (np.abs(around).min(1) > 1e-6) + 60.0 * inside * joint.open
        return _Options(points, np.zeros(len(points)), labels, aside, tips if joint.open else None)

    def _wires(self, joint: Joint, points: Array) -> Array:
        """The straight pieces of all its wires but the stub of a dot, [C, m, 2, 2]."""
        if joint.plain:
            a, b = (self.attach(end, points) for end in joint.ends)
            bend = 2 * points - (a + b) / 2
            ts = np.linspace(0, 1, 7)
            curve = [(1 - t) ** 2 * a + 2 * t * (1 - t) * bend + t**2 * b for t in ts]
            pieces = list(pairwise(curve))
        else:
            pieces = [(self.attach(end, points), points) for end in joint.ends]
        return np.stack([np.stack(piece, 1) for piece in pieces], 1)

    def _in_the_way(self, joint: Joint, around: _Around, points: Array, wires: Array) -> Array:
        """What the wires pass through and cross, and what a dot hides."""
        there = _all((around.foreign, 3), (self.names, 1), (self.dots, 3))
        cost = _THROUGH * through(wires, there[None]).sum((1, 2))
        cost += _CROSSED * crossings(wires, self.segments)
        if joint.dotted:
            for k, others in enumerate(around.others):
                cost += _THROUGH * through(wires[:, k : k + 1], grown(others, 1)[None]).sum((1, 2))
            dot = boxes(points, (DOT, DOT))
            cost += _HIDDEN * overlap(dot, _all((self.boxes, 7), (self.names, 3), (self.dots, 12))).sum(1)
            cost += _THROUGH * through(self.segments[None], grown(dot, 3)[:, None]).sum((1, 2))
        return np.asarray(cost)

    def _near_operands(self, joint: Joint, around: _Around, options: _Options, wires: Array) -> Array:
        """What the name and the stub of a dot cost, hide and cross: [C, a]."""
        count = options.labels.shape[1]
        name = boxes(options.labels.reshape(-1, 2), (joint.width, joint.height))
        there = _all((self.boxes, 4), (self.names, 4), (self.dots, 3))
        cost = options.aside.reshape(-1) + _HIDDEN * overlap(name, there).sum(1)
        cost += _THROUGH * through(self.segments[None], grown(name, 1)[:, None]).sum((1, 2))
        if joint.dotted:
            cost += _THROUGH * through(np.repeat(wires, count, 0), grown(name, 1)[:, None]).sum((1, 2))
        if options.tips is not None:
            starts, tips = np.repeat(options.points, count, 0), options.tips.reshape(-1, 2)
            stub = np.stack([starts, tips], 1)[:, None]
            cost += length(stub) + _CROSSED * crossings(stub, self.segments)
            there = _all((around.foreign, 3), (self.names, 1), (self.dots, 3), (around.own, 2))
            cost += _THROUGH * through(stub, there[None]).sum((1, 2))
            for end in joint.ends:
                cosine = (unit(tips - starts) * unit(self.attach(end, starts) - starts)).sum(1)
                cost += 8 * (1 + cosine) + 200 * (cosine > 0.9)
        return np.asarray(cost.reshape(-1, count))

    def _around(self, joint: Joint) -> _Around:
        ends = [(end.item, end.solid) for end in joint.ends]
        own = [k for k, which in enumerate(self.solid_of) if which in ends]
        inside = [k for k, which in enumerate(self.solid_of) if which[0] in joint.items and which not in ends]
        boxes = [k for k in range(len(self.items)) if k not in joint.items]
        others = tuple(self.solids[[k for k in own if self.solid_of[k] != end]] for end in ends)
        return _Around(np.concatenate([self.solids[inside], self.boxes[boxes]]), self.solids[own], others)

    def _crowding(self, joint: Joint, points: Array) -> Array:
        """Wires leave an operand in different directions."""
        cost = np.zeros(len(points))
        starts = [self.attach(end, points) for end in joint.ends]
        for start, end in zip(starts, joint.ends, strict=True):
            d = unit(points - start)
            for other, direction in self.left.get(end, ()):
                cosine = d @ direction
                near = norm(start - other) < 12
                cost += (4 + 8 * near) * (1 + cosine) + 200 * near * (cosine > 0.94) * (cosine - 0.94) / 0.06
        for start, other in combinations(starts, 2):
            cosine = (unit(start - points) * unit(other - points)).sum(1)
            cost += 6 * (1 + cosine) + 200 * (cosine > 0.94)
        return cost


def _gaps(board: Board, axis: int) -> list[float]:
    """The middles between columns (rows) of operands."""
    at = np.unique(np.round(board.centres[:, axis], 2))
    return [float(x) for x in (at[1:] + at[:-1]) / 2]


def _all(*some: tuple[Array, float]) -> Array:
    """Lists of boxes as one, each with its gap."""
    return np.concatenate([grown(each, gap) for each, gap in some])
