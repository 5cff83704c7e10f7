"""Convolutions: affine index arithmetic, zero outside of the input (Dangel 2023, arXiv:2307.02275)."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import IMAGE, KERNEL, SPACE, for_rank, join, per_axis, refuse

TABLE = Table()
aten = torch.ops.aten


def convolution(call: Any, count: int) -> Rule:
    """output[n, g.o, h] = weight[g.o, i, k] * input[n, g.i, stride*h + dilation*k - padding] + bias[g.o]."""
    if len(call.input.axes) != count + 2:
        refuse(call, f"the input has {len(call.input.axes)} axes, not {count + 2}", "Give it a batch axis.")
    stride, dilation = per_axis(call.stride, count), per_axis(call.dilation, count)
    kernel = call.weight.shape[2:]
    if call.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(t // 2 for t in total)  # the odd one out goes to the right
    else:
        padding = per_axis(0 if call.padding == "valid" else call.padding, count)
    where = [f"s{a}*{p} + d{a}*{k} - p{a}" for a, (p, k) in enumerate(zip(SPACE[count], KERNEL[count], strict=True))]
    g = "g." if call.groups != 1 else ""
    return Rule(
        f"output[n, {g}o, {join(SPACE[count])}] = "
        f"weight[{g}o, i, {join(KERNEL[count])}] * input[n, {g}i, {join(where)}] + bias[{g}o]",
        constants=({"G": call.groups} if g else {})
        | {f"s{a}": stride[a] for a in range(count)}
        | {f"d{a}": dilation[a] for a in range(count)}
        | {f"p{a}": padding[a] for a in range(count)},
    )


def transposed_convolution(call: Any, count: int) -> Rule:
    """Each input position adds the kernel at output position stride*y + dilation*k - padding."""
    if len(call.input.axes) != count + 2:
        refuse(call, f"the input has {len(call.input.axes)} axes, not {count + 2}", "Give it a batch axis.")
    stride, padding, dilation = (per_axis(v, count) for v in (call.stride, call.padding, call.dilation))
    where = [
        f"delta[{out}, {stride[a]}*{image} + {dilation[a]}*{k} - {padding[a]}]"
        for a, (out, image, k) in enumerate(zip(SPACE[count], IMAGE[count], KERNEL[count], strict=True))
    ]
    g = "g." if call.groups != 1 else ""
    return Rule(
        f"output[n, {g}o, {join(SPACE[count])}] = weight[{g}i, o, {join(KERNEL[count])}]"
        f" * input[n, {g}i, {join(IMAGE[count])}] * {' * '.join(where)} + bias[{g}o]",
        constants={"G": call.groups} if g else {},
        backward=_joint(call, stride, padding, dilation, per_axis(call.output_padding, count)),
    )


def _joint(call: Any, *numbers: tuple[int, ...]) -> dict[str, str]:
    """The native backward of a transposed convolution; none where a matmul does the same."""
    if set(call.weight.shape[2:]) == {1}:
        return {}
    stride, padding, dilation, more = map(list, numbers)
    bias = call.arguments.get("bias") is not None
    names, sizes = ("input, weight, bias", [call.weight.shape[1] * call.groups]) if bias else ("input, weight", None)
    return {
        names: f"torch.ops.aten.convolution_backward({{cotangent}}, {{input}}, {{weight}}, {sizes}, {stride}, "
        f"{padding}, {dilation}, True, {more}, {call.groups}, [True, True, {bias}])"
    }


for _count, _op, _transposed in (
    (1, aten.conv1d, aten.conv_transpose1d.default),
    (2, aten.conv2d, aten.conv_transpose2d.input),
    (3, aten.conv3d, aten.conv_transpose3d.input),
):
    TABLE.rule(_op.default, _op.padding)(for_rank(convolution, _count))
    TABLE.rule(_transposed)(for_rank(transposed_convolution, _count))
