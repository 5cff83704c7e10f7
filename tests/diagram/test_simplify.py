"""Simplify keeps the value, is idempotent, and does not depend on names or orders; each rewrite has its cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from tnbackprop.diagram.canonical import key
from tnbackprop.diagram.core import BATCH, Delta, Diagram, Leg, Map, N, Selection, Tensor, Window, argument
from tnbackprop.diagram.simplify import REWRITES, simplify

from .random_diagrams import LAW, assert_same_value, diagram, diagrams, letters, product, shuffled

X, Y = argument(0), argument(1)
a, b, c, d, e, f = letters("abcdef")
n = BATCH


def t(name: str, *legs: Leg) -> Tensor:
    return Tensor(name, legs)


@LAW
@given(diagrams(depth=1))
def test_keeps_the_value(given: Diagram) -> None:
    assert_same_value(given, simplify(given))


@LAW
@given(diagrams(depth=1))
def test_is_idempotent(given: Diagram) -> None:
    once = simplify(given)
    assert simplify(once) == once


@LAW
@given(diagrams(depth=1).flatmap(lambda d: st.tuples(st.just(d), shuffled(d))))
def test_does_not_depend_on_names_and_orders(pair: tuple[Diagram, Diagram]) -> None:
    one, other = pair
    assert key(simplify(one)) == key(simplify(other)), f"{simplify(one)}\n{simplify(other)}"


a2, b2 = Leg("p", a.size), Leg("q", b.size)
i4, i6, i12 = Leg("i", 4), Leg("i", 6), Leg("i", 12)
REWRITTEN = {
    # what: (before, after)
    "delta between a summed and an output leg": (
        diagram("a", product(Delta((a, c)), t("x", c))),
        diagram("a", product(t("x", a))),
    ),
    "delta between summed legs": (
        diagram("", product(Delta((a, c)), t("x", a), t("y", c))),
        diagram("", product(t("x", a), t("y", a))),
    ),
    "delta between output legs stays": (diagram("ac", product(Delta((a, c)))), diagram("ac", product(Delta((a, c))))),
    "delta whose leg is nowhere else: Σ_c δ[a,c] = 1": (diagram("a", product(Delta((a, c)))), diagram("a", product())),
    "delta alone: Σ_ac δ[a,c] = 2": (diagram("", product(Delta((a, c)))), diagram("", product(scale=2))),
    "delta of a leg with itself, summed: its size": (
        diagram("", product(Delta((b, b)), t("x"))),
        diagram("", product(t("x"), scale=3)),
    ),
    "delta of the batch leg with itself: N": (
        diagram("", product(Delta((n, n)))),
        diagram("", product(scale=N)),
    ),
    "chain of deltas": (
        Diagram((a,), (product(Delta((a, Leg("q", 2))), Delta((Leg("q", 2), c)), t("x", c)),)),
        diagram("a", product(t("x", a))),
    ),
    "equal tensors": (diagram("a", product(t("x", a), t("x", a))), diagram("a", product(Map(X**2, (t("x", a),))))),
    "three equal tensors": (
        diagram("a", product(t("x", a), t("x", a), t("x", a))),
        diagram("a", product(Map(X**3, (t("x", a),)))),
    ),
    "equal names on other legs stay": (
        diagram("", product(t("x", a), t("x", c))),
        diagram("", product(t("x", a), t("x", c))),
    ),
    "a power and its inverse": (
        diagram("ab", product(Map(1 / X, (t("x", a),)), t("x", a), t("y", b))),
        diagram("ab", product(t("y", b))),
    ),
    "a power and its inverse over a summed leg: its size": (
        diagram("", product(Map(1 / X, (t("x", b),)), t("x", b))),
        diagram("", product(scale=3)),
    ),
    "equal maps of two tensors": (
        diagram("a", product(Map(X + Y, (t("x", a), t("y", a))), Map(X + Y, (t("x", a), t("y", a))))),
        diagram("a", product(Map((X + Y) ** 2, (t("x", a), t("y", a))))),
    ),
    "maps that share one of their tensors stay": (
        diagram("a", product(Map(X**2, (t("x", a),)), Map(sympy.sin(X + Y), (t("x", a), t("y", a))))),
        diagram("a", product(Map(X**2, (t("x", a),)), Map(sympy.sin(X + Y), (t("x", a), t("y", a))))),
    ),
    "window squared": (
        diagram("fa", product(Window(f, ((2, a),), 1), Window(f, ((2, a),), 1))),
        diagram("fa", product(Window(f, ((2, a),), 1))),
    ),
    "windows that differ in one leg": (
        diagram("f", product(Window(f, ((2, a), (1, b)), -1), t("x", b), Window(f, ((2, a), (1, b2)), -1), t("y", b2))),
        diagram("f", product(Window(f, ((2, a), (1, b)), -1), t("x", b), t("y", b))),
    ),
    "windows that differ in two legs stay": (
        diagram("f", product(Window(f, ((2, a), (1, b))), Window(f, ((2, a2), (1, b2))), t("x", a, a2, b, b2))),
        diagram("f", product(Window(f, ((2, a), (1, b))), Window(f, ((2, a2), (1, b2))), t("x", a, a2, b, b2))),
    ),
    "windows with other offsets stay": (
        diagram("f", product(Window(f, ((2, a), (1, b)), -1), Window(f, ((2, a), (1, b2)), 0), t("x", b, b2))),
        diagram("f", product(Window(f, ((2, a), (1, b)), -1), Window(f, ((2, a), (1, b2)), 0), t("x", b, b2))),
    ),
    "windows with other steps stay": (
        diagram("f", product(Window(f, ((2, a), (1, b))), Window(f, ((2, a), (2, b2))), t("x", b, b2))),
        diagram("f", product(Window(f, ((2, a), (1, b))), Window(f, ((2, a), (2, b2))), t("x", b, b2))),
    ),
    "selection squared": (
        diagram("a", product(Selection(t("I"), (a,)), Selection(t("I"), (a,)))),
        diagram("a", product(Selection(t("I"), (a,)))),
    ),
    "one index makes one choice": (
        diagram("b", product(Selection(t("I", n), (b,)), Selection(t("I", n), (b2,)), t("x", n, b2))),
        diagram("b", product(Selection(t("I", n), (b,)), t("x", n, b))),
    ),
    "choices of different sizes stay": (
        diagram("ab", product(Selection(t("I"), (a,)), Selection(t("I"), (b,)))),
        diagram("ab", product(Selection(t("I"), (a,)), Selection(t("I"), (b,)))),
    ),
    "delta squared, turned": (
        diagram("ac", product(Delta((a, c)), Delta((c, a)))),
        diagram("ac", product(Delta((a, c)))),
    ),
    "constant map": (diagram("", product(Map(sympy.Integer(5), ()))), diagram("", product(scale=5))),
    "identity map": (diagram("a", product(Map(X, (t("x", a),)))), diagram("a", product(t("x", a)))),
    "window term of size 1": (
        diagram("fb", product(Window(f, ((1, b), (2, e)), 1))),
        diagram("fb", product(Window(f, ((1, b),), 1))),
    ),
    "window that renames": (
        diagram("b", product(Window(d, ((1, b),)), t("x", d))),
        diagram("b", product(t("x", b))),
    ),
    "kernel of size 1": (
        diagram("b", product(Window(d, ((1, b), (1, e))), t("x", d))),
        diagram("b", product(t("x", b))),
    ),
    "summed window term of size 1": (
        Diagram((f, b), (product(Window(f, ((1, b), (3, e)), -1), t("y", e)),)),
        Diagram((f, b), (product(Window(f, ((1, b),), -1), t("y", e)),)),
    ),
    "mixed radix: i = 2·a + c": (
        diagram("ac", product(Window(i4, ((2, a), (1, c))), t("x", i4))),
        diagram("ac", product(t("x", a, c))),
    ),
    "mixed radix of legs that nothing else has": (
        diagram("a", product(Window(i4, ((2, a), (1, c))), t("x", a))),
        diagram("a", product(t("x", a), scale=2)),
    ),
    "mixed radix in the other order": (
        diagram("ab", product(Window(i6, ((1, a), (2, b))), t("x", i6))),
        diagram("ab", product(t("x", b, a))),
    ),
    "mixed radix inside a map": (
        diagram("ac", product(Window(i4, ((2, a), (1, c))), Map(X**2 + Y, (t("x", i4), t("y", i4))))),
        diagram("ac", product(Map(X**2 + Y, (t("x", a, c), t("y", a, c))))),
    ),
    "three digits": (
        diagram("acb", product(Window(i12, ((6, a), (3, c), (1, b))), t("x", i12))),
        diagram("acb", product(t("x", a, c, b))),
    ),
    "not all of the image: i = 2·a + c with 6 of them stays": (
        diagram("ac", product(Window(i6, ((2, a), (1, c))), t("x", i6))),
        diagram("ac", product(Window(i6, ((2, a), (1, c))), t("x", i6))),
    ),
    "overlapping windows stay": (
        diagram("bc", product(Window(i4, ((1, b), (1, c))), t("x", i4))),
        diagram("bc", product(Window(i4, ((1, b), (1, c))), t("x", i4))),
    ),
    "gaps stay": (
        diagram("ac", product(Window(i6, ((3, a), (1, c))), t("x", i6))),
        diagram("ac", product(Window(i6, ((3, a), (1, c))), t("x", i6))),
    ),
    "padding stays": (
        diagram("ac", product(Window(i4, ((2, a), (1, c)), -1), t("x", i4))),
        diagram("ac", product(Window(i4, ((2, a), (1, c)), -1), t("x", i4))),
    ),
    "like terms": (
        diagram("a", product(t("x", a, b), t("y", b)), product(t("y", d), t("x", a, d), scale=2)),
        diagram("a", product(t("x", a, b), t("y", b), scale=3)),
    ),
    "like terms that cancel": (
        diagram("a", product(t("x", a), scale="1/2"), product(t("x", a), scale="-1/2")),
        diagram("a"),
    ),
    "terms on other output legs stay": (
        diagram("ac", product(t("x", a)), product(t("x", c), scale=-1)),
        diagram("ac", product(t("x", a)), product(t("x", c), scale=-1)),
    ),
    "zero": (diagram("a", product(t("x", a), scale=0)), diagram("a")),
}


@pytest.mark.parametrize("what", REWRITTEN)
def test_rewrites(what: str) -> None:
    before, after = REWRITTEN[what]
    assert_same_value(before, simplify(before))
    assert key(simplify(before)) == key(after), str(simplify(before))


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda r: r.__name__)
def test_every_rewrite_has_a_case(rewrite: object) -> None:
    """Each row of the table rewrites something above, and the value stays."""
    changed = 0
    for before, _ in REWRITTEN.values():
        for term in before.products:
            new = rewrite(term, before.legs)  # type: ignore[operator]
            if new is not None:
                changed += 1
                assert_same_value(Diagram(before.legs, (term,)), Diagram(before.legs, (new,)))
    assert changed


WITHOUT_TORCH = """
import sys, types
package = types.ModuleType("tnbackprop")
package.__path__ = [{package!r}]
sys.modules["tnbackprop"] = package
sys.path.insert(0, {tests!r})
import tnbackprop.{modules}
import {own}
assert not any(name == "torch" or name.startswith("torch.") for name in sys.modules), "torch is imported"
"""
MODULES = (
    "errors diagram.core diagram.canonical diagram.simplify diagram.jacobian diagram.algebra diagram.regroup "
    "diagram.radix diagram.functions diagram.reference notation.syntax notation.solve notation.expand notation.parse "
    "notation.inside notation.code notation.rule notation.bind quantities.factors"
).split()


@pytest.mark.slow
def test_the_symbolic_part_needs_no_torch() -> None:
    """Its modules, and their tests, load without torch (the package's front is what imports it)."""
    root = Path(__file__).parents[2]
    tests = "diagram.test_simplify, diagram.test_canonical, diagram.test_algebra, notation.test_notation"
    own = ", ".join(f"tests.{name.strip()}" for name in tests.split(","))
    code = WITHOUT_TORCH.format(
        package=str(root / "tnbackprop"), tests=str(root), modules=", tnbackprop.".join(MODULES), own=own
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
