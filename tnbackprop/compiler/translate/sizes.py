"""Sizes of an exported program as sympy expressions in the batch size N."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.printing.codeprinter import PrintMethodNotImplementedError

from ...diagram.core import N, Size
from ...errors import UnsupportedError

PLAIN: dict[str, Any] = {
    **dict.fromkeys(("IntTrueDiv", "FloatTrueDiv", "CleanDiv"), lambda a, b: a / b),
    **dict.fromkeys(("ToFloat", "Identity"), lambda a: a),
    **dict.fromkeys(("FloatPow", "PowByNatural"), lambda a, b: a**b),
    **dict.fromkeys(("Mod", "PythonMod"), sympy.Mod),
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CeilDiv": lambda a, b: sympy.ceiling(a / b),
    "FloorToInt": sympy.floor, "CeilToInt": sympy.ceiling, "Min": sympy.Min, "Max": sympy.Max,
    "TruncToInt": lambda a: sympy.floor(sympy.Abs(a)) * sympy.sign(a),
    "OpaqueUnaryFn_sqrt": sympy.sqrt,
    "OpaqueUnaryFn_log": sympy.log,
    "OpaqueUnaryFn_exp": sympy.exp,
}
"""torch's own sympy functions, as the mathematics they stand for."""


@dataclass(frozen=True)
class Condition:
    """What the graph takes for granted of the batch size: torch's own expression in one symbol, and where it is asked.

    line  of the user's own code, on a line of its own; "" where it is none
    """

    asked: sympy.Basic
    line: str

    def at(self, size: int) -> bool:
        """Whether it holds for so many samples."""
        return bool(self.asked.xreplace(dict.fromkeys(self.asked.free_symbols, sympy.Integer(size))))

    def __str__(self) -> str:
        """N < 64"""
        asked = _plain(self.asked.xreplace(dict.fromkeys(self.asked.free_symbols, N)))
        try:
            text: str = sympy.pycode(asked, fully_qualified_modules=False)
        except PrintMethodNotImplementedError:  # operators on bits
            return str(asked).replace("BitwiseFn_bitwise_", "")
        return text.removeprefix("(").removesuffix(")") if isinstance(asked, sympy.core.relational.Relational) else text


TRIED = (*range(1, 258), *(size for k in range(9, 31) for size in (2**k - 1, 2**k, 2**k + 1)))
"""Batch sizes that say whether a condition is worth telling."""


def first_broken(conditions: Iterable[Condition], size: int) -> Condition | None:
    """The first that does not hold for so many samples."""
    return next((condition for condition in conditions if not condition.at(size)), None)


def shown(conditions: Iterable[Condition]) -> str:
    """Those that rule some size out, as text; "" where there is none."""
    return ", ".join(dict.fromkeys(str(c) for c in conditions if not all(map(c.at, TRIED))))


class Sizes:
    """Converts the symbolic numbers of one exported program."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self._batch: dict[sympy.Symbol, sympy.Symbol] = {}
        self._replaced: Callable[[Any], Any] = lambda expr: expr
        for node in exported.graph.nodes:
            val = node.meta.get("val")
            if node.op == "placeholder" and isinstance(val, torch.Tensor) and val.ndim:
                size: Any = val.shape[0]
                if isinstance(size, torch.SymInt):
                    self._replaced = size.node.shape_env.replace  # sizes that were found to be equal have one symbol
                    self._batch |= dict.fromkeys(size.node.expr.free_symbols, N)

    def conditions(self, asked: Iterable[tuple[Any, str]]) -> tuple[Condition, ...]:
        """Those of the expressions, each with its line, that are of the batch size.

        Without what holds for all but one sample: torch asks that of N by itself, too, as 2·N // 2 != 1, and whether
        the graph is that of one sample is seen by running it (`one_sample`).
        """
        found = (Condition(self._replaced(expr), line) for expr, line in asked)
        known = (c for c in found if c.asked.free_symbols and c.asked.free_symbols <= set(self._batch))
        return tuple(c for c in dict.fromkeys(known) if c.at(1) or not all(map(c.at, TRIED[1:])))

    def shape(self, val: torch.Tensor, where: str = "", line: str = "") -> tuple[Size, ...]:
        """The shape of a (fake) tensor."""
        return tuple(self.number(size, where, line) for size in val.shape)

    def number(self, value: Any, where: str = "", line: str = "") -> Any:
        """A Python number, or a sympy expression in N."""
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value
        expr = value.node.expr
        if not expr.free_symbols <= set(self._batch):
            raise UnsupportedError(
                f"{where} reads a number from a tensor's values (.item(), nonzero, a boolean mask): the graph would "
                f"depend on the data.{line}\n  Use torch.where or multiply by the mask. For experts: w[index], or "
                "out[mask] = expert(x[mask])."
            )
        expr = sympy.simplify(_plain(expr.xreplace(self._batch)))
        if unknown := [f for f in expr.atoms(sympy.Function) if type(f).__module__.startswith("torch.")]:
            raise UnsupportedError(f"{where} reads {unknown[0]}, a function of the batch size N that has no text")
        if expr.free_symbols:
            return expr
        return int(expr) if expr.is_Integer else bool(expr) if expr in (sympy.true, sympy.false) else float(expr)

    def converted(self, value: Any) -> Any:
        """An argument with the symbolic numbers in it converted, lists as tuples."""
        if isinstance(value, list | tuple):
            return tuple(self.converted(v) for v in value)
        return self.number(value)


def _plain(expr: Any) -> Any:
    if not getattr(expr, "args", ()):
        return sympy.Integer(expr) if getattr(expr, "is_Float", False) and float(expr).is_integer() else expr
    args = [_plain(a) for a in expr.args]
    name = type(expr).__name__
    return PLAIN[name](*args) if name in PLAIN else expr.func(*args)
