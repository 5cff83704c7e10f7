"""Normalization per sample; batch norm only with its running statistics."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Rule, Table
from .text import join, refuse, sizes

TABLE = Table()
aten = torch.ops.aten
_LEGS = "ijklm"
_SPACE = "hwdxy"


def _affine(call: Any, legs: str) -> tuple[str, str]:
    """(factor, term) for the optional weight and bias."""
    weight = "" if call.arguments.get("weight") is None else f" * weight[{legs}]"
    return weight, "" if call.arguments.get("bias") is None else f" + bias[{legs}]"


@TABLE.rule(aten.layer_norm.default)
def layer_norm(call: Any) -> Rule:
    """Ba et al. 2016, arXiv:1607.06450."""
    legs = list(_LEGS[: len(call.normalized_shape)])
    i = join(legs)
    weight, bias = _affine(call, i)
    return Rule(
        f"""mean[*s] = input[*s, {i}] / ({sizes(legs)})
            centred[*s, {i}] = input[*s, {i}] - mean[*s]
            variance[*s] = centred[*s, {i}]**2 / ({sizes(legs)})
            output[*s, {i}] = centred[*s, {i}] * (variance[*s] + eps)**(-1/2){weight}{bias}""",
        constants={"eps": call.eps},
    )


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


def _channel_norm(call: Any, group: str, channel: str, constants: dict[str, Any]) -> Rule:
    """Statistics per sample and group; `channel` is the axis of weight and bias."""
    space = list(_SPACE[: len(call.input.axes) - 2])
    full = join(["n", channel, *space])
    summed = [leg for leg in [*channel.split("."), *space] if leg != group]
    weight, bias = _affine(call, channel)
    return Rule(
        f"""mean[n, {group}] = input[{full}] / ({sizes(summed)})
            centred[{full}] = input[{full}] - mean[n, {group}]
            variance[n, {group}] = centred[{full}]**2 / ({sizes(summed)})
            output[{full}] = centred[{full}] * (variance[n, {group}] + eps)**(-1/2){weight}{bias}""",
        constants=constants | {"eps": call.eps},
    )


@TABLE.rule(aten.group_norm.default)
def group_norm(call: Any) -> Rule:
    """Wu & He 2018, arXiv:1803.08494."""
    return _channel_norm(call, "g", "g.c", {"G": call.num_groups})


@TABLE.rule(aten.instance_norm.default)
def instance_norm(call: Any) -> Rule:
    """Statistics per sample and channel, or the running ones."""
    if not call.use_input_stats:
        return _running(call)
    if call.arguments.get("running_mean") is not None:
        refuse(call, "it updates running statistics", "Call model.eval(), or set track_running_stats=False.")
    return _channel_norm(call, "c", "c", {})


@TABLE.rule(aten.batch_norm.default)
def batch_norm(call: Any) -> Rule:
    """Affine with the running statistics; the statistics of the batch mix samples."""
    if call.training or call.running_mean is None:
        refuse(call, "it mixes samples: it normalizes with the statistics of the batch", "Call model.eval() first.")
    return _running(call)


def _running(call: Any) -> Rule:
    weight, bias = _affine(call, "c")
    return Rule(
        f"""centred[n, c, *s] = input[n, c, *s] - running_mean[c]
            output[n, c, *s] = centred[n, c, *s] * (running_var[c] + eps)**(-1/2){weight}{bias}""",
        constants={"eps": call.eps},
    )
