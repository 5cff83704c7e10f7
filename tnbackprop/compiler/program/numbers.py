"""Numbers of a program: an exact scale, of N and numbers."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

TOTAL = sympy.Symbol("total", integer=True, positive=True)
"""Inside a function of some samples: how many there are in the whole batch. N is the size of the slice there."""


@dataclass(frozen=True)
class Number:
    """An exact scale."""

    value: sympy.Expr

    @property
    def symbols(self) -> set[sympy.Symbol]:
        return set(self.value.free_symbols)
