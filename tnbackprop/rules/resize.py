"""Interpolation: along each axis a small matrix, which the same operator makes of a row of ones."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import IMAGE, SPACE, for_rank, join

TABLE = Table()
aten = torch.ops.aten


def _scales(call: Any, count: int) -> tuple[float | None, ...]:
    """The scale of each axis, None where only the size is given."""
    if "scale_factors" in call.arguments:
        return tuple(call.scale_factors or [None] * count)
    names = ("scales",) if count == 1 else ("scales_d", "scales_h", "scales_w")[-count:]
    return tuple(call.arguments.get(name) for name in names)


def nearest(call: Any, count: int) -> Rule:
    """output[…, h] = input[…, source(h)]."""
    op = "_upsample_nearest_exact1d" if "exact" in str(call.target) else "upsample_nearest1d"
    factors, saved = "", {}
    for a, (leg, image, scale) in enumerate(zip(SPACE[count], IMAGE[count], _scales(call, count), strict=True)):
        into, out = call.input.shape[a - count], call.output.shape[a - count]
        places = f"torch.arange({into}.0, device={{input}}.device)[None, None]"
        saved[f"source{a}[{leg}]"] = f"torch.ops.aten.{op}({places}, [{out}], {scale!r})[0, 0].long()"
        factors += f"select(source{a}[{leg}], {image}) * "
    return Rule(f"output[*s, {join(SPACE[count])}] = {factors}input[*s, {join(IMAGE[count])}]", saved=saved)


def linear(call: Any, count: int) -> Rule:
    """output[…, h, w] = a[h, y] b[w, x] input[…, y, x]; bicubic alike."""
    factors, saved = "", {}
    for a, (leg, image, scale) in enumerate(zip(SPACE[count], IMAGE[count], _scales(call, count), strict=True)):
        into, out = call.input.shape[a - count], call.output.shape[a - count]
        eye = f"torch.eye({into}, dtype={{input}}.dtype, device={{input}}.device)[None]"
        code = f"torch.ops.aten.upsample_linear1d({eye}, [{out}], {call.align_corners}, {scale!r})[0].T"
        if "cubic" in str(call.target):
            size = f"[{out}, 1], {call.align_corners}, {scale!r}, None"
            code = f"torch.ops.aten.upsample_bicubic2d({eye}.unsqueeze(-1), {size})[0, :, :, 0].T"
        saved[f"weight{a}[{leg}, {image}]"] = f"{code}.contiguous()"
        factors += f"weight{a}[{leg}, {image}] * "
    return Rule(f"output[*s, {join(SPACE[count])}] = {factors}input[*s, {join(IMAGE[count])}]", saved=saved)


for _count, _linear in ((1, aten.upsample_linear1d), (2, aten.upsample_bilinear2d), (3, aten.upsample_trilinear3d)):
    _nearest = (getattr(aten, f"{name}{_count}d") for name in ("upsample_nearest", "_upsample_nearest_exact"))
    for _op in _nearest:
        TABLE.rule(_op.default, _op.vec)(for_rank(nearest, _count))
    TABLE.rule(_linear.default, _linear.vec)(for_rank(linear, _count))
TABLE.rule(aten.upsample_bicubic2d.default, aten.upsample_bicubic2d.vec)(for_rank(linear, 2))
