"""Layout: a statement in several lines means what it means in one, and none of them is too long."""

from __future__ import annotations

import ast

import pytest
import sympy

from tnbackprop.compiler.emit.layout import Chain, Doc, Group, Row, flat, laid
from tnbackprop.compiler.emit.printer import Printer, data
from tnbackprop.compiler.emit.printing import number_code, torch_doc
from tnbackprop.compiler.program.expr import Filled, Value
from tnbackprop.diagram.core import N
from tnbackprop.notation.code import Code

x, y, z = sympy.symbols("x y z", real=True)
ARGUMENTS = {x: "left", y: "right", z: "third"}
CODES = (
    "({x} + 2 * {y}).reshape(1, -1) * torch.eye(3, dtype={x}.dtype, device='cpu') - ({x} - ({y} - 1)).sum()",
    "torch.func.vmap(lambda each: ({x} - each.log()) * {y}, in_dims=0)(*{x}.shape[:-2], *[{y}, {x}], **dict(a='it'))",
    "sum({x}[k].square() for k in range(3)) / ({x} * {y}) / ({x} / {y})",
    "{x}.new_zeros((*{x}.shape[:-2], 16)).scatter_add_(-1, {y}.flatten(-2).expand(2, -1), {x}).unflatten(-1, [4, 4])",
    "-{x} ** 2 if {y} is None else {x} @ {y} + 1 @ ({x} @ {y})",
)
LONG_NAMES = [Value(key, None, (), hint=key * 12) for key in "xy"]
INSIDE = Group("(", (Chain((("", "b" * 40), ("*", "c" * 40))),), ")", comma=False)
LONG_FORMULA = (x + y * 3) ** 2 * sympy.exp(-x * z / 2 + y) + sympy.tanh(x - y) * (z - 1) - x / 7 - z
DOCS: dict[str, Doc] = {
    "call": Group("f(", ("a" * 30, Row(("key=", Group("g(", ("b" * 30, "c" * 30), ")")))), ")"),
    "one": Group("(", ("a" * 70,), ")", end=","),
    "operators": Chain((("", "a" * 40), ("+", INSIDE))),
    "minus": Chain((("", "-" + "a" * 40), ("-", "b" * 40))),
    "methods": Row((Group("f(", ("a" * 40, "b"), ")"), Group(".g(", ("c", "d" * 40), ")"), "[0]")),
    "data": data({"a": [float(k) for k in range(30)], ("b", 'quo"te'): (1,), "inf": float("inf")}),
    "sympy": torch_doc(LONG_FORMULA, ARGUMENTS),
}


def same(one: str, other: str) -> bool:
    return ast.dump(ast.parse(one.strip())) == ast.dump(ast.parse(other.strip()))


@pytest.mark.parametrize("width", [60, 90, 1000])
@pytest.mark.parametrize("name", DOCS)
def test_the_meaning_stays(name: str, width: int) -> None:
    doc = DOCS[name]
    for before, after in (("value = ", ""), ("return ", "[0]"), ("f(key=", ")")):
        shown = laid(before, doc, after, width)
        assert same(shown, f"{before}({flat(doc)}){after}" if "\n" in shown else before + flat(doc) + after)
        rows = shown.split("\n")
        assert all(len(row) <= width or "# noqa" in row or "# fmt" in row for row in rows)
        assert len(rows) > 1 or width > 60


@pytest.mark.parametrize("width", [40, 60, 90, 1000])
@pytest.mark.parametrize("text", CODES)
def test_code_of_rules(text: str, width: int) -> None:
    code = Code.parsed(text)
    names = {value.key: value for value in LONG_NAMES}
    expr = Filled(code, tuple((hole, names[hole]) for hole in code.holes))
    shown = Printer(lambda value: value.hint, {}, width).statement("value = ", expr)
    assert same(shown, Printer(lambda value: value.hint, {}).statement("value = ", expr))
    assert "'" not in shown


SCALES = (N, 2 * N, N / 2, 1 / N, -1 / N, -N, 3 * N**2 / (N - 1), 1 / (2 * N), -(N - 1) / N**2,
          N / (3 * (N - 1)), N - 1, (N + 1) * (N - 1), sympy.Rational(1, 3) + N, -(N**2),
          sympy.Float(0.1) * N)  # fmt: skip


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_scales(scale: sympy.Expr) -> None:
    for n in (2, 7):
        assert eval(number_code(scale), {"N": n}) == pytest.approx(float(scale.subs(N, n)), rel=1e-15)
