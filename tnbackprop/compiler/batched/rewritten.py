"""What a call is written as where samples stand in a row, or a norm is over them: the first of several that fits."""

from __future__ import annotations

from typing import Any

from .calls import Append, Rewritten, Shape
from .copies import over_batch
from .flat import Known, by_sample
from .grouped import own_kernels, own_statistics
from .norms import extreme_norm, squared_norm


def rewritten(target: Any, arguments: dict[str, Any], shape: Shape, known: Known, append: Append) -> Rewritten:
    """The call, or another of the same value, in which the batch is an axis of its own where that is needed."""
    return (
        by_sample(target, arguments, shape, known, append)
        or own_kernels(target, arguments, shape, append)
        or own_statistics(target, arguments, shape, append)
        or squared_norm(target, arguments, known, append)
        or extreme_norm(target, arguments, append)
        or over_batch(target, arguments, shape, append)
    )
