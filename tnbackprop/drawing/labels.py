"""What stands in the nodes: numbers, expressions, index patterns."""

from __future__ import annotations

import re
from collections.abc import Mapping

import sympy

from ..compiler.explain.text import map_text
from ..diagram.core import Leg, Map, Selection, Window, hint_of

Names = Mapping[str, str]
"""What is shown instead of the name of a tensor or a leg."""


def scale_text(scale: sympy.Expr) -> str:
    """An exact number, 1/(2·N); six digits of one that is long."""
    exact = str(sympy.sstr(scale))
    return (exact if len(exact) < 24 else str(sympy.sstr(scale.evalf(6)))).replace("**", "^").replace("*", "·")


def expression(operand: Map, names: Names) -> str:
    """A map in the names of its arguments, with legs where one tensor is read in two ways."""
    read = [hint_of(arg.name) for arg in operand.args]
    shown = []
    for arg in operand.args:
        legs = ", ".join(_name(leg, names) for leg in arg.legs)
        name = hint_of(arg.name)
        shown.append(names.get(name, name) + (f"[{legs}]" if read.count(name) > 1 else ""))
    text = map_text(operand.expr, shown)
    if text.startswith("(") and " else " in text:
        text = text[1:-1]
    for plain, symbol in (("**", "^"), ("*", "·"), (" - ", " − "), ("<=", "≤"), (">=", "≥")):
        text = text.replace(plain, symbol)
    return re.sub(r"\^2(?!\d)", "²", text)


def pattern(window: Window, names: Names) -> str:
    """image = 2h + k − 1"""
    terms = " + ".join(f"{c if c != 1 else ''}{_name(leg, names)}" for c, leg in window.terms).replace("+ -", "− ")
    offset = f" {'+' if window.offset > 0 else '−'} {abs(window.offset)}" if window.offset else ""
    return f"{_name(window.image, names)} = {terms}{offset}"


def one_hot(selection: Selection, names: Names) -> str:
    """𝟙[index = y, x]"""
    choice = ", ".join(_name(leg, names) for leg in selection.choice)
    return f"𝟙[{names.get(hint_of(selection.index.name), hint_of(selection.index.name))} = {choice}]"


def _name(leg: Leg, names: Names) -> str:
    return names.get(leg.name, leg.name)
