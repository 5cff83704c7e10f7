"""Slopes at kinks where versions of torch differ: asked of the torch that runs, so that a row has the one of autograd.

All other slopes are written in their rows (`kinks=`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import UnsupportedError


@dataclass(frozen=True)
class Kink:
    """A function with a kink at a point, and the slopes there that its row is written for."""

    function: Callable[[Tensor], Tensor]
    point: float
    known: tuple[float, ...]


KINKS: Mapping[str, Kink] = MappingProxyType(
    {
        "clamp": Kink(lambda x: x.clamp(max=1.0), 1.0, (1.0, 0.0)),
        "clamp to a tensor": Kink(lambda x: x.clamp(max=torch.ones_like(x)), 1.0, (1.0, 0.5)),
        "hardswish": Kink(F.hardswish, 3.0, (1.0, 1.5)),
    }
)


@lru_cache(maxsize=len(KINKS))
def slope(name: str) -> float:
    """Autograd's derivative at the kink. Raises `UnsupportedError` where it is none that the row is written for."""
    kink = KINKS[name]
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.full((1,), kink.point, dtype=torch.float64, device="cpu", requires_grad=True)
        (found,) = torch.autograd.grad(kink.function(x).sum(), x)
    value = float(found)
    if value not in kink.known:
        known = " or ".join(f"{each:g}" for each in kink.known)
        raise UnsupportedError(
            f"torch {torch.__version__} has {value:g} as the derivative of {name} at its end, where its rule knows "
            f"{known}.\n  Declare a rule for it: docs/add-a-layer.md; and please report it."
        )
    return value
