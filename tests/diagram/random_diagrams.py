"""Random diagrams with integer values, for the laws: every kind of operand, hyperedges, repeated legs, parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tnbackprop.diagram.core import (
    BATCH,
    Delta,
    Diagram,
    Leg,
    Map,
    Operand,
    Part,
    Product,
    Selection,
    Tensor,
    Window,
    argument,
    operand_tensors,
)
from tnbackprop.diagram.reference import evaluate, size_of

Values = Mapping[str, NDArray[Any]]

LAW = settings(max_examples=30, deadline=None, derandomize=True, database=None)
BATCH_SIZE = 3
POOL = (BATCH, *(Leg(name, size) for name, size in zip("abcdef", (2, 3, 2, 3, 1, 4), strict=True)))
FIXED = POOL[1:]
X, Y = argument(0), argument(1)
EXPRESSIONS = (X**2, X + 1, 3 - 2 * X, X**3, sympy.Integer(2), X * Y, X + Y, X**2 * Y - 1)
NUMBERS = (-3.0, -2.0, -1.0, 1.0, 2.0)  # no zero: 1/x is tested, too
SCALES = tuple(map(sympy.sympify, (1, 1, 1, -1, 2, "1/2", "-3/4")))


def product(*operands: Operand, scale: Any = 1) -> Product:
    return Product(sympy.sympify(scale), operands)


def diagram(legs: str, *products: Product) -> Diagram:
    """A diagram over the legs of `POOL`, written as letters."""
    return Diagram(letters(legs), products)


def letters(text: str) -> tuple[Leg, ...]:
    """ "nab" -> the three legs of `POOL`."""
    return tuple(next(leg for leg in POOL if leg.name == letter) for letter in text)


def named(letter: str, legs: tuple[Leg, ...]) -> Tensor:
    """A tensor whose name says its shape, so that one name has one shape."""
    return Tensor("_".join([letter, *(str(leg.size) for leg in legs)]), legs)


def values_of(*diagrams: Diagram, seed: int = 0) -> Values:
    """Small integers for every tensor; for an index also positions that are out of range."""
    generator = np.random.default_rng(seed)
    found = {t.name: t for d in diagrams for p in d.products for op in p.operands for t in operand_tensors(op)}
    shapes = {name: [size_of(leg.size, BATCH_SIZE) for leg in t.legs] for name, t in sorted(found.items())}
    return {
        name: generator.integers(-1, 4, shape) if name.startswith("I") else generator.choice(NUMBERS, shape)
        for name, shape in shapes.items()
    }


def value(diagram: Diagram, values: Values) -> NDArray[Any]:
    return evaluate(diagram, values, BATCH_SIZE)


def assert_same_value(one: Diagram, other: Diagram) -> None:
    """Exactly equal on random integers, with the same legs."""
    assert one.legs == other.legs
    for seed in range(2):
        values = values_of(one, other, seed=seed)
        np.testing.assert_array_equal(value(one, values), value(other, values), f"{one}\n{other}")


def tensors(most: int = 3, names: str = "AB") -> st.SearchStrategy[Tensor]:
    legs = st.lists(st.sampled_from(POOL), max_size=most).map(tuple)
    return st.builds(named, st.sampled_from(names), legs)


@st.composite
def maps(draw: st.DrawFn) -> Map:
    expr = draw(st.sampled_from(EXPRESSIONS))
    return Map(expr, tuple(draw(tensors(2)) for _ in range(len(expr.free_symbols))))


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    first = draw(st.sampled_from(POOL))
    return Delta((first, draw(st.sampled_from([leg for leg in POOL if leg.size == first.size]))))


@st.composite
def windows(draw: st.DrawFn) -> Window:
    image, *legs = draw(st.lists(st.sampled_from(FIXED), min_size=1, max_size=3, unique=True))
    terms = tuple((draw(st.integers(1, 3)), leg) for leg in legs)
    return Window(image, terms, draw(st.integers(-2, 1)))


@st.composite
def selections(draw: st.DrawFn) -> Selection:
    index = draw(tensors(2, "I"))
    choice = draw(st.lists(st.sampled_from([leg for leg in FIXED if leg not in index.legs]), max_size=2, unique=True))
    return Selection(index, tuple(choice))


@st.composite
def part_of(draw: st.DrawFn, depth: int) -> Part:
    """A part whose legs have other names outside, possibly the same name twice."""
    inner = draw(diagrams(most=2, depth=depth - 1))
    alike = [[leg for leg in POOL if leg.size == own.size] for own in inner.legs]
    return Part(inner, tuple(draw(st.sampled_from(legs)) for legs in alike), draw(st.booleans()))


@st.composite
def products(draw: st.DrawFn, most: int = 3, depth: int = 0) -> Product:
    kinds = [tensors(), tensors(), maps(), deltas(), windows(), selections(), *([part_of(depth)] * 3 if depth else [])]
    operands = draw(st.lists(st.one_of(kinds), max_size=most))
    return Product(draw(st.sampled_from(SCALES)), tuple(operands))


@st.composite
def diagrams(draw: st.DrawFn, most: int = 3, depth: int = 0) -> Diagram:
    """Up to three products; the output legs may miss in a product. `depth`: parts inside parts."""
    terms = draw(st.lists(products(most, depth), min_size=1, max_size=3))
    seen = sorted({leg.name for term in terms for leg in term.legs})
    legs = draw(st.lists(st.sampled_from([*seen, "a"]), max_size=3, unique=True))
    return Diagram(letters("".join(legs)), tuple(terms))


@st.composite
def shuffled(draw: st.DrawFn, diagram: Diagram) -> Diagram:
    """The same diagram with products, operands, terms and deltas in another order and all legs renamed."""
    fresh = draw(st.permutations([f"z{k}" for k in range(len(POOL))]))
    to = {leg: Leg(name, leg.size) for leg, name in zip(POOL, fresh, strict=True)}
    terms = [
        Product(p.scale, tuple(draw(_turned(op.rename(to))) for op in draw(st.permutations(p.operands))))
        for p in draw(st.permutations(diagram.products))
    ]
    return Diagram(tuple(to[leg] for leg in diagram.legs), tuple(terms))


@st.composite
def _turned(draw: st.DrawFn, operand: Operand) -> Operand:
    match operand:
        case Delta():
            return Delta(tuple(draw(st.permutations(operand.legs))))
        case Window():
            return Window(operand.image, tuple(draw(st.permutations(operand.terms))), operand.offset)
    return operand
