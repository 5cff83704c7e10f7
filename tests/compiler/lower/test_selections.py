"""Lowerings of selections: rows are looked up and added in place; a one-hot is built only where nothing else fits."""

from __future__ import annotations

import pytest

from tnbackprop.compiler.lower.selections import selected
from tnbackprop.compiler.lower.table import unfolding
from tnbackprop.diagram.core import BATCH, Delta, Diagram, Leg, Operand, Selection, Tensor, Window

from ...diagram.random_diagrams import product
from ...programs import shapes_of, store_of
from .test_lowerings import check

n = BATCH
t, s, d, k = Leg("t", 2), Leg("s", 2), Leg("d", 3), Leg("k", 3)
y6 = Leg("i", 6)
c, c2, y, x = Leg("c", 4), Leg("c'", 4), Leg("y", 2), Leg("x", 2)


def one(name: str, *legs: Leg, choice: tuple[Leg, ...] = (c,)) -> Selection:
    return Selection(Tensor(f"I{name}", legs), choice)


def X(*legs: Leg) -> Tensor:
    return Tensor("X" + "".join(leg.name for leg in legs), legs)


def made(legs: tuple[Leg, ...], *operands: Operand) -> Diagram:
    return Diagram(legs, (product(*operands),))


BY_ROWS = {
    "look-up": made((n, t, d), one("", n, t), X(c, d)),
    "look-up in the transpose": made((d, t, n), one("", n, t), X(d, c)),
    "look-up in a table per sample": made((n, t, d), one("", n, t), X(n, c, d)),
    "look-up of pixels": made((n, d, t), one("", n, d, t, choice=(y, x)), X(n, d, y, x)),
    "look-up by a constant": made((n, t), one("", t), X(n, c)),
    "look-up in a product": made((n, t), one("", n, t), X(c, d), X(c), X(n, d)),
    "look-up for one number": made((d,), one(""), X(c, d)),
    "scatter": made((c, d), one("", n, t), X(n, t, d)),
    "scatter for each sample": made((n, c, d), one("", n, t), X(n, t, d)),
    "scatter, legs before and after": made((n, d, c, k), one("", n, t), X(n, d, t, k)),
    "scatter of pixels": made((n, d, y, x), one("", n, d, t, choice=(y, x)), X(n, d, t)),
    "scatter with factors in its place": made((n, c, d), one("", n, t), X(n, t), X(c, d)),
    "counts": made((c,), one("", n, t)),
    "two tables": made((n, t, d, k), one("", n, t), X(c, d), X(n, c, k)),
    "tables that share a leg": made((n, t), one("", n, t), X(c, d), X(n, c, d)),
    "a table per sample, rows from two sides": made((n, t, d, k), one("", n, t), X(n, d, c, k)),
    "windows": made((n, t, k), one("", n, t), Window(y6, ((1, c), (1, k))), X(n, y6)),
    "windows, and a weight in their place": made(
        (n, t, k), one("", n, t), Window(y6, ((1, c), (1, k)), -1), X(n, y6), X(n, d, c), X(n, d, t)
    ),
    "windows on two axes": made(
        (n, d, k), one("", n, d, choice=(y, x)), Window(y6, ((2, y), (1, k))), Window(c, ((1, x), (1, k))), X(n, y6, c)
    ),
    "equal indices, choice summed": made((n,), one("", n, t), one("2", n, s), X(n, t, d), X(n, s, d)),
    "equal indices, choice kept": made((c, d), one("", n, t), one("2", n, s), X(n, t, d), X(n, s, d)),
    "pairs of samples": made((n, d), one("", n, t), one("2", t, s), X(s, d)),
    "look-up, then scatter": made((c2, d), one("", n, t), one("2", n, t, choice=(c2,)), X(c, d)),
    "a delta stays": made((c, t, s), one("", n, t), Delta((t, s)), X(n, t)),
}


@pytest.mark.parametrize("what", BY_ROWS)
def test_by_rows(what: str) -> None:
    """Every plan is exact, an index out of range selects nothing, and there is no one-hot of index and choice."""
    for size in (3, 1):
        check(BY_ROWS[what], size)
    (term,) = BY_ROWS[what].products
    store = store_of(shapes_of(*term.operands))
    assert selected(store, term, BY_ROWS[what].legs)
    assert not unfolding(store, term, BY_ROWS[what].legs)


DENSE = {
    "part of the choice is kept": made((n, y), one("", n, choice=(y, x)), X(x)),
    "part of the choice is summed elsewhere": made((n,), one("", n, choice=(y, x)), X(x)),
    "nothing is selected from": made((n,), one("", n)),
    "the choice is a leg of the index": made((n, c), one("", n, c), X(n, c)),
    "a leg of the index is part of the choice": made((n, y, x), one("", n, x, choice=(y, x)), X(x)),
    "where an index is its own place": made((n,), one("", n, c)),
}


@pytest.mark.parametrize("what", DENSE)
def test_dense(what: str) -> None:
    check(DENSE[what])
    (term,) = DENSE[what].products
    assert not selected(store_of(shapes_of(*term.operands)), term, DENSE[what].legs)
