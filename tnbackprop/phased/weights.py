"""Quantities in phases: what all parameters sum to is made into weights of the samples, in one sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import Diagram
from ..errors import InputError
from ..quantities.base import Outcome, Quantity, Scale, Totals, individual
from ..quantities.first_order import BatchDot, BatchL2
from ..quantities.total import Total


class Clipping(Enum):
    """What each individual gradient is multiplied by.

    FLAT           min(1, C / ‖∇ℓ_n‖), the norm over all parameters (Abadi et al. 2016, arXiv:1607.00133)
    PER_PARAMETER  the same for each parameter with its own norm
    AUTOMATIC      C / (‖∇ℓ_n‖ + 0.01) (Bu et al. 2023, arXiv:2206.07136)
    """

    FLAT = "flat"
    PER_PARAMETER = "per_parameter"
    AUTOMATIC = "automatic"


STABLE = 0.01
"""What `Clipping.AUTOMATIC` adds to a norm."""
NORMS = BatchL2("squared_norms", scale=Scale.UNSCALED)


@dataclass(frozen=True)
class ClippedGrad(Quantity):
    """Sum of the clipped individual gradients, shape [*p]: Σ_n c_n ∇ℓ_n, in one sweep. No noise is added.

    max_norm  C
    mode      `Clipping`, or torch code: from the norms [N] of the whole ∇ℓ_n to the weights c [N]

    The sum, whether the loss averages or sums: divide by N, or by the batch size that you expect. The norms are those
    of ∇ℓ_n: where a mean is differentiated elsewhere (`tn.attach`), compile with ``loss=tn.HANDED_MEAN``.
    """

    name: str = "clipped_grad"
    max_norm: float = 1.0
    mode: Clipping | Callable[[Any], Any] = Clipping.FLAT

    def __post_init__(self) -> None:
        if not (isinstance(self.max_norm, int | float) and self.max_norm > 0):
            raise InputError(f"ClippedGrad: max_norm={self.max_norm!r}: give a number > 0")
        if not (isinstance(self.mode, Clipping) or callable(self.mode)):
            raise InputError(f"ClippedGrad: mode={self.mode!r}: give a tn.Clipping, or a function of the norms")

    @property
    def needs(self) -> tuple[Quantity, ...]:
        each = self.mode is Clipping.PER_PARAMETER
        return (Total(NORMS, groups=str if each else None, name=NORMS.name),)

    def between(self, totals: Totals) -> Outcome:
        squares = totals[NORMS.name]
        if self.mode is Clipping.PER_PARAMETER:
            return {"weights": {name: self._weights(each.sqrt()) for name, each in squares.items()}}
        return {"weights": self._weights(squares.sqrt())}

    def _weights(self, norms: Any) -> Any:
        if not isinstance(self.mode, Clipping):
            return self.mode(norms)
        if self.mode is Clipping.AUTOMATIC:
            return self.max_norm / (norms + STABLE)
        return (self.max_norm / norms).clamp(max=1)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        each = self.mode is Clipping.PER_PARAMETER
        weights = J.operand("weights", ("n",)) if each else g.operand("weights")
        return (individual(J, g) * weights).sum("n")


@dataclass(frozen=True)
class NaturalGradientSMW(Quantity):
    """Natural gradient of the empirical Fisher, shape [*p]: (F + λ I)⁻¹ ∇L, F = (1/N) Σ_n ∇ℓ_n ∇ℓ_nᵀ of all parameters.

    By Sherman, Morrison and Woodbury it is Σ_n c_n ∇ℓ_n with c = (K + N λ I)⁻¹ 1 and the Gram matrix K [N, N]: one
    N × N solve, and no individual gradient is built. ∇L is the mean of the ∇ℓ_n, whatever the loss does. Ren &
    Goldfarb 2019, arXiv:1906.02353.

    damping  λ > 0
    """

    name: str = "natural_gradient"
    damping: float = 1e-2

    def __post_init__(self) -> None:
        if not (isinstance(self.damping, int | float) and 0 < self.damping < math.inf):
            raise InputError(f"NaturalGradientSMW: damping={self.damping!r}: give a finite number > 0")

    @property
    def needs(self) -> tuple[Quantity, ...]:
        return (BatchDot("gram", scale=Scale.UNSCALED),)

    def between(self, totals: Totals) -> Outcome:
        K = totals["gram"]
        K, own = (K if K.dtype.itemsize > 2 else K.float()), K.dtype  # no solver has shorter numbers
        N = K.shape[0]
        damped = K + self.damping * N * torch.eye(N, dtype=K.dtype, device=K.device)
        return {"weights": torch.linalg.solve(damped, K.new_ones(N)).to(own)}

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (individual(J, g) * g.operand("weights")).sum("n")
