"""Boxes [B, 4] (centre and size), points [C, 2] and segments [C, m, 2, 2] of many options at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def norm(vectors: Array) -> Array:
    return np.asarray(np.hypot(vectors[..., 0], vectors[..., 1]))


def unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.maximum(norm(vectors), 1e-9)[..., None])


def length(paths: Array) -> Array:
    """Of all pieces of each option: [C]."""
    return np.asarray(norm(paths[:, :, 1] - paths[:, :, 0]).sum(1))


def leaving(half: Array, directions: Array) -> Array:
    """How far from its centre a ray leaves a box, from its half size."""
    return np.asarray((half / np.maximum(np.abs(directions), 1e-9)).min(-1))


def boxes(centres: Array, size: tuple[float, float]) -> Array:
    """One of that size around each point."""
    return np.concatenate([centres, np.broadcast_to(np.array(size), centres.shape)], -1)


def grown(boxes: Array, gap: float) -> Array:
    """Larger by a gap on every side."""
    return np.asarray(boxes + np.array([0.0, 0.0, 2 * gap, 2 * gap]))


def overlap(one: Array, other: Array) -> Mask:
    """Which boxes of two lists overlap: [C, B]."""

    def along(axis: int) -> Mask:
        distance = np.abs(one[:, None, axis] - other[None, :, axis])
        return np.asarray(distance < (one[:, None, 2 + axis] + other[None, :, 2 + axis]) / 2)

    return along(0) & along(1)


def through(segments: Array, boxes: Array) -> Mask:
    """Which segments [C, m, 2, 2] meet which boxes [C, B, 4]: [C, m, B]; either C may be 1."""

    def along(axis: int) -> tuple[Array, Array]:
        start = segments[:, :, None, 0, axis]
        step = (segments[:, :, 1, axis] - segments[:, :, 0, axis])[:, :, None]
        step = np.where(np.abs(step) < 1e-9, 1e-9, step)
        middle, half = boxes[:, None, :, axis] - start, np.abs(boxes[:, None, :, 2 + axis] / (2 * step))
        return middle / step - half, middle / step + half

    (enter, leave), (later, sooner) = along(0), along(1)
    enter, leave = np.maximum(enter, later), np.minimum(leave, sooner)
    return np.asarray((leave >= np.maximum(enter, 0)) & (enter <= 1))


def crossings(paths: Array, old: Array) -> Array:
    """How often the paths of each option cross the segments [S, 2, 2]: [C]."""
    new, there = paths[:, :, None], old[None, None]
    return np.asarray((_divided(new, there) & _divided(there, new)).sum((1, 2)))


def _divided(lines: Array, segments: Array) -> Mask:
    """Whether the ends of the segments are on different sides of the lines."""
    x, y = lines[..., 0, 0], lines[..., 0, 1]
    dx, dy = lines[..., 1, 0] - x, lines[..., 1, 1] - y
    one, other = (dx * segments[..., k, 1] - dy * segments[..., k, 0] - (dx * y - dy * x) for k in (0, 1))
    return np.asarray(one * other < -1e-6)
