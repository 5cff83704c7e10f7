"""Normalization per sample; batch norm only with its running statistics."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..diagram.core import N
from ..notation.rule import Rule
from ..table import Table
from .writing.text import join, leg_names, refuse, sizes

TABLE = Table()
aten = torch.ops.aten
_LEGS = "ijklm"
_SPACE = "hwdxy"
EXACT = (torch.float32, torch.float64)
"""Where native statistics have the dtype of the input."""
OPERANDS = ("input", "weight", "bias")


def _affine(call: Any, legs: str) -> tuple[str, str]:
    """(factor, term) for the optional weight and bias."""
    weight = "" if call.arguments.get("weight") is None else f" * weight[{legs}]"
    return weight, "" if call.arguments.get("bias") is None else f" + bias[{legs}]"


@TABLE.rule(aten.layer_norm.default, aten.native_layer_norm.default)
def layer_norm(call: Any) -> Rule:
    """Ba et al. 2016, arXiv:1607.06450."""
    shape = list(call.normalized_shape)
    legs = list(_LEGS[: len(shape)])
    i = join(legs)
    weight, bias = _affine(call, i)
    weights = f"{_given(call, 'weight')}, {_given(call, 'bias')}"
    row = f"[..., {', '.join('0' * len(shape))}]"
    return _with_kernel(
        call,
        f"""mean[*s] = input[*s, {i}] / ({sizes(legs)})
            centred[*s, {i}] = input[*s, {i}] - mean[*s]
            variance[*s] = centred[*s, {i}]**2 / ({sizes(legs)})
            scale[*s] = (variance[*s] + eps)**(-1/2)
            output[*s, {i}] = centred[*s, {i}] * scale[*s]{weight}{bias}""",
        {"eps": call.eps},
        f"torch.ops.aten.native_layer_norm({{input}}, {shape}, {weights}, {call.eps!r})",
        {"mean[*s]": f"{{means}}{row}", "scale[*s]": f"{{scales}}{row}"},
        f"torch.ops.aten.native_layer_norm_backward({{cotangent}}.contiguous(), {{input}}, {shape}, "
        f"{{means}}, {{scales}}, {weights}, ",
    )


def _given(call: Any, name: str) -> str:
    """An optional operand in torch code."""
    return "None" if call.arguments.get(name) is None else f"{{{name}}}"


def _with_kernel(
    call: Any, formula: str, constants: dict[str, Any], forward: str, lines: dict[str, str], backward: str
) -> Rule:
    """A formula whose statistics a native forward gives, and its native backward up to the mask of what is wanted.

    The formula alone where statistics do not have the input's dtype.
    """
    if call.input.dtype not in EXACT or call.output.dtype != call.input.dtype:
        return Rule(formula, constants=constants)
    saved = {"every": forward, "means": "{every}[1]", "scales": "{every}[2]"} | lines
    return Rule(
        formula,
        constants=constants,
        saved=saved,
        forward="{every}[0]",
        vjp={"input": f"{backward}[True, False, False])[0]"},
        backward=_joint(call, backward),
    )


def _joint(call: Any, kernel: str) -> dict[str, str]:
    """The kernel with the gradients of all operands; nothing where there is no weight."""
    there = [call.arguments.get(name) is not None for name in OPERANDS]
    names = [name for name, given in zip(OPERANDS, there, strict=True) if given]
    exact = call.input.dtype in EXACT and call.output.dtype == call.input.dtype
    return {", ".join(names): f"{kernel}{there})"} if exact and there[1] else {}


@TABLE.rule(aten.rms_norm.default)
def rms_norm(call: Any) -> Rule:
    """Zhang & Sennrich 2019, arXiv:1910.07467."""
    legs = list(_LEGS[: len(call.normalized_shape)])
    i = join(legs)
    eps = torch.finfo(call.input.dtype).eps if call.eps is None else call.eps
    return Rule(
        f"""square[*s] = input[*s, {i}]**2 / ({sizes(legs)})
            output[*s, {i}] = input[*s, {i}] * (square[*s] + eps)**(-1/2){_affine(call, i)[0]}""",
        constants={"eps": eps},
    )


def _channel_norm(call: Any, group: str, channel: str, groups: int) -> Rule:
    """Statistics per sample and group; `channel` is the axis of weight and bias."""
    batch, channels, *space = call.input.shape
    formula = _normalized(call, ["n", channel, *_SPACE[: len(space)]], ["n", group], channel)
    constants = {"eps": call.eps} | ({"G": groups} if group == "g" else {})
    if batch != N:
        return Rule(formula, constants=constants)
    shape = f"{{input}}.shape[0], {channels}, {math.prod(space)}, {groups}"
    weight, bias = _given(call, "weight"), _given(call, "bias")
    return _with_kernel(
        call,
        formula,
        constants,
        f"torch.ops.aten.native_group_norm({{input}}.contiguous(), {weight}, {bias}, {shape}, {call.eps!r})",
        {f"mean[n, {group}]": "{means}", f"scale[n, {group}]": "{scales}"},
        "torch.ops.aten.native_group_norm_backward({cotangent}.contiguous(), {input}.contiguous(), "
        f"{{means}}, {{scales}}, {weight}, {shape}, ",
    )


def _normalized(call: Any, legs: list[str], kept: list[str], channel: str) -> str:
    """Statistics over all legs but those that are kept."""
    full, rest = join(legs), join(kept)
    summed = [leg for part in legs for leg in part.split(".") if leg not in kept]
    weight, bias = _affine(call, channel)
    return f"""mean[{rest}] = input[{full}] / ({sizes(summed)})
            centred[{full}] = input[{full}] - mean[{rest}]
            variance[{rest}] = centred[{full}]**2 / ({sizes(summed)})
            scale[{rest}] = (variance[{rest}] + eps)**(-1/2)
            output[{full}] = centred[{full}] * scale[{rest}]{weight}{bias}"""


@TABLE.rule(aten.group_norm.default, aten.native_group_norm.default)
def group_norm(call: Any) -> Rule:
    """Wu & He 2018, arXiv:1803.08494."""
    groups = call.arguments["num_groups" if "num_groups" in call.arguments else "group"]
    return _channel_norm(call, "g", "g.c", groups)


@TABLE.rule(aten.instance_norm.default)
def instance_norm(call: Any) -> Rule:
    """Statistics per sample and channel, or the running ones."""
    if not call.use_input_stats:
        return _running(call)
    if call.arguments.get("running_mean") is not None:
        refuse(call, "it updates running statistics", "Call model.eval(), or set track_running_stats=False.")
    return _channel_norm(call, "c", "c", call.input.shape[1])


@TABLE.rule(
    aten.batch_norm.default, aten.native_batch_norm.default, aten._batch_norm_no_update.default,
    aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit_no_training.default,
)  # fmt: skip
def batch_norm(call: Any) -> Rule:
    """Affine with the running statistics; the statistics of the batch mix samples, those of a weight do not."""
    legs = leg_names(call.input)
    if call.arguments.get("running_mean") is not None and not call.arguments.get("training", False):
        return _running(call)
    if not all(isinstance(size, int) for size in call.input.shape):
        refuse(call, "it mixes samples: it normalizes with the statistics of the batch", "Call model.eval() first.")
    return Rule(_normalized(call, legs, [legs[1]], legs[1]), constants={"eps": call.eps})


def _running(call: Any) -> Rule:
    weight, bias = _affine(call, "c")
    kernel = "torch.ops.aten.native_batch_norm_backward({cotangent}, {input}, {weight}, {running_mean}, {running_var}, "
    return Rule(
        f"""centred[n, c, *s] = input[n, c, *s] - running_mean[c]
            output[n, c, *s] = centred[n, c, *s] * (running_var[c] + eps)**(-1/2){weight}{bias}""",
        constants={"eps": call.eps},
        backward=_joint(call, f"{kernel}None, None, False, {call.eps!r}, "),
    )
