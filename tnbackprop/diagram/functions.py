"""Special functions that stay whole: sympy knows their derivatives, and each is printed by its name.

Written out as exp and log they overflow or cancel in float32 where torch's own kernels do not. Derivatives are written
in such functions, too. All of them are real, of real arguments.
"""

from __future__ import annotations

from numbers import Integral, Real

import sympy


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


def exact(number: Real) -> sympy.Expr:
    """A number of Python or NumPy as sympy's, infinite or exact."""
    if isinstance(number, Integral):
        return sympy.Integer(int(number))
    value = float(number)
    return sympy.Rational(value) if value - value == 0 else sympy.oo * (1 if value > 0 else -1)
