"""The Hessian and its approximations by diagonals."""

from __future__ import annotations

from dataclasses import dataclass

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import COLUMN, Diagram
from .base import Quantity
from .propagation import Diagonal, Elementwise, Hessian, Propagation


@dataclass(frozen=True)
class HessianDiag(Quantity):
    """Diagonal of the Hessian of the loss as written, shape [*p], or of each sample's share of it, [N, *p]. Exact.

    diag ∇²L = Σ_v (Jᵀ S_v)² + Σ_i w_i (D_i)²: columns of the root of the loss Hessian, and for every layer with a
    second derivative one column per element of its input, with the weight Σ_z g_z ∂²z/∂u². Dangel et al. 2020,
    arXiv:1912.10985, App. A.3, on any graph: residual connections, products of values, parameters that are used twice.
    The cost is that of one sweep per element of such an input: meant for few of them. Raises `UnsupportedError` for a
    layer without a rule.
    """

    name: str = "hessian_diag"
    per_sample: bool = False

    @property
    def propagates(self) -> Propagation:
        return Hessian()

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        V, W = J.T @ g, g.dual(J)
        return (V * W).sum(COLUMN) if self.per_sample else (V * W).sum(COLUMN, "n")


@dataclass(frozen=True)
class HesScale(Quantity):
    """Approximate diagonal of the Hessian, shape [*p], or of each sample's share, [N, *p], at the cost of a gradient.

    h_u = (J∘J)ᵀ h_z + Σ_z g_z ∂²z/∂u², from the exact diagonal at the model's output back: what is not on the diagonal
    is dropped at every layer. Exact for the last layer. Elsayed & Mahmood 2022, arXiv:2210.11639; Elsayed et al. 2024,
    arXiv:2406.03276. Several uses of a parameter count each for itself. Raises `UnsupportedError` for a layer without
    a rule.
    """

    name: str = "hesscale"
    per_sample: bool = False

    @property
    def propagates(self) -> Propagation:
        return Diagonal()

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        h = J.T @ g  # J is J∘J here
        return h if self.per_sample else h.sum("n")


@dataclass(frozen=True)
class BL89(HesScale):
    """`HesScale` from a softmax taken elementwise: h = t p (1 - p) / N with the targets t, not p (1 - p) / N.

    Becker & Le Cun 1989, as Elsayed & Mahmood 2022 (arXiv:2210.11639) apply it to classification: with L = -t log p and
    p' = p (1 - p), p'' = p (1 - p) (1 - 2 p), it is p'² ∂²L/∂p² + p'' ∂L/∂p. The same as `HesScale` for losses that do
    not mix outputs, and for those that are not torch's cross-entropy: only there is it known what the elements are of.
    """

    name: str = "bl89"

    @property
    def propagates(self) -> Propagation:
        return Elementwise()
