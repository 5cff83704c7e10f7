"""Models of the ecosystem's packages: built from a tiny configuration, so that nothing is downloaded.

The packages are imported when a model is built, by name, so that the rows can be listed where they are not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

F = nn.functional


def load(package: str) -> Any:
    """The package. All import torchvision where it is installed."""
    declare_operators()
    return importlib.import_module(package)


def declare_operators() -> None:
    """Lets torchvision be imported where its operators cannot be loaded: a wheel for CUDA beside a CPU torch.

    The import then stops at the shape rules of these two; the models of the zoo call neither.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for binary in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(binary)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def hub(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of transformers, from its configuration."""

    def build() -> nn.Module:
        package = load("transformers")
        found: nn.Module = getattr(package, model)(getattr(package, config)(**sizes))
        return found

    return build


def timm(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of timm, by the name that its registry has or by its class."""
    if name[0].isupper():
        return lambda: getattr(load("timm.models"), name)(**sizes)
    return lambda: load("timm").create_model(name, **sizes)


def vision(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of torchvision, by the name that its registry has or by its class."""
    return lambda: getattr(load("torchvision.models"), name)(**sizes)


def classified(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, y)


def predicted(output: Any, y: Tensor) -> Tensor:
    """Cross-entropy over all positions: logits [N, T, C], y [N, T]."""
    return F.cross_entropy(output.logits.flatten(0, 1), y.flatten())


def hidden(output: Any, y: Tensor) -> Tensor:
    return F.mse_loss(output.last_hidden_state, y)
