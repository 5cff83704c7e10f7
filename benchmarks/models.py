"""The benchmark problems: networks of DeepOBS, as BackPACK's paper times them, without dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A network (classes last) and the batch it is timed on."""

    name: str
    network: Callable[[], nn.Sequential]
    parameters: int
    classes: int
    batch: int

    def build(self, device: torch.device) -> tuple[nn.Sequential, nn.Module]:
        """A fresh network and loss; every call gives the same numbers."""
        torch.manual_seed(0)
        model = self.network().to(device)
        count = sum(parameter.numel() for parameter in model.parameters())
        if count != self.parameters:
            raise AssertionError(f"{self.name}: {count} parameters, not the published {self.parameters}")
        return model, nn.CrossEntropyLoss()

    def data(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A random CIFAR-shaped batch [N, 3, 32, 32] and its labels [N]."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 3, 32, 32, generator=generator)
        y = torch.randint(self.classes, (batch,), generator=generator)
        return x.to(device), y.to(device)


def net_3c3d() -> nn.Sequential:
    """3C3D for CIFAR-10."""

    def block(inputs: int, outputs: int, kernel: int, padding: int = 0) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding)
        return [convolution, nn.ReLU(), nn.MaxPool2d(3, stride=2, ceil_mode=True)]

    dense = [nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*block(3, 64, 5), *block(64, 96, 3), *block(96, 128, 3, padding=1), *dense)


def net_all_cnn_c() -> nn.Sequential:
    """All-CNN-C for CIFAR-100 (padding is symmetric, where TensorFlow's "same" pads one side of a stride-2 input)."""
    # inputs, outputs, kernel, stride, padding
    convolutions = (
        (3, 96, 3, 1, 1),
        (96, 96, 3, 1, 1),
        (96, 96, 3, 2, 1),
        (96, 192, 3, 1, 1),
        (192, 192, 3, 1, 1),
        (192, 192, 3, 2, 1),
        (192, 192, 3, 1, 0),
        (192, 192, 1, 1, 0),
        (192, 100, 1, 1, 0),
    )
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride, padding in convolutions:
        layers += [nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("3c3d-32", net_3c3d, 895_210, classes=10, batch=32),
        Problem("3c3d-128", net_3c3d, 895_210, classes=10, batch=128),
        Problem("allcnnc-8", net_all_cnn_c, 1_387_108, classes=100, batch=8),
    )
}
