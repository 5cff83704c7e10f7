"""Nothing in a picture covers anything else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest

import tnbackprop as tn
from tnbackprop.diagram.core import BATCH, Leg, Tensor
from tnbackprop.drawing import network, place
from tnbackprop.drawing.grid import arrange
from tnbackprop.drawing.scene import Box, End, Scene, Wire

from ..drawn import DIAGRAMS, PICTURES, ROW, drawable, joined, one, wanted

pytestmark = pytest.mark.slow  # every box against every other, in all pictures


def leaves(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, Box]]:
    """Every box with something written or drawn in it, frames not."""
    for k, shape in enumerate(scene.shapes):
        if shape.inner:
            yield from leaves(shape.inner, (*prefix, k))
        else:
            yield (*prefix, k), shape.box
    yield from (((*prefix, -1 - k), wire.label) for k, wire in enumerate(scene.wires) if wire.label)
    yield from (((*prefix, -1000 - k), words.box) for k, words in enumerate(scene.words))


def frames(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, Box]]:
    for k, shape in enumerate(scene.shapes):
        if shape.inner:
            yield (*prefix, k), shape.box
            yield from frames(shape.inner, (*prefix, k))


def wires_of(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, tuple[End, ...], Wire]]:
    """The wire's own label, its ends, the wire."""
    for k, wire in enumerate(scene.wires):
        yield (*prefix, -1 - k), tuple((*prefix, *end) for end in wire.ends), wire
    for k, shape in enumerate(scene.shapes):
        if shape.inner:
            yield from wires_of(shape.inner, (*prefix, k))


def overlap(a: Box, b: Box) -> bool:
    return abs(a.x - b.x) < (a.w + b.w) / 2 - 0.5 and abs(a.y - b.y) < (a.h + b.h) / 2 - 0.5


def within(x: float, y: float, box: Box) -> bool:
    return abs(x - box.x) < box.w / 2 - 1 and abs(y - box.y) < box.h / 2 - 1


def covered(scene: Scene) -> list[str]:
    """What overlaps: boxes, boxes and foreign frames, wires and boxes in which they do not end."""
    boxes, found = dict(leaves(scene)), []
    found += [f"{a} {b}" for (a, p), (b, q) in combinations(boxes.items(), 2) if overlap(p, q)]
    for frame, outer in frames(scene):
        found += [f"frame {frame} {b}" for b, q in boxes.items() if b[: len(frame)] != frame and overlap(outer, q)]
        inner = [q for b, q in boxes.items() if b[: len(frame)] == frame]
        found += [f"out of {frame}" for q in inner if q.left < outer.left or q.right > outer.right or q.top < outer.top]
    for label, ends, wire in wires_of(scene):
        for (x0, y0), (x1, y1) in pairwise(wire.points):
            dots = [(x0 + (x1 - x0) * t / 60, y0 + (y1 - y0) * t / 60) for t in range(61)]
            for b, q in boxes.items():
                if b != label and b not in ends and any(within(x, y, q) for x, y in dots):
                    found.append(f"wire {wire.leg} {ends} {b}")
    return found


@pytest.mark.parametrize("name", DIAGRAMS)
def test_nothing_is_covered(name: str) -> None:
    assert not covered(tn.draw(DIAGRAMS[name], title="a title").scene)


@pytest.mark.parametrize(("name", "what"), PICTURES)
def test_nothing_is_covered_in_programs(name: str, what: str) -> None:
    assert not covered(tn.draw(drawable(name, what)).scene)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    """Up to seven operands with up to three legs each: no box covers another, and all of it reads back."""
    random = Random(seed)
    legs = [BATCH, *(Leg(name, 2) for name in "abcdefgh")]
    operands = [
        Tensor(f"T{k}", tuple(sorted(random.sample(legs, random.randint(1, 3)), key=str)))
        for k in range(random.randint(1, 7))
    ]
    there = sorted({leg for op in operands for leg in op.legs}, key=str)
    diagram = one(tuple(leg for leg in there if random.random() < 0.4), *operands)
    drawn = tn.draw(diagram)
    assert not [text for text in covered(drawn.scene) if not text.startswith("wire")]
    assert joined(drawn.svg) == wanted(diagram)


@pytest.mark.parametrize(("name", "what"), [("linear", "variance"), ("conv", "diag_ggn"), ("conv", "kfac")])
def test_the_search_loses_nothing(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and arrangements that are left out could not have been the best: looking at all gives the same text."""
    quick = tn.draw(drawable(name, what)).svg
    placed = place.Board.place
    monkeypatch.setattr(place, "_AT_ONCE", ())
    monkeypatch.setattr(place.Board, "least", lambda board, joints: 0.0)
    monkeypatch.setattr(place.Board, "place", lambda board, joints, most: placed(board, joints, np.inf))
    monkeypatch.setattr(network, "arrange", arrange.__wrapped__)
    assert tn.draw(drawable(name, what)).svg == quick


def test_names_of_one_width_share_a_layout() -> None:
    """Two convolutions of a network differ in the names of their tensors."""
    tn.draw(DIAGRAMS["window"])
    before = arrange.cache_info().misses
    tn.draw(DIAGRAMS["window"], names={"x": "g"})
    assert arrange.cache_info().misses == before


def test_the_check_sees_what_is_covered() -> None:
    scene = tn.draw(DIAGRAMS["matrix product"]).scene
    moved = Scene(tuple(s.moved(-s.box.x, -s.box.y) for s in scene.shapes), scene.wires)
    assert any(not text.startswith("wire") for text in covered(moved))
    through = one((), Tensor("A", (ROW,)), Tensor("B", (ROW,)))
    drawn = tn.draw(through).scene
    (wire,) = drawn.wires
    between = drawn.shapes[0].moved(wire.path[1][0] / 2, 0.0)
    assert covered(Scene((*drawn.shapes, between), drawn.wires))
