"""Diagrams and tables as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
from sympy.printing.str import StrPrinter

from ...diagram.core import Diagram, Leg, Map, Operand, Part, Product, argument, hint_of, summed_legs

Names = Mapping[Diagram, str]
"""Parts that are called by a name instead of being written out."""


LONG = 10**6
"""A fraction of larger numbers is shown as a decimal: the 1e-05 of a norm."""


class _Printer(StrPrinter):  # type: ignore[misc]
    def _print_Rational(self, expr: sympy.Rational) -> str:
        return f"{float(expr):.6g}" if max(abs(expr.p), expr.q) > LONG else str(super()._print_Rational(expr))

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        base, exponent = expr.args
        return f"{base}²" if base.is_Symbol and exponent == 2 else str(super()._print_Pow(expr, rational))

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *pieces, last = expr.args
        shown = [f"{self._print(value)} if {self._print(condition)} else " for value, condition in pieces]
        end = (
            self._print(last[0])
            if last[1] is sympy.true
            else f"{self._print(last[0])} if {self._print(last[1])} else 0"
        )
        return "(" + "".join(shown) + end + ")"


def diagram_text(name: str, diagram: Diagram, names: Names) -> str:
    """name[legs] = formula"""
    return f"{hint_of(name)}[{legs_text(diagram.legs)}] = {body_text(diagram, names)}"


def body_text(diagram: Diagram, names: Names) -> str:
    """The formula."""
    text = " + ".join(_product_text(product, diagram.legs, names) for product in diagram.products) or "0"
    return text.replace("+ −", "− ")


def legs_text(legs: Sequence[Leg]) -> str:
    return ",".join(leg.name for leg in legs)


def _product_text(product: Product, output: tuple[Leg, ...], names: Names) -> str:
    summed = summed_legs(product, output)
    shown = []
    negative = bool(product.scale.could_extract_minus_sign())
    scale = -product.scale if negative else product.scale
    if scale != 1 or not product.operands:
        exact = str(_Printer().doprint(scale))
        exact = exact if len(exact) < 24 else sympy.sstr(scale.evalf(6))
        shown.append(exact if scale.is_Atom else f"({exact})")
    shown += [f"Σ_{{{legs_text(summed)}}}"] if summed else []
    operands = [_operand_text(op, names) for op in product.operands]
    for text in dict.fromkeys(operands):
        count = operands.count(text)
        shown.append(text if count == 1 else f"{text}{'²' if count == 2 else f'^{count}'}")
    return ("−" if negative else "") + " ".join(shown)


def _operand_text(operand: Operand, names: Names) -> str:
    match operand:
        case Part() if operand.diagram in names:
            return f"{names[operand.diagram]}[{legs_text(operand.legs)}]"
        case Part():
            inner = operand.diagram.rename(dict(zip(operand.diagram.legs, operand.legs, strict=True)))
            return f"({body_text(inner, names)})"
        case Map():
            text = map_text(operand.expr, [str(arg) for arg in operand.args])
            plain = text.startswith("(") or operand.expr.is_Function or operand.expr == argument(0) ** 2
            return text if plain else f"({text})"
        case _:
            return str(operand)


def map_text(expr: sympy.Expr, args: Sequence[str]) -> str:
    """The expression of a map with these texts for its arguments."""
    return str(_Printer().doprint(expr.xreplace({argument(k): sympy.Symbol(arg) for k, arg in enumerate(args)})))


def table(rows: Sequence[Sequence[str]], indent: str = "  ", right: frozenset[int] = frozenset()) -> list[str]:
    """Rows with aligned columns; the last column is as long as it is."""
    widths = [max((len(row[k]) for row in rows), default=0) for k in range(len(rows[0]) - 1)] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if k in right else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append((indent + "  ".join([*cells, row[-1]])).rstrip())
    return lines


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def size_text(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def shortened(code: str, width: int) -> str:
    code = code.replace("torch.ops.aten.", "aten.").replace("torch.nn.functional.", "F.")
    return code if len(code) <= width else code[: width - 1] + "…"
