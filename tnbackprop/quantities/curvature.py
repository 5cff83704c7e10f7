"""Curvature from the root S of the loss Hessian, S Sᵀ = ∂²L/∂output²: V = Jᵀ S has the GGN as VᵀV.

Dangel et al. 2020, arXiv:1912.10985, Table 1 and Eq. 18-20. The GGN is that of the loss as the user wrote it,
G = (1/N) Σ_n J_nᵀ H_n J_n for a loss that averages. `…MC` draws columns s with E[s sᵀ] = ∂²L/∂output²: gradients of
labels from the model's own distribution for cross-entropy, normal ones for any other loss.

`root` says which columns: ``tn.Exact()``, ``tn.Draws(k)``, or ``tn.Labels()``, the gradients of the labels (the
empirical Fisher), which have no column leg.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import COLUMN, COLUMN_COPY, Diagram
from ..errors import InputError
from .base import EXACT, Quantity, columns, over_columns
from .propagation import Draws, Propagation


@dataclass(frozen=True)
class SqrtGGN(Quantity):
    """Square root of the GGN, shape [V, N, *p]: GGN = Σ_vn V[v, n] V[v, n]ᵀ. Softmax has V = C - 1 columns."""

    name: str = "sqrt_ggn"
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return columns(J, g, self.root)


@dataclass(frozen=True)
class SqrtGGNMC(Quantity):
    """Monte-Carlo square root of the GGN, shape [mc_samples, N, *p]: E[Σ_vn V[v, n] V[v, n]ᵀ] = GGN."""

    name: str = "sqrt_ggn_mc"
    mc_samples: int = 1

    @property
    def propagates(self) -> Propagation:
        return Draws(self.mc_samples)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return J.T @ g


@dataclass(frozen=True)
class DiagGGN(Quantity):
    """Diagonal of the GGN, shape [*p], or of each sample's share of it, [N, *p]: Σ_v (Jᵀ S_v)², elementwise."""

    name: str = "diag_ggn"
    per_sample: bool = False
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        V = columns(J, g, self.root)
        return over_columns(V * V) if self.per_sample else over_columns(V * V, "n")


@dataclass(frozen=True)
class DiagGGNMC(DiagGGN):
    """Monte-Carlo estimate of the diagonal of the GGN, shapes as for `DiagGGN`, with `mc_samples` columns."""

    name: str = "diag_ggn_mc"
    mc_samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root != EXACT:
            raise InputError(f"DiagGGNMC: root={self.root}: say mc_samples=, or DiagGGN(root=…)")

    @property
    def propagates(self) -> Propagation:
        return Draws(self.mc_samples)


@dataclass(frozen=True)
class GGNGram(Quantity):
    """Gram matrix of the columns of the root, V Vᵀ, shape [V, N, V, N]: its non-zero spectrum is that of the GGN block.

    [v, n, w, m] = ⟨V[v, n], V[w, m]⟩; summed over the parameters, that of the whole GGN. Dangel et al. 2022,
    arXiv:2106.02624, Sec. 2.
    """

    name: str = "ggn_gram"
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return replace(self.root, together=True)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        V = columns(J, g, self.root)
        several = {COLUMN: COLUMN_COPY} if any(leg.name == COLUMN for leg in V.legs) else {}
        return (V * V.relabel(n="m", **several)).sum_parameter()


@dataclass(frozen=True)
class GGNTrace(Quantity):
    """Trace of each sample's share of the GGN block, shape [N]: Σ_v ‖Jᵀ S_v‖²; it sums to tr G over the samples."""

    name: str = "ggn_trace"
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        V = columns(J, g, self.root)
        return over_columns((V * V).sum_parameter())
