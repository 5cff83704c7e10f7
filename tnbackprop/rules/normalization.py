"""Normalization per sample; batch norm only with its running statistics."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Rule, Table
from .text import join, leg_names, refuse, sizes

TABLE = Table()
aten = torch.ops.aten
_LEGS = "ijklm"
_SPACE = "hwdxy"


def _affine(call: Any, legs: str) -> tuple[str, str]:
    """(factor, term) for the optional weight and bias."""
    weight = "" if call.arguments.get("weight") is None else f" * weight[{legs}]"
    return weight, "" if call.arguments.get("bias") is None else f" + bias[{legs}]"


@TABLE.rule(aten.layer_norm.default, aten.native_layer_norm.default)
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
    return _normalized(call, ["n", channel, *space], ["n", group], channel, constants)


def _normalized(call: Any, legs: list[str], kept: list[str], channel: str, constants: dict[str, Any]) -> Rule:
    """Statistics over all legs but those that are kept."""
    full, rest = join(legs), join(kept)
    summed = [leg for part in legs for leg in part.split(".") if leg not in kept]
    weight, bias = _affine(call, channel)
    return Rule(
        f"""mean[{rest}] = input[{full}] / ({sizes(summed)})
            centred[{full}] = input[{full}] - mean[{rest}]
            variance[{rest}] = centred[{full}]**2 / ({sizes(summed)})
            output[{full}] = centred[{full}] * (variance[{rest}] + eps)**(-1/2){weight}{bias}""",
        constants=constants | {"eps": call.eps},
    )


@TABLE.rule(aten.group_norm.default, aten.native_group_norm.default)
def group_norm(call: Any) -> Rule:
    """Wu & He 2018, arXiv:1803.08494."""
    groups = call.arguments["num_groups" if "num_groups" in call.arguments else "group"]
    return _channel_norm(call, "g", "g.c", {"G": groups})


@TABLE.rule(aten.instance_norm.default)
def instance_norm(call: Any) -> Rule:
    """Statistics per sample and channel, or the running ones."""
    if not call.use_input_stats:
        return _running(call)
    if call.arguments.get("running_mean") is not None:
        refuse(call, "it updates running statistics", "Call model.eval(), or set track_running_stats=False.")
    return _channel_norm(call, "c", "c", {})


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
    return _normalized(call, legs, [legs[1]], legs[1], {})


def _running(call: Any) -> Rule:
    weight, bias = _affine(call, "c")
    return Rule(
        f"""centred[n, c, *s] = input[n, c, *s] - running_mean[c]
            output[n, c, *s] = centred[n, c, *s] * (running_var[c] + eps)**(-1/2){weight}{bias}""",
        constants={"eps": call.eps},
    )
