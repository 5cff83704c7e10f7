"""Tables of rules: from what is called to the row that describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import RuleError
from .notation.rule import Rule

RuleFunction = Callable[[Any], Rule | str]
"""A row: from a `Call` (for a module target: from the module) to its rule."""


@dataclass(frozen=True)
class Composite:
    """A row for an operator that is others, all with rules: its calls are replaced by `function` while capturing.

    function  None: what PyTorch makes of it
    whole     its rule where nothing looks inside, with a kernel for one column
    inside    another function, where more than columns goes back: of operators that all have formulas
    """

    function: Callable[..., Any] | None = None
    whole: RuleFunction | None = None
    inside: Callable[..., Any] | None = None

    @property
    def written_out(self) -> Composite:
        return replace(self, function=self.inside, inside=None) if self.inside else self

    def __call__(self, call: Any) -> Rule | str:
        if self.whole is not None:
            return self.whole(call)
        raise RuleError(f"{call.where} is made of other operators, and was not replaced by them")


Rules = Mapping[Any, RuleFunction]
"""From a target (an operator's overload, a primitive, or a module class) to its row."""


def written_out(rules: Rules) -> Rules:
    """The same with composites of operators that all have formulas."""
    return {target: row.written_out if isinstance(row, Composite) else row for target, row in rules.items()}


class Table(dict[Any, RuleFunction]):
    """A mapping of rules that refuses two rows for one target."""

    def rule(self, *targets: Any, override: bool = False) -> Callable[[RuleFunction], RuleFunction]:
        """Decorator: enter a row for each target. A second row for a target is a `RuleError`."""

        def enter(row: RuleFunction) -> RuleFunction:
            for target in targets:
                if target in self and not override:
                    raise RuleError(f"two rules for {target}: pass override=True to replace the earlier one")
            self.update(dict.fromkeys(targets, row))
            return row

        return enter

    def composite(
        self, *targets: Any, whole: RuleFunction | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: a function of the operator's arguments, written in operators that have rules."""

        def enter(function: Callable[..., Any]) -> Callable[..., Any]:
            self.rule(*targets)(Composite(function, whole))
            return function

        return enter

    def row(self, rule: Rule, *targets: Any) -> None:
        """Enter the same constant rule for each target."""
        self.rule(*targets)(lambda call: rule)
