"""Regroup: Jᵀg is the same, whatever legs the operand or the output is read with."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnbackprop.diagram.algebra import pull_back, tensor
from tnbackprop.diagram.core import BATCH, Delta, Diagram, Leg, Operand, Product, Selection, Tensor, Window
from tnbackprop.diagram.jacobian import Jacobian
from tnbackprop.diagram.radix import counted, digits_of
from tnbackprop.diagram.regroup import Sizes, common, regroup

from .random_diagrams import LAW, diagrams, letters, product, value, values_of

a, b, c, d, e, f = letters("abcdef")


@st.composite
def shapes(draw: st.DrawFn, count: int) -> Sizes:
    """A row-major shape of so many elements."""
    sizes = []
    while count > 1:
        sizes.append(draw(st.sampled_from([k for k in range(2, count + 1) if count % k == 0])))
        count //= sizes[-1]
    return tuple(sizes)


i6, j6, o6 = (Leg(name, 6) for name in "ijo")
JOINTS: tuple[tuple[Operand, ...], ...] = (
    (Delta((o6, i6)),),
    (Delta((i6, o6)), Tensor("C_6", (o6,))),
    (Window(o6, ((1, i6),), 1),),
    (Selection(Tensor("I_6", (o6,)), (i6,)),),
    (Tensor("C_6_6", (i6, o6)),),
)
MANY = settings(LAW, max_examples=100)


@st.composite
def jacobians(draw: st.DrawFn) -> Jacobian:
    """A random diagram as a Jacobian: the batch leg is among the output's, if anywhere."""
    given = draw(diagrams())
    legs = draw(st.permutations([leg for leg in given.legs if leg != BATCH]))
    out = legs[: draw(st.integers(0, len(legs)))]
    into = tuple(leg for leg in legs if leg not in out)
    first = tuple(leg for leg in given.legs if leg == BATCH)
    more = draw(st.sampled_from(JOINTS))  # a leg of six elements on both sides: those of random diagrams have four
    products = tuple(Product(p.scale, p.operands + more) for p in given.products)
    out, into = (*first, *out, o6), (*into, i6) if draw(st.booleans()) else (i6, *into)
    return Jacobian(Diagram((*out, *into), products), out, into)


def pulled(jacobian: Jacobian, out: tuple[Leg, ...]) -> Diagram:
    """Jᵀg with the legs [n, *operand], for a g that is read with the legs `out`."""
    return pull_back(jacobian, tensor("g", (BATCH, *(leg for leg in out if leg != BATCH))), (BATCH,), jacobian.into)


def assert_alike(jacobian: Jacobian, other: Jacobian, out: tuple[Leg, ...]) -> None:
    """The other one pulls back the same cotangent, which it reads with the legs `out`."""
    before, after = pulled(jacobian, jacobian.out), pulled(other, out)
    values = dict(values_of(before))
    want, got = value(before, values), value(after, values)
    np.testing.assert_array_equal(got.reshape(want.shape), want, f"{jacobian.diagram}\n{other.diagram}")


def count_of(legs: tuple[Leg, ...]) -> int:
    return prod(int(leg.size) for leg in legs if leg != BATCH)


@pytest.mark.slow
@MANY
@given(jacobians().flatmap(lambda j: st.tuples(st.just(j), shapes(count_of(j.into)))))
def test_operand(pair: tuple[Jacobian, Sizes]) -> None:
    """The output's legs stay: a cotangent has them."""
    jacobian, sizes = pair
    other = regroup(jacobian, into=sizes)
    assert tuple(leg.size for leg in other.into) == sizes
    assert other.out == jacobian.out
    assert_alike(jacobian, other, jacobian.out)


@pytest.mark.slow
@MANY
@given(jacobians().flatmap(lambda j: st.tuples(st.just(j), shapes(count_of(j.out)))))
def test_output(pair: tuple[Jacobian, Sizes]) -> None:
    jacobian, sizes = pair
    if BATCH in jacobian.out:  # only values made of parameters are regrouped
        return
    other = regroup(jacobian, out=sizes)
    assert tuple(leg.size for leg in other.out) == sizes
    assert_alike(jacobian, other, other.out)


def tied(*operands: Operand, into: tuple[Leg, ...] = (i6,)) -> Jacobian:
    return Jacobian(Diagram((o6, *into), (product(*operands),)), (o6,), into)


TIED = {
    "delta": tied(Delta((o6, i6))),
    "two of one": tied(Delta((o6, i6)), Delta((o6, j6)), into=(i6, j6)),
    "window": tied(Window(o6, ((1, i6),), 2)),
    "selection": tied(Selection(Tensor("I_3", (b,)), (i6,)), Delta((o6, i6))),
}


@pytest.mark.parametrize("what", TIED)
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)], ids=str)
def test_tied_legs(what: str, sizes: Sizes) -> None:
    """Legs that a delta ties to one that is split, on the other side or on the same one."""
    jacobian = TIED[what]
    into = (*sizes, *(leg.size for leg in jacobian.into[1:]))
    assert_alike(jacobian, regroup(jacobian, into=into), jacobian.out)
    other = regroup(jacobian, out=sizes)
    assert_alike(jacobian, other, other.out)


SHAPES = {
    "one": ([(1, 6)], (1, 6)),
    "nested": ([(6,), (2, 3)], (2, 3)),
    "nested in each other": ([(4, 3), (2, 6)], (2, 2, 3)),
    "units": ([(1, 6), (6, 1)], (6,)),
    "crossed": ([(2, 3), (3, 2)], (2, 3)),
    "crossed in a part": ([(5, 6), (5, 3, 2), (5, 2, 3), (30,)], (5, 3, 2)),
    "all of the finest": ([(12,), (3, 4), (2, 6), (6, 2)], (3, 2, 2)),
    "nothing": ([(1,), ()], ()),
}


@pytest.mark.parametrize("what", SHAPES)
def test_common(what: str) -> None:
    given, want = SHAPES[what]
    assert common(*given) == want


@pytest.mark.parametrize(
    ("window", "digits"),
    [
        (counted(i6, (a, b)), (a, b)),
        (Window(i6, ((1, a), (2, b))), (b, a)),
        (Window(i6, ((3, a), (1, b)), 1), None),
        (Window(i6, ((2, a), (1, b))), None),
        (Window(Leg("i", 4), ((2, a), (1, a))), None),  # the diagonal only
        (Window(Leg("i", 7), ((3, a), (1, b))), None),
    ],
)
def test_digits(window: Window, digits: tuple[Leg, ...] | None) -> None:
    assert digits_of(window) == digits
