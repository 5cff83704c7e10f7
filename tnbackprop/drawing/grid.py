"""Operands on a grid: the arrangements with short wires are tried in full, and the one whose legs cost least is taken.

Few operands are tried in every order, many by exchanging pairs; nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from math import ceil, perm

import numpy as np

from .geometry import Array, Mask
from .place import Board, Item, Joint, Spot

_EXHAUSTIVE = 5000
_TRIED = 4  # arrangements of each grid that are placed in full


@dataclass(frozen=True)
class Arranged:
    """Centres of the operands [k, 2], the spot of every joint, and what they cost."""

    centres: Array
    spots: Sequence[Spot]
    cost: float


@lru_cache(maxsize=1000)
def arrange(items: tuple[Item, ...], joints: tuple[Joint, ...], flat: bool) -> Arranged:
    """The best arrangement of the operands and their legs; flat: in at most two rows, with no cell to spare.

    It depends on sizes only, so that diagrams that differ in their names share it.
    """
    sizes = np.array([item.size for item in items], dtype=float)
    boards = [Board(items, _centres(cells, sizes, joints)) for cells in _arrangements(len(items), joints, flat)]
    extents = [(board.centres + sizes / 2).max(0) - (board.centres - sizes / 2).min(0) for board in boards]
    wide = [0.5 * float(w) + 1.0 * float(h) for w, h in extents]
    best: tuple[float, int] = (np.inf, 0)
    spots: dict[int, list[Spot]] = {}
    for k in sorted(range(len(boards)), key=lambda k: wide[k] + boards[k].least(joints)):
        if (found := boards[k].place(joints, best[0] - wide[k])) is not None:
            spots[k] = found
            best = min(best, (round(boards[k].cost + wide[k], 3), k))
    cost, k = best
    return Arranged(boards[k].centres, spots[k], cost)


def _arrangements(count: int, joints: Sequence[Joint], flat: bool) -> Iterator[Array]:
    """Cells (column, row) of the operands, the best few of every grid."""
    found: dict[bytes, Array] = {}
    for rows, columns in _grids(count, flat):
        cells = np.array([(c, r) for r in range(rows) for c in range(columns)], dtype=float)
        if perm(len(cells), count) <= _EXHAUSTIVE:
            choices = cells[np.array(list(permutations(range(len(cells)), count)))]
            choices = choices[_spanning(choices, rows, columns)]
            cost = np.round(_rough(choices, joints), 6)
            chosen = list(choices[np.argsort(cost, kind="stable")[:_TRIED]])
        else:
            chosen = [cells[order] for order in _exchanged(cells, count, joints)]
        for each in chosen:
            dense = np.stack([np.unique(each[:, axis], return_inverse=True)[1] for axis in (0, 1)], 1)
            found.setdefault(dense.tobytes(), dense.astype(float))
    yield from found.values()


def _spanning(at: Array, rows: int, columns: int) -> Mask:
    """Which arrangements have something in every row and column."""
    full = [(at[:, :, axis] == k).any(1) for axis, count in ((0, columns), (1, rows)) for k in range(count)]
    return np.asarray(np.all(full, axis=0))


def _grids(count: int, flat: bool) -> Iterator[tuple[int, int]]:
    """Rows and columns: cells to spare for three or four operands, as many as needed for more."""
    for rows in range(1, min(count, 2 if flat else max(3, ceil(count**0.5))) + 1):
        least = ceil(count / rows)
        most = 3 if rows > 1 and count in (3, 4) and not flat else least
        yield from ((rows, columns) for columns in range(least, most + 1))


def _exchanged(cells: Array, count: int, joints: Sequence[Joint]) -> Iterator[Array]:
    """From the given order and its snake, exchange the best pair until none helps."""
    columns = int(cells[:, 0].max()) + 1
    snake = sorted(range(len(cells)), key=lambda k: (k // columns, k % columns * (-1) ** (k // columns)))
    for start in (list(range(len(cells))), snake):
        order = np.array(start)
        while True:
            others = np.array([_swapped(order, a, b) for a, b in combinations(range(len(cells)), 2)])
            cost = np.round(_rough(cells[np.concatenate([order[None], others])[:, :count]], joints), 6)
            k = int(np.argmin(cost))
            if k == 0:
                break
            order = others[k - 1]
        yield order[:count]


def _swapped(order: Array, a: int, b: int) -> Array:
    order = order.copy()
    order[[a, b]] = order[[b, a]]
    return order


def _rough(at: Array, joints: Sequence[Joint]) -> Array:
    """A cost of arrangements [P, k, 2] that looks at the grid only: length, operands in the way, crossings, order."""
    count = at.shape[1]
    cost = 0.02 * sum((k * (at[:, k, 0] + count * at[:, k, 1]) * -1 for k in range(count)), np.zeros(len(at)))
    pairs = []
    for joint in joints:
        if len(joint.items) < 2:
            continue
        ends = at[:, joint.items]
        centre = ends.mean(1, keepdims=True)
        cost += np.linalg.norm(ends - centre, axis=-1).sum(1)
        if len(joint.items) == 2:
            pairs.append(joint.items)
    for a, b in pairs:
        for k in set(range(count)) - {a, b}:
            cost += 3.0 * (_distance(at[:, k], at[:, a], at[:, b]) < 0.3)
    for (a, b), (c, d) in combinations(dict.fromkeys(pairs), 2):
        if not {a, b} & {c, d}:
            cost += 1.0 * _cross(at[:, a], at[:, b], at[:, c], at[:, d])
    return cost


def _distance(p: Array, a: Array, b: Array) -> Array:
    """From points to segments."""
    along = b - a
    t = np.clip(((p - a) * along).sum(1) / np.maximum((along**2).sum(1), 1e-9), 0, 1)
    return np.asarray(np.linalg.norm(p - a - t[:, None] * along, axis=1))


def _cross(a: Array, b: Array, c: Array, d: Array) -> Mask:
    def side(p: Array, q: Array, r: Array) -> Array:
        u, v = q - p, r - p
        return np.asarray(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0])

    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)


def _centres(cells: Array, sizes: Array, joints: Sequence[Joint]) -> Array:
    """Columns as wide and rows as high as what they hold, with room for names between."""
    names = [joint.width for joint in joints if joint.plain]
    gaps = max([44.0, *(name + 28 for name in names)]), 46.0
    centres = np.zeros_like(sizes)
    for axis in (0, 1):
        edge = 0.0
        for index in np.unique(cells[:, axis]):
            here = cells[:, axis] == index
            extent = sizes[here, axis].max()
            centres[here, axis] = edge + extent / 2
            edge += extent + gaps[axis]
    return centres
