"""Complex numbers on the way from real ones to real ones: calls inside of the call that makes real numbers of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedError
from .graph import Call, Value
from .torch_internals import OpOverload

MOST = 200
"""Calls in one another: what is read twice is computed twice."""


class Complex:
    """The calls that make complex values, by the names of those."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}

    def keep(self, call: Call, no_grad: bool, where: str) -> Value:
        """Remember a call with a complex output. Raises `UnsupportedError` where no program could have it."""
        if not isinstance(call.target, OpOverload):
            raise UnsupportedError(f"{where} gives complex numbers, of which no rule speaks")
        if no_grad and any(value.differentiable for value in call.tensors.values()):
            raise UnsupportedError(
                f"{where} makes complex numbers of parameters in a no_grad block. Detach the parameters instead"
            )
        if _count(call) > MOST:
            raise UnsupportedError(
                f"{where}: more than {MOST} operations in complex numbers, one on the other. Go through real ones "
                "between them: torch.view_as_real"
            )
        self.calls[call.output.name] = call
        return call.output

    def within(self, arguments: Mapping[str, Any], where: str, target: Any) -> dict[str, Any]:
        """Arguments with calls in the place of complex values."""

        def inside(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(inside, value))
            known = isinstance(value, Value) and value.name in self.calls
            if known and not isinstance(target, OpOverload):
                raise UnsupportedError(f"{where} reads complex numbers, of which no rule speaks")
            return self.calls[value.name] if known else value

        return {name: inside(value) for name, value in arguments.items()}


def _count(call: Call) -> int:
    return 1 + sum(map(_count, call.nested))
