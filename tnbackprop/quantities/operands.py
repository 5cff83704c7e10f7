"""Quantities that read tensors which are handed in at the call: directions, weights, bases, projections.

`program(x, y, operands={key: ...})`; `program.operands` tells the keys and the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import sympy

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import Diagram, Leg, N, Scalar
from .base import EXACT, Quantity, columns, individual, over_columns
from .factors import LARGEST, Factors, Sharing, kronecker
from .propagation import Draws, Labels, Propagation

DRAWN = Draws(1)
SKETCH = "sketch_"
"""What the keys of its projections begin with."""


@dataclass(frozen=True)
class DirectionalGrad(Quantity):
    """Derivative of each sample's loss along a direction, shape [N]: ⟨∇ℓ_n, d⟩. No individual gradient is built.

    Operand: ``"direction"``, d of each parameter, [*p]. Of all parameters together: ``tn.Total(tn.DirectionalGrad())``.
    """

    name: str = "directional_grad"

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (individual(J, g) * J.operand("direction")).sum_parameter()


@dataclass(frozen=True)
class DirectionalRoot(Quantity):
    """Products of the root of the GGN with a direction, shape [V, N]: ⟨V[v, n], d⟩.

    Operand: ``"direction"``, [*p]. Its total over all parameters, squared and summed over v, is the curvature of the
    whole GGN along d, dᵀ G_n d; each parameter's own is `DirectionalCurvature`.
    """

    name: str = "directional_root"
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (columns(J, g, self.root) * J.operand("direction")).sum_parameter()


@dataclass(frozen=True)
class DirectionalCurvature(Quantity):
    """Curvature of the GGN block along a direction, shape [N]: dᵀ G_n d = Σ_v ⟨V[v, n], d⟩². Neither V nor G is built.

    Operand: ``"direction"``, [*p]. It is each sample's share: over n they sum to dᵀ G d with the block G of p. Between
    parameters G has more: `DirectionalRoot`.
    """

    name: str = "directional_curvature"
    root: Propagation = field(default=EXACT, kw_only=True)

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        Vd = (columns(J, g, self.root) * J.operand("direction")).sum_parameter().part()
        return over_columns(Vd * Vd)


@dataclass(frozen=True)
class WeightedGrad(Quantity):
    """Weighted sum of the individual gradients, shape [*p]: Σ_n w_n ∇ℓ_n.

    Operand: ``"weights"``, [N], one for all parameters.
    """

    name: str = "weighted_grad"

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (individual(J, g) * g.operand("weights")).sum("n")


@dataclass(frozen=True)
class RotatedSecondMoment(Quantity):
    """Second moments in the eigenbasis of Kronecker factors, shape [*p]: Σ_vn [Qᵀ V[v, n]]², Q = ⊗_k Q_k; EKFAC's.

    It is the diagonal of Qᵀ G Q, exact for the columns of `root`: ``tn.Exact()``, ``tn.Draws(k)``, or ``tn.Labels()``
    for the empirical Fisher with ∇ℓ_n scaled as in `KFAC`. ``eigen.with_eigenvalues(value)`` is the damped inverse's
    matrix. George et al. 2018, arXiv:1806.03884, Eq. 8.

    Operands: ``"basis_k"`` of each factor k that is stored whole, its eigenvectors as columns [d, d], with blocks
    [g, d, d]: `bases` makes them of ``{name: K.eigh()}``. A factor that is a diagonal, or has d = 1, has none.
    """

    name: str = "rotated_second_moment"
    root: Propagation = EXACT
    sharing: Sharing = Sharing.EXPAND

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        V = columns(J, g, self.root)
        turned: dict[Leg, Leg] = {}
        for k, side in enumerate(J.sides(self.sharing)):
            new = {leg: Leg(f"{leg.name}_turned", leg.size) for leg in side.legs if not side.diagonal}
            if any(leg.size != 1 for leg in new):
                basis = J.operand(f"basis_{k}", (*filter(None, [side.blocks]), side.legs, tuple(new.values())))
                V = (V * basis).sum(*(leg.name for leg in side.legs))
                turned |= new
        R = V.rename({new: leg for leg, new in turned.items()}).part()
        return over_columns(R * R, "n").ordered(*(leg.name for leg in J.legs))

    @staticmethod
    def bases(eigen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The operands, from the eigendecomposition of each parameter's factors; a single element is not turned."""
        found: dict[str, dict[str, Any]] = {}
        for name, each in eigen.items():
            for k, vectors in enumerate(each.vectors):
                if vectors is not None and vectors.shape[-1] > 1:
                    found.setdefault(f"basis_{k}", {})[name] = vectors
        return found


@dataclass(frozen=True)
class AxisMoments(Quantity):
    """Second moments of the gradient along each axis of a parameter, `KroneckerFactors` with M_k [d_k, d_k].

    M_k = Σ_others ∇L ∇Lᵀ over all axes but k (the statistics of Shampoo: Gupta et al. 2018, arXiv:1802.09568), or with
    ``individual=True`` the mean over samples, (1/N) Σ_n Σ_others ∇ℓ_n ∇ℓ_nᵀ (TNT's covariances up to their scale: Ren &
    Goldfarb 2021, arXiv:2106.02925). Their product has no scale of its own.

    largest  rows of the largest M_k; of a longer axis it is the diagonal
    """

    name: str = "axis_moments"
    individual: bool = False
    largest: int = 4096

    def extract(self, J: Uses, g: Cotangents) -> Factors:
        G = individual(J, g) if self.individual else (J.T @ g).sum("n").part()
        axes = J.axes or tuple((leg,) for leg in J.legs)
        flat = tuple(int(sympy.Mul(*(leg.size for leg in axis))) > self.largest for axis in axes)
        moments = tuple(self._moment(G, axis, short) for axis, short in zip(axes, flat, strict=True))
        what = "individual gradients" if self.individual else "gradient"
        return Factors(moments, (), axes, J.legs, f"second moments of the {what} along each axis", diagonal=flat)

    def _moment(self, G: Diagram, axis: tuple[Leg, ...], diagonal: bool) -> Diagram:
        copy = {leg: Leg(f"{leg.name}_copy", leg.size) for leg in axis if not diagonal}
        product = G * G.rename(copy)
        kept = (*axis, *copy.values())
        moment = product.sum(*(leg.name for leg in product.legs if leg not in kept))
        scale: Scalar = 1 / N if self.individual else sympy.Integer(1)
        return (moment * scale).ordered(*(leg.name for leg in kept))


class Structure(Enum):
    """Which matrices project a factor: all, block-diagonal or diagonal ones."""

    DENSE = "dense"
    BLOCKS = "blocks"
    DIAGONAL = "diagonal"


@dataclass(frozen=True)
class ProjectedFactors(Quantity):
    """Kronecker factors between projections, `KroneckerFactors` with Kᵀ F K of each factor F of `KFLR` or `KFAC`.

    What SINGD's updates read (Lin et al. 2024, arXiv:2312.05705): with diagonal K only diagonals k² ∘ diag F [d] are
    computed, and no factor is formed; with `Structure.BLOCKS` only the blocks on its diagonal, [d / s, s, s]; with
    dense K the factor is formed or contracted with K first, as is faster.

    Operands: ``"projection_k"`` of each factor k, [d, d], [d / s, s, s] or [d], as `program.operands` says; with
    groups [g, …].

    root  the columns: ``tn.Exact()``, ``tn.Draws(k)``, or ``tn.Labels()`` for the empirical Fisher
    rows  s of blocks is the largest that divides d with at most so many; of a factor with several axes (a convolution's
          inputs: channels and kernel) whole slices of the first
    """

    name: str = "projected_factors"
    structure: Structure = Structure.DIAGONAL
    root: Propagation = DRAWN
    sharing: Sharing = Sharing.EXPAND
    largest: int = LARGEST
    rows: int = 32

    @property
    def propagates(self) -> Propagation:
        return self.root

    def extract(self, J: Uses, g: Cotangents) -> Factors:
        scale = 1 / g.scale if isinstance(self.root, Labels) else sympy.Integer(1)
        rows = {Structure.DENSE: 0, Structure.BLOCKS: self.rows, Structure.DIAGONAL: 1}[self.structure]
        found = kronecker(J, g, self.sharing, scale, largest=self.largest, rows=rows)
        each = zip(found.diagrams, found.legs, found.diagonal, strict=True)
        diagrams = tuple(self._projected(J, found, k, F, legs, short) for k, (F, legs, short) in enumerate(each))
        return replace(found, diagrams=diagrams, assumption=f"between projections; {found.assumption}")

    def _projected(
        self, J: Uses, found: Factors, k: int, F: Diagram, legs: tuple[Leg, ...], flat: bool
    ) -> Diagram:
        front = tuple(filter(None, [found.blocks]))
        if flat:
            K = J.operand(f"projection_{k}", (*front, legs))
            return F * (K * K)
        of = {leg.name: leg for leg in F.legs}
        own = tuple(leg for leg in F.legs if f"{leg.name}_copy" in of)
        other = tuple(of[f"{leg.name}_copy"] for leg in own)
        groups = tuple(leg for leg in F.legs if leg not in {*found.blocks, *own, *other})
        front = (*front, *filter(None, [groups]))
        new = tuple(Leg(f"{leg.name}_new", leg.size) for leg in own)
        twin = tuple(Leg(f"{leg.name}_new_copy", leg.size) for leg in own)
        K = J.operand(f"projection_{k}", (*front, own, new))
        L = K.rename(dict(zip((*own, *new), (*other, *twin), strict=True)))
        found_: Diagram = (K * F * L).sum(*(leg.name for leg in (*own, *other)))
        return found_.ordered(*(leg.name for leg in (*found.blocks, *groups, *new, *twin)))


@dataclass(frozen=True)
class Sketch(Quantity):
    """Random projection of the individual gradients to `size` numbers, factor by factor, shape [N, size].

    [n, s] = Σ ∇ℓ_n[a, b, …] P_0[a, s] P_1[b, s] …: the projections are those of the sides of the parameter's Kronecker
    factors (for a weight [out, in]: of out and of in), and no individual gradient is built. TRAK: Park et al. 2023,
    arXiv:2303.14186; projected by factors: Choe et al. 2024, arXiv:2405.13954.

    Operands: ``"sketch_k"`` of each side k, [d, size], with blocks [g, d, size]; `tn.projections` draws them. Of
    the whole gradient: ``tn.Total(tn.Sketch())``.
    """

    name: str = "sketch"
    size: int = 64
    sharing: Sharing = Sharing.EXPAND

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        sketch, G = Leg("sketch", self.size), individual(J, g)
        for k, side in enumerate(J.sides(self.sharing)):
            G = G * J.operand(f"{SKETCH}{k}", (*filter(None, [side.blocks]), side.legs, sketch))
        return G.sum(*(leg.name for leg in J.legs))
