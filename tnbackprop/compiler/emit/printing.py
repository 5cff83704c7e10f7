"""Sympy expressions as torch code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.pycode import PythonCodePrinter
from sympy.printing.str import StrPrinter

from ...diagram.functions import quotient
from ...errors import RuleError
from .layout import LONG, Chain, Doc, Group, flat

_TORCH = "exp log tanh cosh sinh sin cos tan atan erf erfc sign sigmoid log1p expm1"
_FUNCTIONS = {
    **{name: f"torch.{name}" for name in _TORCH.split()},
    "Abs": "torch.abs",
    "power": "torch.pow",
    "loggamma": "torch.lgamma",
    "polygamma": "torch.polygamma",
    "logsigmoid": "torch.nn.functional.logsigmoid",
    "softplus": "torch.nn.functional.softplus",
}
_OPTIONS = {"softplus": ", threshold=40"}
"""softplus is x from the default threshold on, which float64 tells apart."""


def _number(number: sympy.Expr) -> str:
    """An exact number as an int that every dtype takes, or as the nearest float."""
    if number.is_Integer and abs(number) < 2**53:
        return str(int(number))
    value = float(number)
    if value - value != 0:
        raise RuleError(f"the number {sympy.sstr(number.evalf(6))} of a formula is beyond those of float64")
    return repr(value)


class _Printer(PythonCodePrinter):  # type: ignore[misc]
    """`arguments` are the code of symbols; any other symbol is its own name."""

    arguments: Mapping[sympy.Symbol, str] = MappingProxyType({})

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        return self.arguments.get(expr) or str(expr.name)

    def _print_Pow(self, expr: sympy.Pow, **kwargs: object) -> str:
        base, exponent = expr.args
        if base.is_number and exponent.is_number:
            return repr(float(expr))
        shown = self.parenthesize(base, 100)
        if exponent == 2:
            return f"{shown} * {shown}" if base.is_Symbol else f"torch.square({self._print(base)})"
        if exponent == -1:
            return f"1 / {shown}"
        if exponent == sympy.Rational(1, 2):
            return f"torch.sqrt({self._print(base)})"
        if exponent == sympy.Rational(-1, 2):
            return f"torch.rsqrt({self._print(base)})"
        return f"torch.pow({self._print(base)}, {self._print(exponent)})"

    def doc(self, expr: sympy.Expr) -> Doc:
        """The code in pieces where it is long: terms, factors, arguments of functions."""
        code = str(self._print(expr))
        if len(code) <= LONG:
            return code
        name = type(expr).__name__
        if expr.is_Add:
            first, *rest = self._as_ordered_terms(expr)
            minus = [term.as_coeff_Mul()[0].is_negative for term in rest]
            terms = (("-", -term) if less else ("+", term) for less, term in zip(minus, rest, strict=True))
            return Chain((("", self.doc(first)), *((sign, self.doc(term)) for sign, term in terms)))
        if expr.is_Mul:
            first, *rest = (self._factor(each) for each in _factors(expr))
            return Chain((("", first), *(("*", each) for each in rest)))
        if name in _FUNCTIONS and name not in _OPTIONS:
            return Group(f"{_FUNCTIONS[name]}(", tuple(map(self.doc, expr.args)), ")")
        if expr.is_Pow and expr.exp == 2:
            return Group("torch.square(", (self.doc(expr.base),), ")")
        return code

    def _factor(self, factor: sympy.Expr) -> Doc:
        inside = factor.is_Add or isinstance(factor, quotient) or (factor.is_Pow and " " in self._print(factor))
        return Group("(", (self.doc(factor),), ")", comma=False) if inside else self.doc(factor)

    def _print_Mul(self, expr: sympy.Mul) -> str:
        return " * ".join(flat(self._factor(each)) for each in _factors(expr))

    def _print_quotient(self, expr: quotient) -> str:
        above = self.parenthesize(expr.args[0], PRECEDENCE["Mul"], strict=True)
        return f"{above} / {self.parenthesize(expr.args[1], PRECEDENCE['Pow'])}"

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return _number(expr)

    _print_Integer = _print_Rational

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_NumberSymbol(self, expr: sympy.NumberSymbol) -> str:
        return repr(float(expr))

    _print_Pi = _print_Exp1 = _print_NumberSymbol

    def _print_Function(self, expr: sympy.Function) -> str:
        name = type(expr).__name__
        if expr.is_number:
            return repr(float(expr))
        if name not in _FUNCTIONS:
            raise NotImplementedError(f"no torch code for the function {name} in {expr}")
        return f"{_FUNCTIONS[name]}({', '.join(self._print(a) for a in expr.args)}{_OPTIONS.get(name, '')})"

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        pieces = [(self._print(value), condition) for value, condition in expr.args]
        if len(pieces) > 1 and all(value.is_number for value, _ in expr.args):  # where() of numbers would be float32
            like = self._print(min(expr.free_symbols, key=str))
            pieces[-1] = (f"torch.full_like({like}, {pieces[-1][0]})", pieces[-1][1])
        code: str = pieces[-1][0]
        if pieces[-1][1] is not sympy.true:
            code = f"torch.where({self._condition(pieces[-1][1])}, {code}, 0)"
        for value, condition in reversed(pieces[:-1]):
            code = f"torch.where({self._condition(condition)}, {value}, {code})"
        return code

    def _condition(self, condition: sympy.Basic) -> str:
        if isinstance(condition, sympy.And | sympy.Or):
            joiner = " & " if isinstance(condition, sympy.And) else " | "
            return joiner.join(f"({self._condition(a)})" for a in condition.args)
        if isinstance(condition, sympy.Not):
            return f"~({self._condition(condition.args[0])})"
        left, right = (self._print(a) for a in condition.args)
        return f"{left} {condition.rel_op} {right}"


def _factors(product: sympy.Mul) -> list[sympy.Expr]:
    """A number, and what it is multiplied with."""
    number, rest = product.as_coeff_mul()
    own = [sympy.Float(number) if not number.is_Integer else number] if number != 1 else []
    return [*own, *_ratios(rest)]


def _ratios(factors: tuple[sympy.Expr, ...]) -> list[sympy.Expr]:
    """The factors with a² b⁻² as (a / b)²: the squares of small numbers are zero."""
    found = list(factors)
    for below in factors:
        base, exponent = below.as_base_exp()
        above = next((f for f in found if exponent.is_Integer and f.is_Pow and f.exp == -exponent), None)
        if exponent.is_Integer and exponent <= -2 and above is not None:
            found[found.index(above)] = sympy.Pow(above.base / base, -exponent, evaluate=False)
            found.remove(below)
    return found


for _name in _FUNCTIONS:
    setattr(_Printer, f"_print_{_name}", _Printer._print_Function)


def torch_code(expr: sympy.Expr, arguments: Mapping[sympy.Symbol, str]) -> str:
    """Torch code of `expr` with code for each of its symbols."""
    return flat(torch_doc(expr, arguments))


def torch_doc(expr: sympy.Expr, arguments: Mapping[sympy.Symbol, str]) -> Doc:
    """The same in pieces."""
    to = {symbol: sympy.Symbol(f"arg{k}_", real=True) for k, symbol in enumerate(arguments)}
    printer = _Printer()
    printer.arguments = {to[symbol]: code for symbol, code in arguments.items()}
    return printer.doc(expr.xreplace(to))


def number_code(scale: sympy.Expr) -> str:
    """An exact scale as a Python expression of N and numbers."""
    if scale.is_number:
        return _number(scale)
    long = {r: sympy.Float(float(r), 17) for r in scale.atoms(sympy.Rational) if max(abs(r.p), r.q) > 10**6}
    exact = scale.xreplace(long).replace(lambda e: e.is_number and not (e.is_Rational or e.is_Float), sympy.Float)
    return plain_code(exact)


class _Plain(StrPrinter):  # type: ignore[misc]
    """Of sizes and scales, with the spaces that formatters give."""

    def _print_Mul(self, expr: sympy.Mul) -> str:
        if expr.as_coeff_Mul()[0].is_negative:
            return f"-{self.parenthesize(-expr, PRECEDENCE['Mul'], strict=True)}"
        above, below = sympy.fraction(expr, exact=True)
        shown = " * ".join(self.parenthesize(each, PRECEDENCE["Mul"]) for each in sympy.Mul.make_args(above))
        return shown if below == 1 else f"{shown} / {self.parenthesize(below, PRECEDENCE['Atom'] - 1, strict=True)}"

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        if expr.exp.is_negative:
            below = expr.base**-expr.exp
            return f"1 / {self.parenthesize(below, PRECEDENCE['Mul'], strict=True)}"
        if expr.exp == sympy.Rational(1, 2):
            return f"{self.parenthesize(expr.base, PRECEDENCE['Pow'])}**0.5"
        return str(super()._print_Pow(expr, rational))

    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"{expr.p} / {expr.q}" if expr.q != 1 else str(expr.p)

    def _print_Min(self, expr: sympy.Min) -> str:
        return f"min({self.stringify(expr.args, ', ')})"

    def _print_Max(self, expr: sympy.Max) -> str:
        return f"max({self.stringify(expr.args, ', ')})"

    def _print_Mod(self, expr: sympy.Mod) -> str:
        return f"({' % '.join(self.parenthesize(each, PRECEDENCE['Atom']) for each in expr.args)})"

    def _print_floor(self, expr: sympy.floor) -> str:
        parts = sympy.fraction(sympy.together(expr.args[0]))
        return f"({' // '.join(self.parenthesize(each, PRECEDENCE['Atom']) for each in parts)})"

    def _print_ceiling(self, expr: sympy.ceiling) -> str:
        return f"(-{self._print(sympy.floor(-expr.args[0]))})"


def plain_code(expr: sympy.Expr) -> str:
    """A size or a scale as Python."""
    return str(_Plain({"full_prec": True}).doprint(expr))
