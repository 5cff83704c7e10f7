"""Calls that couple samples although their shapes look innocent: what capture refuses besides reshapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import UnsupportedError
from .axes import ADVICE, batch_axis, show
from .graph import Value
from .torch_internals import OpOverload

ALONG = frozenset(
    """softmax _softmax log_softmax _log_softmax safe_softmax cumsum cumprod logcumsumexp cummax cummin flip roll sort
    argsort topk renorm glu index_select gather take_along_dim scatter scatter_add scatter_reduce index_add index_copy
    index_fill diff fft_fft fft_ifft unfold slice slice_scatter select_scatter""".split()
)
"""Operators (by base name) that couple the entries along their `dim` and keep the axis."""

SPATIAL = re.compile(r"(conv|pool|upsample|pad)\w*?(\d)d")
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def check_mixing(target: Any, arguments: Mapping[str, Any], output: Value, ranges: set[str], where: str) -> None:
    """Refuse a differentiable call that couples samples. `ranges`: names of values equal to arange(N)."""
    if not output.depends_on or not isinstance(target, OpOverload):
        return
    base = target._schema.name.split("::")[1]
    if base == "einsum":
        _check_einsum(arguments, where)
    source = arguments.get("input", arguments.get("query"))
    axis = batch_axis(source) if isinstance(source, Value) else None
    if axis is None:
        return
    assert isinstance(source, Value)
    shown = f"{source.name} {show(source.shape)}"
    along = _dims(arguments, len(source.axes))
    if (base in ALONG and axis in along) or (base == "roll" and not along):
        raise UnsupportedError(f"{where} works along the batch axis {axis} of {shown}. {ADVICE}use another dim")
    if base == "select" and axis in along:
        raise UnsupportedError(f"{where} takes single samples out of {shown}. {ADVICE}index another axis")
    if axis not in _sample_axes(base, arguments, len(source.axes)):
        raise UnsupportedError(
            f"{where} finds the batch on axis {axis} of {shown}, where it couples positions. {ADVICE}"
            "put the batch first (batch_first=True)"
        )
    indices = arguments.get("indices")
    if base in ("index", "index_put") and isinstance(indices, tuple) and axis < len(indices):
        index = indices[axis]
        if isinstance(index, Value) and index.name not in ranges:
            raise UnsupportedError(
                f"{where} picks samples of {shown} by {index.name}. {ADVICE}"
                "index the batch axis with ':' or torch.arange(batch)"
            )


def _check_einsum(arguments: Mapping[str, Any], where: str) -> None:
    """The batch must have one letter: 'nd,md->md' would pair every sample with every other."""
    letters: set[str] = set()
    terms = arguments["equation"].replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, arguments["tensors"], strict=True):
        axis = batch_axis(operand)
        if axis is None:
            continue
        before, dots, after = term.partition("...")
        inner = len(operand.axes) - len(before) - len(after)
        if axis < len(before):
            letters.add(before[axis])
        elif dots and axis < len(before) + inner:
            letters.add(f"...{len(before) + inner - axis}")  # counted from the right, as the dots broadcast
        else:
            letters.add(after[axis - len(before) - inner])
    if len(letters) > 1:
        listed = ", ".join(sorted(letters))
        raise UnsupportedError(
            f"{where} '{arguments['equation']}' has the batch under {len(letters)} letters ({listed}), "
            f"so it pairs samples. {ADVICE}use one letter for the batch"
        )


def _sample_axes(base: str, arguments: Mapping[str, Any], axes: int) -> range:
    """The axes on which an operator treats every entry on its own, as far as it has others."""
    spatial = SPATIAL.search(base)
    if spatial is not None:
        dims = int(spatial[2])
        return range(axes - dims - 1) if spatial[1] == "conv" else range(axes - dims)
    if base == "scaled_dot_product_attention":
        return range(axes - 2)
    if base in RECURRENT and "batch_first" in arguments:
        return range(1) if arguments["batch_first"] else range(1, 2)
    return range(axes)


def _dims(arguments: Mapping[str, Any], axes: int) -> set[int]:
    dims = arguments.get("dim", arguments.get("dims", arguments.get("dimension", ())))
    return {d % axes for d in (dims if isinstance(dims, tuple) else (dims,)) if isinstance(d, int)}
