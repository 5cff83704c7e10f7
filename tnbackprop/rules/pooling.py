"""Pooling. A maximum is a selection by the index that the forward saves; an average is a window sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from ..notation.rule import Constant, Rule
from ..table import Table
from .writing.text import IMAGE, KERNEL, SPACE, axis, for_rank, join, leg_names, per_axis, refuse

TABLE = Table()
aten = torch.ops.aten
NO_CONSTANTS: Mapping[str, Constant] = MappingProxyType({})


def _max_rule(
    call: Any,
    count: int,
    pooled: str,
    saved: Mapping[str, str],
    where: Sequence[str] = (),
    constants: Mapping[str, Constant] = NO_CONSTANTS,
) -> Rule:
    """output[*s, h] = input[*s, y] at the y that the saved index chooses (the first maximum, or a NaN).

    where  for each space axis y = stride*h + dilation*k - padding, if that is known of y
    """
    space, image = join(SPACE[count]), join(IMAGE[count])
    row_major = ".contiguous()" if saved else ""
    plane, head = list(call.input.shape[-count:]), f"*{{cotangents}}.shape[:-{count}]"
    vjp = (
        f"{{cotangents}}.new_zeros(({head}, {prod(plane)})).scatter_add_(-1, {{index}}.flatten(-{count})"
        f".expand({head}, -1), {{cotangents}}.flatten(-{count})).unflatten(-1, {plane})"
    )
    return Rule(
        f"output[*s, {space}] = select(index[*s, {space}], {join(where) or image}) * input[*s, {image}]",
        constants=constants,
        saved={**saved, "pooled": pooled, f"index[*s, {space}]": f"{{pooled}}[1]{row_major}"},
        forward=f"{{pooled}}[0]{row_major}",
        vjp={"input": vjp},
        kinks="the first maximum in row-major order takes all",
    )


def max_pool(call: Any, count: int) -> Rule:
    stride = call.stride if call.stride not in ((), [], None) else call.kernel_size
    numbers = [list(per_axis(v, count)) for v in (call.kernel_size, stride, call.padding, call.dilation)]
    geometry = f"{join([str(v) for v in numbers])}, {call.ceil_mode}"
    saved, source = _channels_last(call, count)
    pooled = f"torch.ops.aten.max_pool{count}d_with_indices({source}, {geometry})"
    where: list[str] = []
    constants: dict[str, Constant] = {}
    for a, (kernel, step, padding, gap) in enumerate(zip(*numbers, strict=True)):
        where.append(f"{IMAGE[count][a]}=s{a}*{SPACE[count][a]} + d{a}*{KERNEL[count][a]} - p{a}")
        constants |= {KERNEL[count][a].upper(): kernel, f"s{a}": step, f"d{a}": gap, f"p{a}": padding}
    return _max_rule(call, count, pooled, saved, where, constants)


def _channels_last(call: Any, count: int) -> tuple[dict[str, str], str]:
    """What is saved and read in place of the input: on a CPU torch's kernels are 4 times faster with channels last."""
    layout = {2: "channels_last", 3: "channels_last_3d"}.get(count)
    if layout is None or call.input.device != "cpu" or len(call.input.shape) != count + 2:
        return {}, "{input}"
    code = f"{{input}}.contiguous(memory_format=torch.{layout})"
    return {f"channels_last[*s, {join(IMAGE[count])}]": code}, "{channels_last}"


def adaptive_max_pool(call: Any, count: int) -> Rule:
    size = list(per_axis(call.output_size, count))
    saved, source = _channels_last(call, count) if count == 2 else ({}, "{input}")
    pooled = f"torch.ops.aten.adaptive_max_pool{count}d({source}, {size})"
    return _max_rule(call, count, pooled, saved)


def avg_pool(call: Any, count: int) -> Rule:
    """output[*s, h] = input[*s, stride*h + k - padding] / (elements of the window)."""
    stride = call.stride if call.stride not in ((), [], None) else call.kernel_size
    geometry = [per_axis(v, count) for v in (call.kernel_size, stride, call.padding)]
    extent = tuple(call.input.shape[-count:])
    space, kernel = SPACE[count], KERNEL[count]
    override = call.arguments.get("divisor_override")
    windows = [f"s{a}*{space[a]} + {kernel[a]} - p{a}" for a in range(count)]
    text = f"output[*s, {join(space)}] = input[*s, {join(windows)}]"
    constants = {kernel[a].upper(): geometry[0][a] for a in range(count)}
    constants |= {f"s{a}": geometry[1][a] for a in range(count)} | {f"p{a}": geometry[2][a] for a in range(count)}
    saved = {}
    if override is not None:
        return Rule(f"{text} / {override}", constants=constants)
    for a in range(count):
        k, s, p = (values[a] for values in geometry)
        size, outputs = extent[a], call.output.shape[a - count]
        inside = (outputs - 1) * s + k <= size + 2 * p if call.count_include_pad else not (p or call.ceil_mode)
        if inside:
            text += f" / {kernel[a].upper()}"
            continue
        low, high = (-p, size + p) if call.count_include_pad else (0, size)
        start = f"(torch.arange({outputs}, device={{input}}.device) * {s} - {p})"
        elements = f"(({start} + {k}).clamp(max={high}) - {start}.clamp(min={low}))"
        saved[f"share{a}[{space[a]}]"] = f"1 / {elements}.to({{input}}.dtype)"
        text += f" * share{a}[{space[a]}]"
    return Rule(text, constants=constants, saved=saved)


def adaptive_avg_pool(call: Any, count: int) -> Rule:
    """Equal windows are grouped axes; others come as a small averaging matrix per axis."""
    space, kernel = SPACE[count], KERNEL[count]
    items, factors, saved = [], "", {}
    for a, outputs in enumerate(per_axis(call.output_size, count)):
        size = call.input.shape[a - count]
        if not isinstance(size, int):
            refuse(call, f"space axis {a} holds the batch", "Put the batch first.")
        if outputs == size:
            items.append(space[a])
        elif size % outputs == 0:
            items.append(f"{space[a]}.{kernel[a]}")
            factors += f" / {kernel[a].upper()}"
        else:
            items.append(kernel[a])
            factors += f" * average{a}[{space[a]}, {kernel[a]}]"
            eye = f"torch.eye({size}, dtype={{input}}.dtype, device={{input}}.device)"
            saved[f"average{a}[{space[a]}, {kernel[a]}]"] = (
                f"torch.nn.functional.adaptive_avg_pool1d({eye}[None], {outputs})[0].T.contiguous()"
            )
    return Rule(f"output[*s, {join(space)}] = input[*s, {join(items)}]{factors}", saved=saved)


for _count in (1, 2, 3):
    TABLE.rule(getattr(aten, f"max_pool{_count}d").default, getattr(aten, f"max_pool{_count}d_with_indices").default)(
        for_rank(max_pool, _count)
    )
    TABLE.rule(getattr(aten, f"avg_pool{_count}d").default)(for_rank(avg_pool, _count))
    TABLE.rule(getattr(aten, f"adaptive_avg_pool{_count}d").default)(for_rank(adaptive_avg_pool, _count))
    TABLE.rule(getattr(aten, f"adaptive_max_pool{_count}d").default)(for_rank(adaptive_max_pool, _count))


@TABLE.rule(aten.max.dim, aten.min.dim)
def extremum(call: Any) -> Rule:
    """The values of a maximum along one axis; the saved index says where it is."""
    dim, name = axis(call.dim, len(call.input.axes)), "argmax" if call.target == aten.max.dim else "argmin"
    into = leg_names(call.input, skip="k")
    if not isinstance(call.input.shape[dim], int):
        refuse(call, "it compares the samples", "Take the extremum over another axis.")
    rest = [*into[:dim], *into[dim + 1 :]]
    left = [*into[:dim], "u", *into[dim + 1 :]] if call.keepdim else rest
    into[dim] = "k"
    return Rule(
        f"output[{join(left)}] = select(index[{join(rest)}], k) * input[{join(into)}]",
        saved={f"index[{join(rest)}]": f"{{input}}.{name}({dim})"},
        forward=f"{{input}}.gather({dim}, {{index}}.unsqueeze({dim}))" + ("" if call.keepdim else f".squeeze({dim})"),
        kinks="one of several equal extrema takes all",
    )
