"""Casts that torch makes inside of a call, as calls of their own before it: so a cotangent is cast back, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .graph import Value, depends_on
from .operators import Same, row_of
from .spellings import Shape, cast_to
from .torch_internals import OpOverload

NUMBERS = frozenset({"input", "other", "tensor1", "tensor2", "exponent", "end", "min", "max", "tensors"})
"""Arguments that torch takes for numbers, also where they are integers or truth values. Others may be indices."""

aten = torch.ops.aten
INSIDE = frozenset({
    aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.instance_norm.default,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.var.default, aten.var.dim, aten.var.correction,
    aten.std.default, aten.std.dim, aten.std.correction, aten.hypot.default, aten.logaddexp.default,
})  # fmt: skip
"""Operators whose kernels compute in float32 where tensors are narrower: squares leave float16, or are rounded away."""
NARROW = (torch.float16, torch.bfloat16)


class Casts:
    """Those that were made, each once."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, torch.dtype], Value] = {}

    def in_one_dtype(
        self, target: Any, arguments: dict[str, Any], dtype: torch.dtype, append: Callable[..., Value]
    ) -> dict[str, Any]:
        """The arguments of a differentiable call with a result of `dtype`; `append` enters a call."""
        plain = isinstance(target, OpOverload) and row_of(target).same is not Same.CAST and dtype.is_floating_point
        if not plain or not depends_on(arguments):
            return arguments
        asked, source = arguments.get("dtype"), arguments.get("input")
        if isinstance(asked, torch.dtype) and isinstance(source, Value):
            arguments = {**arguments, "input": self._cast(source, asked, append), "dtype": None}

        def cast(value: Any, name: str) -> Any:
            if isinstance(value, tuple):
                return tuple(cast(each, name) for each in value)
            number = isinstance(value, Value) and (name in NUMBERS or value.dtype.is_floating_point)
            return self._cast(value, dtype, append) if number and _holds(dtype, value.dtype) else value

        return {name: cast(value, name) for name, value in arguments.items()}

    def widened(
        self, target: Any, arguments: dict[str, Any], shape: Shape, dtype: torch.dtype, append: Callable[..., Value]
    ) -> tuple[Any, dict[str, Any]]:
        """The call, or the cast of its value in float32 where torch's kernel computes in that."""
        if target not in INSIDE or dtype not in NARROW or not depends_on(arguments):
            return target, arguments
        wide = {
            name: self._cast(value, torch.float32, append)
            if isinstance(value, Value) and value.dtype.is_floating_point
            else value
            for name, value in arguments.items()
        }
        return cast_to(append(target, wide, shape, torch.float32), dtype)

    def copied(
        self, target: Any, arguments: dict[str, Any], dtype: torch.dtype, append: Callable[..., Value]
    ) -> dict[str, Any]:
        """The arguments of a copy into a tensor of `dtype`. The cast is made anew: it may be under no_grad."""
        source = arguments.get("src")
        if target is not aten.copy.default or not isinstance(source, Value) or source.dtype == dtype:
            return arguments
        return {**arguments, "src": append(*cast_to(source, dtype), source.shape, dtype, f"{source.name}_cast")}

    def _cast(self, value: Value, dtype: torch.dtype, append: Callable[..., Value]) -> Value:
        if value.dtype == dtype:
            return value
        if (value.name, dtype) not in self.made:
            target, arguments = cast_to(value, dtype)
            self.made[value.name, dtype] = append(target, arguments, value.shape, dtype, f"{value.name}_cast")
        return self.made[value.name, dtype]


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether it has every number of another one."""
    return other != dtype and torch.promote_types(dtype, other) == dtype
