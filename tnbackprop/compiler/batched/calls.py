"""Calls in front of another, which have it read a batch that is an axis of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...diagram.core import Size
from ..translate.graph import Value

Shape = tuple[Size, ...]
Rewritten = tuple[Any, dict[str, Any]]
"""A call: the operator and its arguments."""
Append = Callable[[Any, dict[str, Any], Shape, torch.dtype], Value]
"""Append a call of an operator, with the shape and the dtype of its output."""


def reshaped(append: Append, value: Value, shape: Shape) -> Value:
    """[*value] -> [*shape], in row-major order."""
    return append(torch.ops.aten.reshape.default, {"input": value, "shape": shape}, shape, value.dtype)
