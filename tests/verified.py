"""Layers and rules that the tests of `verify` share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

FIRST = (tn.Grad(), tn.BatchGrad())


class Affine(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Centred(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean(-1, keepdim=True)) * self.gain


class Damped(Centred):
    def __init__(self, width: int, power: float = 1.5) -> None:
        super().__init__(width)
        self.power = power

    def forward(self, input: Tensor) -> Tensor:
        return self.power * torch.tanh(input) * self.gain


class MeanFree(Centred):
    """Subtracts the mean of the batch: it mixes samples."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean(0)) * self.gain


class Rectified(Centred):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(input * self.gain)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, padding: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.padding, self.stride = padding, stride
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv1d(input, self.weight, self.bias, self.stride, self.padding)


AFFINE = "output[*s, o] = weight[o, i] * input[*s, i] + bias[o]"
DAMPED = "output[*s, i] = 3/2 * tanh(input[*s, i]) * gain[i]"
ELEMENTWISE = {"input": "*s, i", "output": "*s, i"}


def conv(padding: str = "padding", stride: str = "stride") -> Callable[[Conv], tn.Rule]:
    text = f"output[n, o, h] = weight[o, i, k] * input[n, i, {stride}*h + k - {padding}] + bias[o]"
    return lambda layer: tn.Rule(text, constants={"padding": layer.padding, "stride": layer.stride})


def norm(layer: nn.LayerNorm) -> tn.Rule:
    affine = " * weight[i]" * (layer.weight is not None) + " + bias[i]" * (layer.bias is not None)
    return tn.Rule(
        """mean[*s] = input[*s, i] / I
           centred[*s, i] = input[*s, i] - mean[*s]
           variance[*s] = centred[*s, i]**2 / I
           output[*s, i] = centred[*s, i] * (variance[*s] + eps)**(-1/2)"""
        + affine,
        constants={"eps": layer.eps},
    )
