"""Contractions: torch.einsum and the matrix products, all as lists of legs."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import access, join, leg_names, literal

TABLE = Table()
aten = torch.ops.aten


@TABLE.rule(aten.einsum.default)
def einsum(call: Any) -> Rule:
    """The equation itself; an ellipsis becomes legs, an axis of size 1 that broadcasts its own leg."""
    values = call.tensors
    equation = call.equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    shown = max(
        (len(v.axes) - len(t.replace("...", "")) for t, v in zip(left.split(","), values.values(), strict=True)),
        default=0,
    )
    star = [f"e{k}" for k in range(shown)] if "..." in left else []
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = "..." * ("..." in left) + "".join(once)
    output = _letters(right, star, len(star))
    operands = [
        _letters(t, star, len(v.axes) - len(t.replace("...", "")))
        for t, v in zip(left.split(","), values.values(), strict=True)
    ]
    return Rule(f"output[{join(output)}] = {_contraction(values, operands)}")


def _letters(text: str, star: Sequence[str], hidden: int) -> list[str]:
    """The legs of one operand; a capital letter of the equation, and n, become legs of two letters."""
    before, dots, after = text.partition("...")
    names = {c: c.lower() * 2 if c.isupper() else c for c in string.ascii_letters}
    middle = list(star[len(star) - hidden :]) if dots else []
    return [names[c] for c in before] + middle + [names[c] for c in after]


def _contraction(values: dict[str, Any], operands: Sequence[Sequence[str]]) -> str:
    """The product of the operands; a leg repeated in one operand is a diagonal, size 1 against another size is free."""
    size: dict[str, Any] = {}
    for legs, value in zip(operands, values.values(), strict=True):
        size |= {leg: s for leg, s in zip(legs, value.shape, strict=True) if s != 1}
    factors, fresh = [], 0
    for name, legs in zip(values, operands, strict=True):
        items: list[str] = []
        for leg, own in zip(legs, values[name].shape, strict=True):
            item = leg
            if leg in items or (own == 1 and leg in size):
                item, fresh = f"u{fresh}", fresh + 1
            if leg in items:
                factors.append(f"delta[{leg}, {item}]")
            items.append(item)
        factors.append(f"{name}[{join(items)}]")
    return " * ".join(factors)


def _product(call: Any, left: str, right: str, batch: int) -> str:
    """``left @ right`` with `batch` axes of the output before the matrices, as a sum over i."""
    a, b = call.tensors[left], call.tensors[right]
    legs = leg_names(call.output, skip="i")
    leading, trailing = legs[:batch], legs[batch:]
    row = trailing[:1] if len(a.axes) > 1 else []
    column = trailing[-1:] if len(b.axes) > 1 else []

    def items(value: Any, matrix: Sequence[str], name: str) -> str:
        own = len(value.axes) - len(matrix)
        kept = [
            f"u{k}" if value.shape[k] == 1 and call.output.shape[batch - own + k] != 1 else leading[batch - own + k]
            for k in range(own)
        ]
        return f"{name}[{join([*kept, *matrix])}]"

    return f"{items(a, [*row, 'i'], left)} * {items(b, ['i', *column], right)}"


@TABLE.rule(aten.matmul.default)
def matmul(call: Any) -> Rule:
    """output[*b, r, c] = input[*b, r, i] * other[*b, i, c], with vectors and broadcast batch axes as torch has them."""
    matrices = (len(call.input.axes) > 1) + (len(call.other.axes) > 1)
    text = _product(call, "input", "other", len(call.output.axes) - matrices)
    return Rule(f"output[{join(leg_names(call.output, skip='i'))}] = {text}")


def _plain(call: Any, left: str, right: str, batch: int = 0) -> Rule:
    return Rule(f"output[{join(leg_names(call.output, skip='i'))}] = {_product(call, left, right, batch)}")


TABLE.rule(aten.mm.default)(lambda call: _plain(call, "input", "mat2"))
TABLE.rule(aten.mv.default)(lambda call: _plain(call, "input", "vec"))
TABLE.rule(aten.dot.default)(lambda call: _plain(call, "input", "tensor"))
TABLE.rule(aten.vdot.default)(lambda call: _plain(call, "input", "other"))
TABLE.rule(aten.bmm.default)(lambda call: _plain(call, "input", "mat2", 1))
TABLE.row(Rule("output[a, b] = input[a] * vec2[b]"), aten.outer.default)


def _added(call: Any, left: str, right: str, batch: int) -> Rule:
    """beta * input + alpha * left @ right."""
    legs = leg_names(call.output, skip="i")
    term = access("input", call.input, call.output, legs)
    product = _product(call, left, right, batch)
    return Rule(f"output[{join(legs)}] = {literal(call.beta)} * {term} + {literal(call.alpha)} * {product}")


TABLE.rule(aten.addmm.default)(lambda call: _added(call, "mat1", "mat2", 0))
TABLE.rule(aten.addmv.default)(lambda call: _added(call, "mat", "vec", 0))
TABLE.rule(aten.baddbmm.default)(lambda call: _added(call, "batch1", "batch2", 1))
