"""The canonical key: equal for the same diagram under other names and orders, different for everything else."""

from __future__ import annotations

import time

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from tnbackprop.diagram.canonical import key, same
from tnbackprop.diagram.core import BATCH, Delta, Diagram, Leg, Map, Part, Product, Selection, Tensor, Window, argument

from .random_diagrams import LAW, POOL, diagram, diagrams, letters, product, shuffled, value, values_of

X, Y = argument(0), argument(1)
a, b, c, d, e, f = letters("abcdef")
n = BATCH


def t(name: str, *legs: Leg) -> Tensor:
    return Tensor(name, legs)


@LAW
@given(diagrams(depth=1).flatmap(lambda d: st.tuples(st.just(d), shuffled(d))))
def test_the_same_diagram_in_another_dress(pair: tuple[Diagram, Diagram]) -> None:
    assert key(pair[0]) == key(pair[1])
    assert same(*pair)


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Diagram, Diagram]:
    """A diagram and one that differs by exchanging two legs of one size in one place of one operand."""
    one = draw(diagrams())
    k = draw(st.integers(0, len(one.products) - 1))
    chosen = one.products[k]
    operands = list(chosen.operands)
    if operands:
        j = draw(st.integers(0, len(operands) - 1))
        first = draw(st.sampled_from(POOL))
        second = draw(st.sampled_from([leg for leg in POOL if leg.size == first.size]))
        operands[j] = operands[j].rename({first: second, second: first})
    changed = Product(chosen.scale, tuple(operands))
    return one, Diagram(one.legs, (*one.products[:k], changed, *one.products[k + 1 :]))


@LAW
@given(neighbours())
def test_equal_keys_mean_equal_values(pair: tuple[Diagram, Diagram]) -> None:
    one, other = pair
    if key(one) == key(other):
        for seed in range(3):
            values = values_of(one, other, seed=seed)
            np.testing.assert_array_equal(value(one, values), value(other, values), f"{one}\n{other}")


@LAW
@given(diagrams(depth=1))
def test_renaming_keeps_the_key(given: Diagram) -> None:
    """`Diagram.rename` of output legs, also onto the names of summed legs, keeps key and value."""
    summed = [leg for p in given.products for leg in p.legs if leg not in given.legs]
    to: dict[Leg, Leg] = {}
    for k, leg in enumerate(given.legs):
        taken = [other.name for other in (*given.legs, *to.values())]
        name = next((s.name for s in summed if s.name not in taken), f"y{k}")
        to[leg] = Leg(name, leg.size)
    renamed = given.rename(to)
    assert key(renamed) == key(given)
    values = values_of(given)
    np.testing.assert_array_equal(value(renamed, values), value(given, values))


PAIR = diagram("ac", product(t("x", a, b), t("y", c, d)))
INNER = diagram("a", product(t("x", a, b)))
DIFFERENT = {
    "order of the output": (PAIR, Diagram((c, a), PAIR.products)),
    "name of a tensor": (PAIR, diagram("ac", product(t("x", a, b), t("z", c, d)))),
    "a summed leg that joins": (PAIR, diagram("ac", product(t("x", a, b), t("y", c, b)))),
    "axes the other way": (
        diagram("", product(t("x", a, c), t("y", a), t("z", c))),
        diagram("", product(t("x", c, a), t("y", a), t("z", c))),
    ),
    "diagonal": (diagram("", product(t("x", a, a))), diagram("", product(t("x", a, c)))),
    "size of a summed leg": (diagram("", product(t("x", a))), diagram("", product(t("x", b)))),
    "size of an output leg in no operand": (diagram("a", product()), diagram("b", product())),
    "batch leg or a leg of its size": (diagram("", product(t("x", n))), diagram("", product(t("x", b)))),
    "scale": (diagram("", product(scale=2)), diagram("", product(scale=3))),
    "scale of one term": (
        diagram("a", product(t("x", a), scale=2), product(t("y", a))),
        diagram("a", product(t("x", a)), product(t("y", a), scale=2)),
    ),
    "number of terms": (diagram("a", product(t("x", a))), diagram("a", product(t("x", a)), product(t("x", a)))),
    "offset": (diagram("fa", product(Window(f, ((1, a),)))), diagram("fa", product(Window(f, ((1, a),), 1)))),
    "coefficient": (diagram("fa", product(Window(f, ((1, a),)))), diagram("fa", product(Window(f, ((2, a),))))),
    "coefficients exchanged": (
        diagram("fac", product(Window(f, ((1, a), (2, c))))),
        diagram("fac", product(Window(f, ((2, a), (1, c))))),
    ),
    "image and leg exchanged": (
        diagram("ac", product(Window(a, ((1, c),), 1))),
        diagram("ac", product(Window(c, ((1, a),), 1))),
    ),
    "expression": (diagram("a", product(Map(X**2, (t("x", a),)))), diagram("a", product(Map(X**3, (t("x", a),))))),
    "arguments exchanged": (
        diagram("a", product(Map(X - Y, (t("x", a), t("y", a))))),
        diagram("a", product(Map(X - Y, (t("y", a), t("x", a))))),
    ),
    "choice order": (
        diagram("ac", product(Selection(t("I"), (a, c)))),
        diagram("ac", product(Selection(t("I"), (c, a)))),
    ),
    "index of a selection": (
        diagram("a", product(Selection(t("I"), (a,)))),
        diagram("a", product(Selection(t("J"), (a,)))),
    ),
    "inside of a part": (
        diagram("a", product(Part(INNER, (a,)))),
        diagram("a", product(Part(diagram("a", product(t("x", a, d), scale=2)), (a,)))),
    ),
    "one sum or two, of equal factors": (
        diagram("", product(*(t("x", Leg("n0", 3), Leg(f"q{k}", 2)) for k in range(2)))),
        diagram("", product(*(t("x", Leg(f"n{k}", 3), Leg(f"q{k}", 2)) for k in range(2)))),
    ),
    "which of two sums equal factors share": (
        *(
            diagram("", product(t("y", *(Leg(f"n{j}", 3) for j in "01")), *(t("x", n_, Leg(q, 2)) for q in "qr")))
            for n_ in (Leg("n0", 3), Leg("n1", 3))
        ),
    ),
    "cycles: 6-ring or two triangles": (
        diagram("", product(*(t("x", Leg(f"q{k}", 2), Leg(f"q{(k + 1) % 6}", 2)) for k in range(6)))),
        diagram(
            "",
            product(*(t("x", Leg(f"{j}{k}", 2), Leg(f"{j}{(k + 1) % 3}", 2)) for j in "pq" for k in range(3))),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_near_misses_differ(what: str) -> None:
    one, other = DIFFERENT[what]
    assert key(one) != key(other)
    assert not same(one, other)


def test_names_of_a_part_do_not_matter() -> None:
    inner = diagram("c", product(t("x", c, d)))
    assert key(diagram("a", product(Part(INNER, (a,))))) == key(diagram("a", product(Part(inner, (a,)))))


def test_equal_tensors_in_a_symmetric_diagram() -> None:
    """Σ x[p] x[q] x[r] … with all legs alike: no order is preferred, and the key is still found quickly."""
    legs = [Leg(f"q{k}", 2) for k in range(20)]
    one = diagram("", product(*(t("x", leg) for leg in legs)))
    other = diagram("", product(*(t("x", leg) for leg in reversed(legs))))
    start = time.perf_counter()
    assert key(one) == key(other)
    assert time.perf_counter() - start < 5


def test_many_equal_factors() -> None:
    """(Σ_pq x[p, q]²)^k: a factor is serialised by itself, so that time does not grow with the orders of all."""
    factors = [t("x", Leg(f"p{k}", 2), Leg(f"q{k}", 2)) for k in range(12) for _ in range(2)]
    start = time.perf_counter()
    assert key(diagram("", product(*factors))) == key(diagram("", product(*reversed(factors))))
    assert key(diagram("", product(*factors))) != key(diagram("", product(*factors[2:])))
    assert time.perf_counter() - start < 5


def test_summed_and_output_legs_are_told_apart() -> None:
    assert key(diagram("a", product(t("x", a, c)))) != key(diagram("a", product(t("x", c, a))))
    assert key(diagram("a", product(Delta((a, c))))) != key(diagram("c", product(Delta((a, c)), t("x", a))))
    assert key(diagram("", product(scale=sympy.Rational(1, 2)))) != key(diagram("", product(scale=2)))
