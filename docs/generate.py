"""What of the guide is made at build time: the table of operations and the pictures.

The table is made of the rule tables and of tests/cases.py: every case is captured, and each operation is shown with the
formula that its row gives for the first call. Nothing in it is written by hand.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

import tnbackprop as tn
from tests.cases import EVERY, RANDOM_CASES, Case
from tnbackprop.compiler.capture.export import capture
from tnbackprop.compiler.translate.graph import op_text
from tnbackprop.drawing import formulas, quantity
from tnbackprop.notation.rule import Rule
from tnbackprop.rules import TABLES, declared
from tnbackprop.table import Composite

Uses = Mapping[Any, tuple[str, Rule | str]]
"""Target -> the first case that has it, and the rule of that call."""

HEAD = """# Operations

Made at build time from the rule tables and `tests/cases.py`; {rows} targets, {covered} of them in a case. A formula is
that of the first call that a case makes: leg names, numbers and sizes are of this call. "As …": the same row as that
target, and no case of its own. Every case is compared with `torch.func` on the forward, for every first-order quantity.

An operation that is not here falls back on `torch.func`, which `program.explain()` says, or is refused:
[Errors](errors.md).
A module with a rule of its own, or one made by `tn.einsum_layer`, is one call: [Add a layer](add-a-layer.md).
"""


def found_in(cases: Iterable[Case]) -> Uses:
    """Capture the cases."""
    found: dict[Any, tuple[str, Rule | str]] = {}
    for case in cases:
        problem = case.build()
        for call in capture(problem.model, problem.loss, (problem.x, problem.y), tn.RULES).calls:
            if call.target in tn.RULES and call.target not in found:
                found[call.target] = case.name, tn.RULES[call.target](call)
    return found


def operations(cases: Iterable[Case] = EVERY + RANDOM_CASES) -> str:
    """The page, one section for each family of rules."""
    found = found_in(cases)
    families = [family for family in TABLES if family is not declared]
    rows = sum(len(family.TABLE) for family in families)
    lines = [HEAD.format(rows=rows, covered=len(found))]
    for family in families:
        lines += [f"\n## {_title(family)}\n", "| target | formula | case |", "|---|---|---|"]
        lines += _rows(family.TABLE, found)
    return "\n".join(lines) + "\n"


def _title(family: ModuleType) -> str:
    """The first words of the module's docstring."""
    return re.split(r"[.:;(\n]", family.__doc__ or family.__name__)[0].strip()


def _rows(table: tn.Table, found: Uses) -> Iterator[str]:
    sharing = {id(table[target]): target for target in reversed(found) if target in table}
    for target, row in table.items():
        shown, case = "", ""
        if target in found:
            shown, case = _formula(found[target][1]), f"`{found[target][0]}`"
        elif isinstance(row, Composite):
            shown = "captured as the operators that it is made of"
        elif id(row) in sharing:
            shown = f"as `{op_text(sharing[id(row)])}`"
        yield f"| `{op_text(target)}` | {shown} | {case} |"


def _formula(rule: Rule | str) -> str:
    """A formula, or declared Jacobians, with what is saved and the derivative at a kink."""
    rule = rule if isinstance(rule, Rule) else Rule(rule)
    lines = [_code(line) for line in rule.formula.strip().splitlines()]
    lines += [_code(f"∂output/∂{name} = {text}") for name, text in rule.jacobian.items()]
    if rule.saved:
        lines.append("saved: " + ", ".join(map(_code, rule.saved)))
    if rule.root is not None:
        lines.append(f"root: {rule.root.columns} columns")
    if rule.kinks:
        lines.append(f"at a kink: {_escaped(rule.kinks)}")
    return "<br>".join(lines)


def _code(text: str) -> str:
    return f'<code class="formula">{_escaped(text.strip())}</code>'


def _escaped(text: str) -> str:
    """HTML that means nothing to Markdown: a table cell may hold no pipe, and no pair of asterisks."""
    return "".join(f"&#{ord(char)};" if char in "|*_`" else html.escape(char) for char in text)


def _convolution() -> tn.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 2))
    batch = torch.randn(4, 1, 8, 8), torch.randint(2, (4,))
    return tn.compile(model, nn.CrossEntropyLoss(), batch, [tn.BatchGrad(), tn.SecondMoment(), tn.KFAC()])


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    program = _convolution()
    r, g = {"input_h": "r", "input_w": "c"}, {"g_layer_0": "g"}
    drawn = {
        "formula": tn.draw(formulas(program, "0"), names={"p_0_weight": "W", "p_0_bias": "b", "layer_0": "z"} | r),
        "second_moment": tn.draw(quantity(program, "second_moment", "0.weight"), names=g | r),
        "kfac": tn.draw(quantity(program, "kfac", "0.weight"), names={"s0_layer_0": "S"} | r),
        "model": tn.draw(program),
    }
    return {f"{name}.svg": drawing.svg for name, drawing in drawn.items()}
