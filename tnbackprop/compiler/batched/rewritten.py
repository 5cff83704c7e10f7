"""What a call is written as where samples stand in a row, or a norm is over them: the first of several that fits."""

from __future__ import annotations

from typing import Any

import torch

from ..translate.graph import Value
from .copies import Shape, over_batch
from .flat import Known, by_sample
from .grouped import own_kernels
from .masks import Append
from .norms import squared_norm


def rewritten(
    target: Any, arguments: dict[str, Any], shape: Shape, dtype: torch.dtype, known: Known, append: Append
) -> tuple[Any, dict[str, Any]]:
    """The call, or another of the same value, in which the batch is an axis of its own where that is needed."""

    def ours(target: Any, arguments: dict[str, Any], shape: Shape) -> Value:
        return append(target, arguments, shape, dtype)

    return (
        by_sample(target, arguments, shape, known, append)
        or own_kernels(target, arguments, shape, ours)
        or squared_norm(target, arguments, known, append)
        or over_batch(target, arguments, shape, ours)
    )
