"""The square of a norm of all entries is a sum, over samples too, the norm is none; norms of infinite order."""

from __future__ import annotations

import math
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


def extreme_norm(target: Any, arguments: Mapping[str, Any], append: Append) -> Rewritten | None:
    """The largest or smallest magnitude for the order ±∞; None for other calls."""
    if target not in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim):
        return None
    order, source = arguments.get("ord", arguments.get("p")), arguments["input"]
    if order is None or not math.isinf(order):
        return None
    dtype = arguments.get("dtype") or source.dtype
    along = {"dim": arguments["dim"] or tuple(range(len(source.axes))), "keepdim": arguments["keepdim"]}
    size = append(aten.abs.default, {"input": source}, source.shape, source.dtype)
    if dtype != source.dtype:
        size = append(aten.to.dtype, {"input": size, "dtype": dtype}, source.shape, dtype)
    return (aten.amax if order > 0 else aten.amin).default, {"input": size, **along}
