"""Sizes of an exported program as sympy expressions in the batch size N."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ...diagram.core import N, Size
from ...errors import UnsupportedError

PLAIN: dict[str, Any] = {
    "IntTrueDiv": lambda a, b: a / b,
    "FloatTrueDiv": lambda a, b: a / b,
    "ToFloat": lambda a: a,
    "Identity": lambda a: a,
    "FloatPow": lambda a, b: a**b,
    "PowByNatural": lambda a, b: a**b,
    "FloorDiv": lambda a, b: sympy.floor(a / b),
    "CeilDiv": lambda a, b: sympy.ceiling(a / b),
    "CleanDiv": lambda a, b: a / b,
    "OpaqueUnaryFn_sqrt": sympy.sqrt,
    "OpaqueUnaryFn_log": sympy.log,
    "OpaqueUnaryFn_exp": sympy.exp,
}
"""torch's own sympy functions, as the mathematics they stand for."""


class Sizes:
    """Converts the symbolic numbers of one exported program."""

    def __init__(self, exported: torch.export.ExportedProgram) -> None:
        self._batch: dict[sympy.Symbol, sympy.Symbol] = {}
        for node in exported.graph.nodes:
            val = node.meta.get("val")
            if node.op == "placeholder" and isinstance(val, torch.Tensor) and val.ndim:
                size: Any = val.shape[0]
                if isinstance(size, torch.SymInt):
                    self._batch |= dict.fromkeys(size.node.expr.free_symbols, N)

    def shape(self, val: torch.Tensor, where: str = "") -> tuple[Size, ...]:
        """The shape of a (fake) tensor."""
        return tuple(self.number(size, where) for size in val.shape)

    def number(self, value: Any, where: str = "") -> Any:
        """A Python number, or a sympy expression in N."""
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value
        expr = value.node.expr
        if not expr.free_symbols <= set(self._batch):
            raise UnsupportedError(
                f"{where} reads a number from a tensor's values (.item(), nonzero, a boolean mask): the graph would "
                "depend on the data. Use torch.where or multiply by the mask"
            )
        expr = sympy.simplify(_plain(expr.xreplace(self._batch)))
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
        return expr
    args = [_plain(a) for a in expr.args]
    name = type(expr).__name__
    return PLAIN[name](*args) if name in PLAIN else expr.func(*args)
