"""The result: a mapping from quantity name to {parameter name: value}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

import torch
from torch.serialization import add_safe_globals

from ..errors import InputError
from ..linalg import KroneckerFactors

Tensors = Literal[
    "grad", "batch_grad", "batch_l2", "batch_dot", "second_moment", "variance", "sqrt_ggn", "sqrt_ggn_mc", "diag_ggn",
    "diag_ggn_mc", "ggn_trace", "ggn_gram", "hessian_diag", "hesscale", "bl89", "jacobians", "ntk",
]  # fmt: skip
Matrices = Literal["kflr", "kfac", "kfra"]
"""For type checkers: what the values of the built-in quantities are under their own names."""


class Result(Mapping[str, Mapping[str, Any]]):
    """``result["variance"]["features.0.weight"]``, ``result.loss``, ``result.output``."""

    def __init__(self, loss: torch.Tensor | None, output: Any, values: Mapping[str, Mapping[str, Any]]) -> None:
        self.loss, self.output, self._values = loss, output, values

    @overload
    def __getitem__(self, quantity: Tensors) -> Mapping[str, torch.Tensor]: ...

    @overload
    def __getitem__(self, quantity: Matrices) -> Mapping[str, KroneckerFactors]: ...

    @overload
    def __getitem__(self, quantity: str) -> Mapping[str, Any]: ...

    def __getitem__(self, quantity: str) -> Mapping[str, Any]:
        try:
            return self._values[quantity]
        except KeyError:
            known = ", ".join(self._values) or "none"
            raise InputError(f"no quantity {quantity!r} in this result; it has: {known}") from None

    def __contains__(self, quantity: object) -> bool:
        return quantity in self._values

    def get(self, quantity: str, default: Any = None) -> Any:
        """The quantity's values, or `default` where this result has none."""
        return self._values.get(quantity, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f"loss {float(self.loss):.6g}, "
        shown = (f"{q} of {len(by)} parameters" for q, by in self._values.items())
        return f"Result({loss}{', '.join(shown)})"


add_safe_globals([Result])  # what torch.load takes as it is
