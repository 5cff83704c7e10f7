"""Normalization in every spelling that a graph may have: in place, functional, native; and of a weight."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from ...tried import FIRST, GGN, TWICE, Tried, randn

IMAGE, X = randn(4, 2, 2, 2), randn(4, 3)
CONV = {"c": partial(nn.Conv2d, 2, 4, 1)}
STATISTICS = randn(4), randn(4, seed=1).exp()
AFFINE = {"w": randn(4, seed=2), "b": randn(4, seed=3)}
aten = torch.ops.aten


def running(kind: type[nn.Module], **options: object) -> nn.Module:
    norm = kind(4, **options)
    norm.running_mean.copy_(STATISTICS[0])
    norm.running_var.copy_(STATISTICS[1])
    return norm


def in_place(norm: nn.Module, activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Flatten(), activation(inplace=True), nn.Linear(16, 2))


def written(m: nn.Module, x: Tensor) -> Tensor:
    h = m.norm(m.c(x))
    h[:, 0] *= 2
    return h.flatten(1)


def doubled(m: nn.Module, x: Tensor) -> Tensor:
    h = m.norm(m.c(x))
    h.mul_(2)
    return h.tanh_().flatten(1)


NORMS = {
    "batch": lambda: running(nn.BatchNorm2d), "plain batch": lambda: running(nn.BatchNorm2d, affine=False),
    "tracked instance": lambda: running(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4), "layer": lambda: nn.LayerNorm((4, 2, 2)), "RMS": lambda: nn.RMSNorm(2),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
}  # fmt: skip
GRAPHS = [
    *(Tried(f"{name} norm, {f.__name__}", f, IMAGE, {**CONV, "norm": norm}, TWICE)
      for name, norm in NORMS.items() for f in (written, doubled)),
    *(Tried(f"batch norm, {act.__name__}", lambda m, x: m.s(x), IMAGE, {
        "s": lambda act=act: in_place(running(nn.BatchNorm2d), act)}, TWICE) for act in (nn.ReLU, nn.SELU)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tried", GRAPHS, ids=str)
def test_in_a_graph_that_writes(tried: Tried) -> None:
    assert "by torch.func" not in tried.check().explain("bind")


NATIVE = [
    Tried("native_batch_norm", lambda m, x: torch.native_batch_norm(
        m.c(x), m.w, m.b, *STATISTICS, False, 0.1, 1e-5)[0].flatten(1), IMAGE, {**CONV, **AFFINE}, TWICE),
    Tried("_native_batch_norm_legit_no_training", lambda m, x: aten._native_batch_norm_legit_no_training(
        m.c(x), m.w, m.b, *STATISTICS, 0.1, 1e-5)[0].flatten(1), IMAGE, {**CONV, **AFFINE}, TWICE),
    Tried("_batch_norm_no_update", lambda m, x: aten._batch_norm_no_update(
        m.c(x), m.w, m.b, *STATISTICS, 0.1, 1e-5)[0].flatten(1), IMAGE, {**CONV, **AFFINE}, TWICE),
    Tried("native_layer_norm", lambda m, x: torch.native_layer_norm(
        m.c(x), [2], m.w[:2], m.b[:2], 1e-5)[0].flatten(1), IMAGE, {**CONV, **AFFINE}, TWICE),
    Tried("native_group_norm", lambda m, x: torch.native_group_norm(
        m.c(x), m.w, m.b, x.shape[0], 4, 4, 2, 1e-5)[0].flatten(1), IMAGE, {**CONV, **AFFINE}, TWICE),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tried", NATIVE, ids=str)
def test_native_operators(tried: Tried) -> None:
    assert "by torch.func" not in tried.check().explain("bind")


def standardised(m: nn.Module, x: Tensor, *statistics: Tensor, **options: object) -> Tensor:
    whole = F.batch_norm(m.w.view(1, 3, -1), *(statistics or (None, None)), **options)
    return F.conv1d(x, whole.view_as(m.w))


OF_A_WEIGHT = [
    Tried("its own statistics", partial(standardised, training=True), randn(4, 2, 5), {"w": randn(3, 2, 2)}, TWICE),
    Tried("with a gain", lambda m, x: standardised(m, x, weight=m.g, training=True, eps=0.1), randn(4, 2, 5),
          {"w": randn(3, 2, 2), "g": randn(3)}, TWICE),
    Tried("running statistics", lambda m, x: standardised(m, x, STATISTICS[0][:3], STATISTICS[1][:3]), randn(4, 2, 5),
          {"w": randn(3, 2, 2)}),
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("tried", OF_A_WEIGHT, ids=str)
def test_of_a_weight(tried: Tried) -> None:
    tried.check()


def test_of_samples_in_train_mode() -> None:
    mixing = Tried("train", lambda m, x: F.batch_norm(m.l(x), None, None, training=True), X,
                   {"l": partial(nn.Linear, 3, 4)}, FIRST)  # fmt: skip
    with pytest.raises(tn.UnsupportedError, match="in train mode, so it mixes samples"):
        mixing.program()
    no_stats = aten._native_batch_norm_legit.no_stats
    native = Tried("native", lambda m, x: no_stats(m.l(x), None, None, True, 0.1, 1e-5)[0], X,
                   {"l": partial(nn.Linear, 3, 4)}, GGN)  # fmt: skip
    with pytest.raises(tn.UnsupportedError, match="statistics of the batch"):
        native.program()
