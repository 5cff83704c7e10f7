"""What native code does as a whole is written out where a quantity needs its formulas."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..errors import FormulaError
from ..table import Rules, written_out
from .emit.compiled import Compiled


def with_formulas(compiles: Callable[..., Compiled]) -> Callable[..., Compiled]:
    """The same; where more than columns goes back, a VJP alone will not do: then with rules that have formulas."""

    @wraps(compiles)
    def compiled(model: Any, loss: Any, example: Any, quantities: Any, rules: Rules, *args: Any, **options: Any) -> Any:
        try:
            return compiles(model, loss, example, quantities, rules, *args, **options)
        except FormulaError:
            return compiles(model, loss, example, quantities, written_out(rules), *args, **options)

    return compiled
