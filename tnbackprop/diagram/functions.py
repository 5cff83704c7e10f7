"""Special functions that stay whole: sympy knows their derivatives, and each is printed by its name.

Written out as exp and log they overflow or cancel in float32 where torch's own kernels do not. Derivatives are written
in such functions, too. All of them are real, of real arguments.
"""

from __future__ import annotations

from functools import reduce
from numbers import Integral, Real
from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE


class _Real(sympy.Function):  # type: ignore[misc]
    is_real = True

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self.slope(*self.args)

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        raise NotImplementedError


class sigmoid(_Real):
    """1 / (1 + exp(-x)). Its derivative is sigmoid(x) sigmoid(-x): 1 - sigmoid(x) would be 0 where x is large."""

    is_positive = True

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        return sigmoid(x) * sigmoid(-x)


class logsigmoid(_Real):
    """log(sigmoid(x))."""

    is_negative = True

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        return sigmoid(-x)


class softplus(_Real):
    """log(1 + exp(x))."""

    is_positive = True

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        return sigmoid(x)


class log1p(_Real):
    """log(1 + x)."""

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        return 1 / (1 + x)


class expm1(_Real):
    """exp(x) - 1."""

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        return sympy.exp(x)


class erfc(_Real):
    """1 - erf(x)."""

    is_positive = True

    def slope(self, x: sympy.Expr) -> sympy.Expr:
        return -2 * sympy.exp(-(x**2)) / sympy.sqrt(sympy.pi)


class power(_Real):
    """base**exponent where both vary. Its slope by the base holds at base 0 and below it, too."""

    @classmethod
    def eval(cls, base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr | None:
        return base**exponent if base.is_number or exponent.is_number else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        base, exponent = self.args
        if argindex == 1:
            return sympy.Piecewise((0, sympy.Eq(exponent, 0)), (exponent * power(base, exponent - 1), True))
        # torch's: at base 0 the power is flat, for exponents that are not negative
        flat = sympy.And(sympy.Eq(base, 0), exponent >= 0)
        return sympy.Piecewise((0, flat), (self * sympy.log(base), True))


class quotient(_Real):
    """above / below, whose derivative has quotients alone: powers of a denominator leave float32 where it does not.

    By the power rule exp(x) / (1 + exp(x)) would have exp(2 x) (1 + exp(x))**-2, which is inf * 0 at x = 80.
    As one function of its two sides it is (above' - (above / below) below') / below.
    """

    precedence = PRECEDENCE["Mul"]

    @classmethod
    def eval(cls, above: sympy.Expr, below: sympy.Expr) -> sympy.Expr | None:
        if above.is_zero or below.is_number:
            return above / below
        if above == below:
            return sympy.Integer(1)
        factor, rest = above.as_coeff_Mul()
        return factor * cls(rest, below) if factor != 1 else None

    def _sympystr(self, printer: Any) -> str:
        above = printer.parenthesize(self.args[0], PRECEDENCE["Mul"], True)
        return f"{above}/{printer.parenthesize(self.args[1], PRECEDENCE['Pow'])}"

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        above, below = self.args
        return quotient(above.diff(symbol), below) - quotient(self * below.diff(symbol), below)


def divides_by(expr: sympy.Expr, symbol: sympy.Symbol) -> bool:
    """Whether the symbol is in a denominator."""
    below = (each.args[1] if isinstance(each, quotient) else each.base for each in expr.find(_is_division))
    return any(each.has(symbol) for each in below)


def _is_division(expr: sympy.Expr) -> bool:
    """A negative power; but for 1 / sqrt(x + 1e-5) and the like, whose own derivative stays in range."""
    if not (expr.is_Pow and expr.exp.is_negative and expr.base.free_symbols):
        return isinstance(expr, quotient)
    slopes = (expr.base.diff(symbol) for symbol in expr.base.free_symbols)
    return expr.exp.is_Integer or not all(slope.is_number for slope in slopes)


def derivative(expr: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """∂expr/∂symbol, of quotients in quotients. Second derivatives of |x| and sign(x) are 0 wherever they exist."""
    found = sympy.diff(_in_quotients(expr), symbol)
    return found.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))


def _in_quotients(expr: sympy.Expr) -> sympy.Expr:
    """The expression with each division as a quotient."""
    if not expr.args or not expr.has(sympy.Pow):
        return expr
    factors = sympy.Mul.make_args(expr)
    below = [b for each in factors if each.is_Pow and _is_division(each) for b in _denominators(each.base, -each.exp)]
    if not below:
        return expr.func(*map(_in_quotients, expr.args))
    above = (_in_quotients(each) for each in factors if not (each.is_Pow and _is_division(each)))
    return reduce(quotient, below, sympy.Mul(*above))


def _denominators(base: sympy.Expr, exponent: sympy.Expr) -> list[sympy.Expr]:
    """What one divides by one after the other: a square may be infinite."""
    base = _in_quotients(base)
    return [base] * int(exponent) if exponent in (2, 3) else [base**exponent]


def exact(number: Real) -> sympy.Expr:
    """A number of Python or NumPy as sympy's, infinite or exact."""
    if isinstance(number, Integral):
        return sympy.Integer(int(number))
    value = float(number)
    return sympy.Rational(value) if value - value == 0 else sympy.oo * (1 if value > 0 else -1)
