"""The square of a norm of all entries is a sum, over samples too; the norm is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..translate.graph import Value
from .calls import Append, Rewritten
from .flat import Known

aten = torch.ops.aten


def squared_norm(
    target: Any, arguments: Mapping[str, Any], known: Known, append: Append
) -> Rewritten | None:
    """sum(v²) for (the 2-norm of all entries of v)²; None for other calls."""
    source = arguments.get("input")
    squares = target is aten.square.default or (target is aten.pow.Tensor_Scalar and arguments["exponent"] == 2)
    if not squares or not isinstance(source, Value) or source.shape != ():
        return None
    call = known.made(source)
    if call is None or call.target is not aten.linalg_vector_norm.default or call.ord != 2:
        return None
    entries = call.input  # all of them, as the norm has no axes
    squared = append(aten.square.default, {"input": entries}, entries.shape, entries.dtype)
    return aten.sum.default, {"input": squared, "dtype": call.dtype}
