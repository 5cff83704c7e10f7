"""Kronecker-factored curvature: A ⊗ B from the rule alone. One class propagates, `approximate.py` separates.

KFAC: Martens & Grosse 2015, arXiv:1503.05671; convolutions: Grosse & Martens 2016, arXiv:1602.01407; KFLR: Botev et
al. 2017, arXiv:1706.03662. All scale of the loss sits in the factor with the cotangent.

`Bias.JOINED`: the block of [weight, bias], a matrix [out, in + 1], is under the weight's name, and the bias has none. A
bias without a weight that shares its factor (a norm's, a grouped convolution's) keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import sympy

from ..diagram.algebra import Cotangents, Uses
from ..errors import InputError
from .base import EXACT, Quantity
from .factors import LARGEST, Factors, Sharing, kronecker
from .propagation import Average, Draws, Gradient, Labels, Propagation


class Fisher(Enum):
    """Which columns KFAC propagates: drawn from the model's own distribution, or the gradients of the labels."""

    MC = "mc"
    EMPIRICAL = "empirical"


class Bias(Enum):
    """Whether a bias has a block of its own, or one with the weight of its layer, whose input then ends in a 1."""

    OWN = "own"
    JOINED = "joined"


@dataclass(frozen=True)
class KFLR(Quantity):
    """Kronecker factors of the GGN from the exact root: Σ_v Σ_n. Values are `KroneckerFactors` for [*p].

    largest  rows of the largest dense factor. A factor that is larger is cut into the parameter's axes, one factor for
             each of them, whose product has the trace of the uncut one; a larger axis has its diagonal. Axes that are
             with the loss in one piece, those of a position table [T, D], are cut beyond a 16th of it
    strict   raises `UnsupportedError` for a parameter without factors (a tied embedding and head, a weight behind its
             norm), which else has one diagonal factor [P], the diagonal of its block as in `DiagGGN`
    """

    name: str = "kflr"
    sharing: Sharing = Sharing.EXPAND
    bias: Bias = Bias.OWN
    largest: int = LARGEST
    strict: bool = False
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Factors:
        scale = 1 / g.scale if isinstance(self.root, Labels) else sympy.Integer(1)
        return kronecker(J, g, self.sharing, scale, self.bias is Bias.JOINED, self.largest, self.strict)


@dataclass(frozen=True)
class KFRA(KFLR):
    """Kronecker factors with B from one matrix for the whole batch, Ḡ_u = (1/N) Σ_n J_nᵀ Ḡ_z J_n; A as in `KFLR`.

    Botev et al. 2017, arXiv:1706.03662, on any graph. The same as `KFLR` for one sample. At every value of F features
    a dense F times F matrix: meant for small layers; refuses past `memory_limit` (or the memory of the machine).
    """

    name: str = "kfra"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root != EXACT:
            raise InputError(f"KFRA: root={self.root}: it averages one matrix; KFLR and KFAC have columns")

    @property
    def propagates(self) -> Propagation:
        return Average()


@dataclass(frozen=True)
class KFAC(Quantity):
    """Kronecker factors of the Fisher information, from `mc_samples` drawn columns or from the gradients.

    The empirical Fisher is (1/N) Σ_n ∇ℓ_n ∇ℓ_nᵀ for a loss that averages, Σ_n ∇ℓ_n ∇ℓ_nᵀ for one that sums. `largest`
    and `strict` as in `KFLR`; the diagonal of a parameter without factors is that of the same columns (`DiagGGNMC`).
    """

    name: str = "kfac"
    mc_samples: int = 1
    fisher: Fisher = Fisher.MC
    sharing: Sharing = Sharing.EXPAND
    bias: Bias = Bias.OWN
    largest: int = LARGEST
    strict: bool = False

    @property
    def propagates(self) -> Propagation:
        return Draws(self.mc_samples) if self.fisher is Fisher.MC else Gradient()

    def extract(self, J: Uses, g: Cotangents) -> Factors:
        scale = sympy.Integer(1) if self.fisher is Fisher.MC else 1 / g.scale
        return kronecker(J, g, self.sharing, scale, self.bias is Bias.JOINED, self.largest, self.strict)
