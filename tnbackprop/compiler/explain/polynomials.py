"""FLOPs and bytes as polynomials in leg sizes, for people."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from ...diagram.core import Leg, N, V
from ..program.cost import COLUMNS, Terms

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Symbols:
    """One symbol for each leg name and size; N for the batch leg, whatever its name; legs of size 1 drop out."""

    values: dict[sympy.Symbol, int] = field(default_factory=dict)

    def of(self, leg: Leg) -> sympy.Expr:
        """The size of a leg as a symbol: its name, with a number where that name has another size already."""
        if not isinstance(leg.size, int):
            return leg.size
        if leg.size == 1:
            return sympy.Integer(1)
        base, k = leg.name.rstrip("'"), 1
        while True:
            more = f"_{k}" if base[-1:].isdigit() else str(k)
            symbol = sympy.Symbol(base if k == 1 else base + more, integer=True, positive=True)
            if self.values.setdefault(symbol, leg.size) == leg.size:
                return symbol
            k += 1

    def polynomial(self, terms: Terms) -> sympy.Expr:
        """Σ coefficient · Π sizes."""
        return sympy.Add(*(sympy.Mul(c, *(self.of(leg) for leg in legs)) for c, legs in terms))

    def at(self, polynomial: sympy.Expr, batch: int) -> float:
        """The number that a polynomial is at this batch size."""
        return float(polynomial.xreplace({**self.values, N: batch, V: COLUMNS}))

    def text(self, polynomial: sympy.Expr, batch: int) -> str:
        """2·N·o·i + N·o, the largest term first."""
        terms = sorted(sympy.Add.make_args(sympy.expand(polynomial)), key=lambda term: -self.at(term, batch))
        return " + ".join(self._term(term) for term in terms)

    def legend(self) -> str:
        """o=64 i=3 …"""
        return " ".join(f"{symbol}={size}" for symbol, size in self.values.items())

    def _term(self, term: sympy.Expr) -> str:
        coefficient, rest = term.as_coeff_Mul()
        powers = rest.as_powers_dict()
        shown = [] if coefficient == 1 and rest != 1 else [number_text(float(coefficient))]
        for symbol in (N, V, *self.values):
            power = int(powers.get(symbol, 0))
            if power:
                shown.append(str(symbol) + (str(power).translate(_SUPERSCRIPT) if power > 1 else ""))
        return "·".join(shown)


def in_batch(terms: Terms) -> dict[int, int]:
    """The same polynomial in N alone: {power: coefficient}, largest power first."""
    found: dict[int, int] = {}
    for coefficient, legs in terms:
        value, power = coefficient, 0
        for leg in legs:
            if isinstance(leg.size, int):
                value *= leg.size
            else:
                factor, symbols = leg.size.as_coeff_Mul()
                value, power = value * int(factor), power + int(sympy.degree(symbols, N))
        found[power] = found.get(power, 0) + value
    return {power: found[power] for power in sorted(found, reverse=True)}


def in_batch_text(terms: Terms, scale: int = 1) -> str:
    """61,234,567·N + 1,234"""
    shown = []
    for power, coefficient in in_batch(terms).items():
        symbol = "" if power == 0 else "·N" + (str(power).translate(_SUPERSCRIPT) if power > 1 else "")
        shown.append(f"{scale * coefficient:,}{symbol}")
    return " + ".join(shown) or "0"


def number_text(value: float) -> str:
    """1,234 as it is, larger ones as 1.23e+06."""
    return f"{value:,.0f}" if abs(value) < 1e5 else f"{value:.3g}"


def without_common_factor(one: sympy.Expr, other: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Both polynomials divided by the monomial that divides every term of both."""
    terms = [term for p in (one, other) for term in sympy.Add.make_args(sympy.expand(p))]
    common = terms[0]
    for term in terms[1:]:
        common = sympy.gcd(common, term)
    return sympy.expand(one / common), sympy.expand(other / common)
