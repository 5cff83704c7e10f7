"""Algebra: operators against numpy, Jacobians against exact differences, ⟨Jv, u⟩ = ⟨v, Jᵀu⟩, parts in and out."""

from __future__ import annotations

from functools import reduce
from itertools import chain, combinations

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from tnbackprop.diagram.algebra import Cotangents, Uses, inline, parts, pull_back, tensor
from tnbackprop.diagram.core import (
    BATCH,
    COLUMN,
    COLUMN_COPY,
    Diagram,
    Leg,
    Map,
    N,
    Part,
    Product,
    Selection,
    Tensor,
    Window,
    argument,
    leaves,
    ordered_union,
)
from tnbackprop.diagram.derivatives import differentiate, map_of
from tnbackprop.diagram.jacobian import Jacobian
from tnbackprop.diagram.reference import Array
from tnbackprop.errors import InputError, InvariantError, UnsupportedError

from .random_diagrams import (
    BATCH_SIZE,
    LAW,
    Values,
    assert_same_value,
    diagram,
    diagrams,
    letters,
    product,
    products,
    value,
    values_of,
)

X, Y = argument(0), argument(1)
a, b, c, d, e, f = letters("abcdef")
n = BATCH


def t(name: str, *legs: Leg) -> Tensor:
    return Tensor(name, legs)


# ---------------------------------------------------------------- operators


def aligned(array: Array, own: tuple[Leg, ...], legs: tuple[Leg, ...]) -> Array:
    """The array with axes for all of `legs`, of size 1 where it has none."""
    present = [leg for leg in legs if leg in own]
    moved = array.transpose([own.index(leg) for leg in present])
    return moved.reshape([moved.shape[present.index(leg)] if leg in own else 1 for leg in legs])


@LAW
@given(diagrams(most=2), diagrams(most=2))
def test_product_is_elementwise_by_leg_name(one: Diagram, other: Diagram) -> None:
    values = values_of(one, other)
    legs = ordered_union(one.legs, other.legs)
    found = one * other
    assert found.legs == legs
    expected = aligned(value(one, values), one.legs, legs) * aligned(value(other, values), other.legs, legs)
    np.testing.assert_array_equal(value(found, values), expected)
    np.testing.assert_array_equal(value(one**2, values), value(one, values) ** 2)
    with pytest.raises(InputError, match="a diagram to the power 0"):
        one**0


@pytest.mark.slow
@LAW
@given(diagrams(most=2), diagrams(most=2))
def test_sum_and_difference_broadcast_by_leg_name(one: Diagram, other: Diagram) -> None:
    values = values_of(one, other)
    larger = one if len(one.legs) >= len(other.legs) else other
    if not {*one.legs, *other.legs} <= set(larger.legs):
        with pytest.raises(ValueError, match="cannot add diagrams with legs"):
            one + other
        return
    left, right = (aligned(value(x, values), x.legs, larger.legs) for x in (one, other))
    np.testing.assert_array_equal(value(one + other, values), left + right)
    np.testing.assert_array_equal(value(one - other, values), left - right)
    np.testing.assert_array_equal(value(-one * 3 / 2, values), -1.5 * value(one, values))
    np.testing.assert_array_equal(value(2 * one, values), 2 * value(one, values))


@LAW
@given(diagrams(depth=1), st.data())
def test_summing_output_legs(given: Diagram, data: st.DataObject) -> None:
    """Also legs that no operand has: they multiply by their size."""
    gone = [leg for leg in given.legs if data.draw(st.booleans())]
    values = values_of(given)
    axes = tuple(given.legs.index(leg) for leg in gone)
    found = given.sum(*(leg.name for leg in gone))
    np.testing.assert_array_equal(value(found, values), value(given, values).sum(axes))


@pytest.mark.parametrize(("summed", "times"), [("a", 2), ("n", BATCH_SIZE), ("abn", 6 * BATCH_SIZE)])
def test_an_orphan_leg_multiplies_by_its_size(summed: str, times: int) -> None:
    given = diagram("anb", product(t("x"), scale=5))
    values = {"x": np.array(7.0)}
    assert np.all(value(given.sum(*summed), values) == 35 * times)


def test_sum_and_leg_refuse_unknown_names() -> None:
    with pytest.raises(KeyError, match=r"no leg 'q' among \[a,c\]"):
        diagram("ac", product()).sum("q")


@LAW
@given(diagrams(depth=1), st.booleans())
def test_part_and_relabelled_keep_the_value(given: Diagram, materialized: bool) -> None:
    assert_same_value(given, given.part(materialized))
    relabelled = given.relabel(**{leg.name: f"{leg.name}_" for leg in given.legs})
    assert [leg.name for leg in relabelled.legs] == [f"{leg.name}_" for leg in given.legs]
    values = values_of(given)
    np.testing.assert_array_equal(value(relabelled, values), value(given, values))


def test_relabelling_steps_around_summed_legs() -> None:
    """[a] = Σ_c x[a,c], with a called c: the summed leg steps aside."""
    given = diagram("a", product(t("x", a, c))).relabel(a="c")
    values = {"x": np.arange(4.0)}
    np.testing.assert_array_equal(value(given, values), [1.0, 5.0])


def test_part_of_a_part_is_the_part() -> None:
    given = diagram("a", product(t("x", a, b)))
    assert given.part().part() == given.part()
    assert parts(given.part()) == (given,)
    assert parts(given.part(materialized=True)) == ()
    materialized = given.part(materialized=True)
    assert inline(materialized * materialized).products[0].operands[0] != given.products[0].operands[0]


def test_sum_parameter_keeps_batch_legs_and_columns() -> None:
    m, v, w = Leg("m", N), Leg(COLUMN, 4), Leg(COLUMN_COPY, 4)
    given = Diagram((n, v, a, m, w, b), (product(t("x", n, v, a, m, w, b)),))
    assert given.sum_parameter().legs == (n, v, m, w)
    assert given.ordered("m", COLUMN).legs == (m, v, n, a, w, b)


# ---------------------------------------------------------------- Jacobians


def multilinear(most: int) -> st.SearchStrategy[Diagram]:
    """Diagrams in which the tensor p [a,b] occurs up to `most` times in a product, on any legs."""

    def with_p(drawn: Diagram, uses: list[tuple[str, str]]) -> Diagram:
        extra = tuple(t("p", *letters(first + second)) for first, second in uses)
        first, *rest = drawn.products
        return Diagram(drawn.legs, (Product(first.scale, first.operands + extra), *rest))

    legs = st.tuples(st.sampled_from("ac"), st.sampled_from("bd"))
    return st.builds(with_p, diagrams(most=2), st.lists(legs, min_size=1, max_size=most))


def at(given: Diagram, values: Values, p: Array) -> Array:
    return value(given, {**values, "p": p})


def applied(jacobian: Jacobian, values: Values, v: Array) -> Array:
    """J v."""
    return np.tensordot(value(jacobian.diagram, values), v, axes=len(jacobian.into))


@LAW
@given(multilinear(3))
def test_differentiate_is_the_exact_difference(given: Diagram) -> None:
    """12 J v = 8 (F(p+v) - F(p-v)) - (F(p+2v) - F(p-2v)) for polynomials up to degree 4."""
    jacobian = differentiate(given, "p")
    assert jacobian is not None and jacobian.diagram.legs == jacobian.out + jacobian.into
    values = values_of(given)
    p, v = np.array(values["p"]), np.random.default_rng(7).integers(-2, 3, (2, 3)).astype(float)
    near = at(given, values, p + v) - at(given, values, p - v)
    far = at(given, values, p + 2 * v) - at(given, values, p - 2 * v)
    np.testing.assert_array_equal(12 * applied(jacobian, values, v), 8 * near - far)


@LAW
@given(multilinear(2))
def test_transposed_product(given: Diagram) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩ exactly, with Jᵀ u by `pull_back`, and with the batch leg kept open: Σ_n of it."""
    jacobian = differentiate(given, "p")
    assert jacobian is not None
    generator = np.random.default_rng(3)
    values = dict(values_of(given))
    u, v = generator.integers(-2, 3, value(given, values).shape), generator.integers(-2, 3, (2, 3)).astype(float)
    values["u"] = u.astype(float)
    cotangent, into = tensor("u", given.legs), (Leg("a", 2), Leg("b", 3))
    left = (applied(jacobian, values, v) * u).sum()
    back = pull_back(jacobian, cotangent, keep=(), into=into)
    assert back.legs == into
    assert left == (value(back, values) * v).sum()
    if n in given.legs:
        kept = pull_back(jacobian, cotangent, keep=(n,), into=into)
        assert kept.legs == (n, *into)
        assert left == (value(kept, values) * v).sum()
        np.testing.assert_array_equal(value(kept.sum("n"), values), value(back, values))


MAPS = {
    "square": X**2,
    "product": X * Y,
    "both": X**2 * Y + 3 * X,
    "not of the second": 2 * X,
}


@pytest.mark.parametrize("what", MAPS)
def test_differentiate_a_map(what: str) -> None:
    given = diagram("ab", product(Map(MAPS[what], (t("p", a, b), t("q", b))), t("q", b)))
    values = {"p": np.arange(6.0) - 2, "q": np.array([2.0, -1.0, 3.0])}
    for name in ("p", "q"):
        jacobian = differentiate(given, name)
        assert jacobian is not None
        v = np.ones(values[name].shape).reshape([int(leg.size) for leg in jacobian.into])

        def moved(step: float, name: str = name) -> Array:
            return value(given, {**values, name: values[name] + step})

        near, far = moved(1) - moved(-1), moved(2) - moved(-2)
        np.testing.assert_array_equal(12 * applied(jacobian, values, v), 8 * near - far)


def test_differentiate_what_does_not_occur() -> None:
    assert differentiate(diagram("a", product(t("x", a))), "y") is None


def test_differentiate_refuses() -> None:
    with pytest.raises(InvariantError, match="is an index and has no derivative"):
        differentiate(diagram("a", product(Selection(t("I"), (a,)))), "I")
    with pytest.raises(UnsupportedError, match="x is read with different shapes in one formula"):
        differentiate(diagram("", product(t("x", f)), product(t("x", a, c))), "x")


def test_derivative_of_a_tensor_with_itself_on_other_legs() -> None:
    """F = Σ_ac x[a] x[c] has dF/dx = 2 Σ x, and Σ_c is not lost when x[a] is taken out."""
    jacobian = differentiate(diagram("", product(t("x", a), t("x", c))), "x")
    assert jacobian is not None
    np.testing.assert_array_equal(value(jacobian.diagram, {"x": np.array([2.0, 5.0])}), [14.0, 14.0])


def test_a_leg_of_the_cotangent_that_no_operand_of_the_jacobian_has() -> None:
    """out[a] is constant along a: Jᵀ g sums g over a."""
    jacobian = differentiate(diagram("a", product(t("p", b), t("x", b))), "p")
    assert jacobian is not None
    back = pull_back(jacobian, tensor("g", (a,)), keep=(), into=(b,))
    np.testing.assert_array_equal(value(back, {"g": np.array([2.0, 3.0]), "x": np.array([1.0, 2.0, 4.0])}), [5, 10, 20])
    constant = pull_back(jacobian, diagram("a", product(scale=3)), keep=(), into=(b,))
    np.testing.assert_array_equal(value(constant, {"x": np.array([1.0, 2.0, 4.0])}), [6, 12, 24])


def test_names_of_output_and_parameter_may_agree() -> None:
    """A square linear layer whose parameter legs are called as the output's."""
    layer = Diagram((n, a), (product(t("p", a, c), t("x", n, c)),))
    jacobian = differentiate(layer, "p")
    assert jacobian is not None
    back = pull_back(jacobian, tensor("g", (n, a)), keep=(n,), into=(c, a))  # crossed on purpose
    values = {"g": np.arange(6.0), "x": np.arange(6.0)[::-1].copy()}
    g, x = values["g"].reshape(3, 2), values["x"].reshape(3, 2)
    np.testing.assert_array_equal(value(back, values), np.einsum("no,ni->noi", g, x))


def test_uses_are_summed_before_anything_is_squared() -> None:
    """A parameter used twice: Jᵀ g = J₁ᵀ g₁ + J₂ᵀ g₂, one part; without a use it is zero."""
    layer = Diagram((n, a), (product(t("p", a, b), t("x", n, b)),))
    other = Diagram((n, a), (product(t("p", a, b), t("z", n, b)),))
    found = [differentiate(formula, "p") for formula in (layer, other)]
    uses = Uses(tuple(j for j in found if j is not None), (a, b))
    g = Cotangents((tensor("g", (n, a)), tensor("h", (n, a))), 1 / N)
    values = {name: np.random.default_rng(k).integers(-3, 4, 9) * 1.0 for k, name in enumerate("xz")}
    values |= {name: np.random.default_rng(k).integers(-3, 4, 6) * 1.0 for k, name in enumerate("gh", 5)}
    x, z, one, two = (values[k].reshape(3, -1) for k in "xzgh")
    expected = np.einsum("no,ni->noi", one, x) + np.einsum("no,ni->noi", two, z)
    individual = uses.T @ g
    assert len(parts(individual)) == 1
    np.testing.assert_array_equal(value(individual, values), expected)
    square = (individual * individual).sum("n")
    np.testing.assert_array_equal(value(square, values), (expected**2).sum(0))
    for kept in (frozenset(), frozenset(parts(square))):
        np.testing.assert_array_equal(value(inline(square, kept), values), (expected**2).sum(0))
    unused = Uses((), (a, b)).T @ Cotangents((), 1 / N)
    np.testing.assert_array_equal(value(unused, {}), np.zeros((3, 2, 3)))


# ---------------------------------------------------------------- parts


def subsets(found: tuple[Diagram, ...]) -> list[frozenset[Diagram]]:
    return [frozenset(s) for s in chain.from_iterable(combinations(found, k) for k in range(len(found) + 1))]


@LAW
@given(diagrams(most=2, depth=2))
def test_inline_keeps_the_value_for_any_subset(given: Diagram) -> None:
    for keep in subsets(parts(given)[:3]):
        assert_same_value(given, inline(given, keep))


@LAW
@given(diagrams(most=2, depth=1))
def test_the_square_of_a_sum(given: Diagram) -> None:
    """(G·G) summed over everything: built once and squared, or multiplied out."""
    square = (given * given).sum(*(leg.name for leg in given.legs))
    values = values_of(given)
    expected = (value(given, values) ** 2).sum()
    for keep in (frozenset(), frozenset(parts(square))):
        assert value(inline(square, keep), values) == expected


def test_inline_leaves_nothing_but_materialized_parts() -> None:
    inner = diagram("ab", product(t("x", a, b)))
    loose, materialized = inner.part(), inner.part(materialized=True)
    opened = inline(loose * materialized.relabel(a="c"))
    kinds = [isinstance(op, Part) for op in opened.products[0].operands]
    assert sorted(kinds) == [False, True]
    assert parts(opened) == ()


def test_inline_multiplies_a_leg_that_only_the_part_had() -> None:
    """Σ_ab (x[a], constant along b) = 3 Σ_a x[a]."""
    inner = diagram("ab", product(t("x", a)))
    opened = inline(inner.part().sum("a", "b"))
    assert value(opened, {"x": np.array([2.0, 5.0])}) == 21.0


@LAW
@given(st.lists(products(2), min_size=2, max_size=3))
def test_map_and_window_survive_a_product_of_many(terms: list[Product]) -> None:
    """Products of three parts that share summed names do not mix them."""
    factors = [Diagram((), (term,)) for term in terms]
    values = values_of(*factors)
    expected = np.prod([value(factor, values) for factor in factors])
    together = reduce(lambda left, right: left * right, factors)
    assert value(together, values) == expected
    assert value(inline(together), values) == expected


def test_map_of_drops_what_it_does_not_read() -> None:
    args = (t("x", a), t("y", b))
    assert map_of(sympy.Integer(1), args) == ()
    assert map_of(Y**2, args) == (Map(X**2, (t("y", b),)),)
    assert map_of(sympy.Integer(3), args) == (Map(sympy.Integer(3), ()),)


def test_leaves_and_text() -> None:
    given = diagram("a", product(t("x", a, b), Window(d, ((2, b),), -1), scale=2), product(Map(X**2, (t("y", a),))))
    assert leaves(given) == ("x", "y")
    assert str(given) == "[a] = Σ_{b,d} (2) x[a,b] Π[d=2·b-1] + (y[a]**2)"
    assert str(given.part()) == f"[a] = ({given.body()})"
