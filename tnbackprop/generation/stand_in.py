"""A module that stands for a rule: parameters of the given shapes, and the rule as its only meaning."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..diagram.core import N
from ..errors import InputError
from ..notation.parse import parse_program
from ..notation.rule import Rule
from ..notation.solve import Axes, solve
from ..notation.syntax import Access, accesses
from ..table import Rules

BATCH = 4


class Layer(torch.nn.Module):
    """Stands for a rule: its output has the shape that the rule says, and is zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], output: tuple[Any, ...], title: str) -> None:
        super().__init__()
        self._shape, self._title = output, title
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.new_zeros([input.shape[0] if size == N else int(size) for size in self._shape])

    def __repr__(self) -> str:
        return self._title


def stand_in(what: Rule | str, example: object, rules: Rules) -> tuple[Layer, torch.Tensor, Rules]:
    """The module, an input for it, and the rules with its own. Raises `InputError` and `RuleError`."""
    rule = what if isinstance(what, Rule) else Rule(what)
    if not rule.formula.strip():
        raise InputError("a rule without a formula has no forward: generate from a module that has the rule")
    if not isinstance(example, Mapping) or "input" not in example:
        raise InputError('example= for a rule is {operand: shape}, with "input": {"input": (8, 3), "weight": (2, 3)}')
    shapes = {name: tuple(shape) for name, shape in example.items()}
    lines = parse_program(rule.formula)
    reads = [access for line in lines for access in accesses(line.right)]
    missing = {access.tensor for access in reads} - {"delta", *shapes, *(line.left.tensor for line in lines)}
    if missing:
        raise InputError(f"example= has no shape for {', '.join(sorted(missing))}")
    axes: dict[str, Axes] = {name: tuple((size,) for size in shape) for name, shape in shapes.items()}
    axes["input"] = ((N,), *axes["input"][1:])
    own = [line.left.tensor for line in lines]
    uses: list[Access] = [use for line in lines for use in (line.left, *accesses(line.right))]
    legs = solve(uses, axes, own, rule.constants, "the rule")
    parameters = {name: shape for name, shape in shapes.items() if name != "input"}
    title = " ".join(rule.formula.split())
    layer = Layer(parameters, legs.shape(lines[-1].left.items), title)
    table = MappingProxyType({**rules, Layer: lambda module: rule})
    return layer, torch.zeros(BATCH, *shapes["input"][1:]), table
