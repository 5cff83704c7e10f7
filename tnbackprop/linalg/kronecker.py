"""A curvature block as a Kronecker product of small matrices, and what is done with it without forming the block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from ..errors import InputError
from .eigen import Eigen
from .operator import Layout, LinearOperator, along, check_damping


class Kind(Enum):
    """How a factor is stored: all of it, [d, d], or its diagonal, [d] (a one-hot input)."""

    FULL = "full"
    DIAGONAL = "diagonal"

    def __reduce_ex__(self, protocol: object) -> tuple[type[Kind], tuple[str]]:
        """Pickled by its value, as newer versions of Python do it: torch.load takes no `getattr`."""
        return Kind, (self.value,)


class Damping(Enum):
    """What `inverse(damping)` inverts: every factor damped on its own, or the block plus damping · I exactly."""

    FACTORED = "factored"
    EXACT = "exact"


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerFactors(LinearOperator):
    """The block K = F_1 ⊗ … ⊗ F_k of a parameter; with a block-diagonal leg g, K = block_diag_g(F_1g ⊗ … ⊗ F_kg).

    factors       symmetric positive semi-definite, in the order of the parameter's axes (for a weight [out, in]: B, A).
                  Full [d, d] or diagonal [d]; with a block-diagonal leg all of them have it in front: [g, d, d], [g, d]
    parameter     shape of the parameter; row-major it is the axes (g,) + one per factor unless `layout` says otherwise
    kinds         how each factor is stored (default: all full)
    assumption    what the approximation assumes, for the reader; the same text for factors that may be added
    layout        where the parameter's legs go, if a factor's legs are not neighbours (transposed convolutions)
    name          the parameter's name, for errors
    """

    factors: tuple[Tensor, ...]
    parameter: tuple[int, ...]
    kinds: tuple[Kind, ...] = ()
    assumption: str = ""
    layout: Layout | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        object.__setattr__(self, "parameter", tuple(self.parameter))
        object.__setattr__(self, "kinds", tuple(self.kinds) or (Kind.FULL,) * len(self.factors))
        self._check_factors()
        legs = self.places
        if math.prod(legs.legs) != math.prod(self.parameter):
            raise InputError(
                f"{self.label}: {self.blocks} block(s) of {list(self._sizes)} make {math.prod(legs.legs)} elements, "
                f"the parameter has {math.prod(self.parameter)}; the legs must multiply to the parameter's shape"
            )
        if (legs.blocks, legs.sizes) != (self.blocks, self._sizes):
            raise InputError(
                f"{self.label}: the layout has {legs.blocks} blocks of sizes {list(legs.sizes)}, the factors have "
                f"{self.blocks} of sizes {list(self._sizes)}; make the two agree"
            )

    def _check_factors(self) -> None:
        if not self.factors or len(self.kinds) != len(self.factors):
            raise InputError(
                f"{self.label}: {len(self.factors)} factors and {len(self.kinds)} kinds; "
                "give at least one factor and one kind for each"
            )
        first = self.factors[0]
        for i, (factor, kind) in enumerate(zip(self.factors, self.kinds, strict=True)):
            axes = 2 if kind is Kind.FULL else 1
            square = kind is Kind.DIAGONAL or (factor.ndim >= 2 and factor.shape[-1] == factor.shape[-2])
            if factor.ndim not in (axes, axes + 1) or not square or factor.numel() == 0:
                shape = "[d, d] or [g, d, d]" if kind is Kind.FULL else "[d] or [g, d]"
                raise InputError(f"{self._factor(i)}: a {kind.value} factor has shape {shape}, without empty axes")
            if not factor.is_floating_point() or (factor.dtype, factor.device) != (first.dtype, first.device):
                raise InputError(
                    f"{self._factor(i)} is {factor.dtype} on {factor.device}; "
                    "all factors are of one real floating-point dtype and on one device"
                )
        if len({tuple(self._leading(i)) for i in range(len(self.factors))}) > 1:
            raise InputError(
                f"{self.label}: the factors {[list(f.shape) for f in self.factors]} do not share their leading axis; "
                "give all of them the block axis g, or none"
            )

    def _leading(self, i: int) -> torch.Size:
        """The block axis of factor i, [g] or []."""
        return self.factors[i].shape[: -2 if self.kinds[i] is Kind.FULL else -1]

    def _factor(self, i: int) -> str:
        return f"{self.label}: factor {i} ({self.kinds[i].value} {list(self.factors[i].shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter

    @property
    def _example(self) -> Tensor:
        return self.factors[0]

    @property
    def label(self) -> str:
        return f"Kronecker factors of parameter {repr(self.name) + ' ' if self.name else ''}{list(self.parameter)}"

    @property
    def blocks(self) -> int:
        """The size of the block-diagonal leg g, 1 if there is none."""
        return math.prod(self._leading(0))

    @property
    def places(self) -> Layout:
        """The layout; by default the legs (g, d_1, ..., d_k)."""
        default = Layout((self.blocks, *self._sizes), tuple((1 + i,) for i in range(len(self.factors))))
        return default if self.layout is None else self.layout

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(factor.shape[-1] for factor in self.factors)

    @property
    def _blocked(self) -> tuple[Tensor, ...]:
        """The factors with the block axis, of size 1 if there is none: [g, d, d] or [g, d]."""
        return tuple(f if self._leading(i) else f.unsqueeze(0) for i, f in enumerate(self.factors))

    def _product(self, vectors: Tensor) -> Tensor:
        parts = self.places.split(vectors)
        for i, factor in enumerate(self._blocked):
            parts = along(factor, parts, i)
        return self.places.join(parts)

    def to_dense(self) -> Tensor:
        """The block for the row-major parameter, [P, P]."""
        matrices = [f if k is Kind.FULL else f.diag_embed() for f, k in zip(self._blocked, self.kinds, strict=True)]
        product = matrices[0]
        for matrix in matrices[1:]:
            pairs = product[:, :, None, :, None] * matrix[:, None, :, None, :]
            product = pairs.flatten(3, 4).flatten(1, 2)
        dense = product.new_zeros(self.blocks, product.shape[1], self.blocks, product.shape[1])
        index = torch.arange(self.blocks, device=product.device)
        dense[index, :, index] = product
        rows = self._rows_in_order(dense.flatten(2).flatten(0, 1))
        return self._rows_in_order(rows.mT)

    def _rows_in_order(self, matrix: Tensor) -> Tensor:
        """Each row of [b, P] from the order (g, d_1, ..., d_k) to that of the row-major parameter."""
        return self.places.join(matrix.reshape(-1, self.blocks, *self._sizes).movedim(0, 1))

    def trace(self) -> Tensor:
        """tr K = Σ_g Π_i tr F_ig, a scalar."""
        return self._traces().prod(0).sum()

    def _traces(self) -> Tensor:
        """tr F_ig, [k, g]."""
        rows = zip(self._blocked, self.kinds, strict=True)
        return torch.stack([(f.diagonal(dim1=-2, dim2=-1) if k is Kind.FULL else f).sum(-1) for f, k in rows])

    def norm(self) -> Tensor:
        """Frobenius norm, ‖K‖² = Σ_g Π_i ‖F_ig‖², a scalar."""
        norms = torch.stack([torch.linalg.vector_norm(f.flatten(1), dim=1) for f in self._blocked])
        total: Tensor = torch.linalg.vector_norm(norms.prod(0))
        return total

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(K + damping · I) exactly, from the eigenvalues, a scalar. A singular K without damping is refused."""
        return self.eigh().logdet(damping)

    def eigh(self) -> Eigen:
        """Eigendecomposition of every factor. Negative eigenvalues of rounding size become 0, larger are refused."""
        values: list[Tensor] = []
        vectors: list[Tensor | None] = []
        for i, (factor, kind) in enumerate(zip(self.factors, self.kinds, strict=True)):
            self._check_values(i)
            w, q = torch.linalg.eigh(factor) if kind is Kind.FULL else (factor, None)
            slack = math.sqrt(torch.finfo(w.dtype).eps) * w.abs().amax(-1, keepdim=True) * (kind is Kind.FULL)
            if bool((w < -slack).any()):
                raise InputError(
                    f"{self._factor(i)} is not positive semi-definite: its eigenvalues begin at {w.min().item():.3g} "
                    f"and end at {w.max().item():.3g}; give a second-moment matrix"
                )
            values.append(w.clamp(min=0))
            vectors.append(q)
        return Eigen(tuple(values), tuple(vectors), self.parameter, self.places, self.label)

    def _check_values(self, i: int) -> None:
        """Refuse what a decomposition would turn into wrong numbers."""
        factor = self.factors[i]
        if factor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{self._factor(i)} is {factor.dtype}, which has no decompositions; convert first: .to(torch.float32)"
            )
        if not bool(factor.isfinite().all()):
            raise InputError(f"{self._factor(i)} has entries that are not finite; look at the batch that made it")
        if self.kinds[i] is Kind.FULL:
            slack = math.sqrt(torch.finfo(factor.dtype).eps) * factor.abs().max()
            if bool((factor - factor.mT).abs().max() > slack):
                raise InputError(f"{self._factor(i)} is not symmetric; give (F + F.mT) / 2 if that is meant")

    def inverse(self, damping: float, mode: Damping = Damping.FACTORED) -> LinearOperator:
        """The inverse of the damped block, again an operator.

        EXACT      (K + λI)^-1, by eigendecomposition of every factor.
        FACTORED   ⊗_i (F_i + π_i λ^(1/k) I)^-1 by Cholesky, a `KroneckerFactors`. With t_i = tr F_i / d_i,
                   π_i = t_i / (t_1 ⋯ t_k)^(1/k): for k = 2 the π and 1/π of Martens & Grosse 2015 (arXiv:1503.05671,
                   §6.3, trace norm); for k = 1 it is EXACT; the dampings always multiply to λ. Each block of a
                   block-diagonal leg has its own π. A block that is zero gives I/λ, the limit of the formula.
        λ = 0 asks for the plain inverse and refuses singular factors. A λ below the rounding of the largest eigenvalue
        of a singular K only amplifies that rounding.
        """
        if not isinstance(mode, Damping):
            raise InputError(f"{self.label}: the mode {mode!r} is none of Damping.FACTORED and Damping.EXACT")
        check_damping(damping, self.label)
        if mode is Damping.EXACT:
            return self.eigh().inverse(damping)
        if damping == 0:
            self.eigh().check_full_rank()
        alive, shifts = self._shifts(damping)
        inverses = []
        for i, factor in enumerate(self._blocked):
            inverted = self._invert(i, factor * alive.reshape(-1, *[1] * (factor.ndim - 1)), shifts[i], damping)
            inverses.append(inverted.reshape(self.factors[i].shape))
        what = f"{self.assumption}; " if self.assumption else ""
        return replace(self, factors=tuple(inverses), assumption=f"{what}inverse, factored damping {damping:g}")

    def _shifts(self, damping: float) -> tuple[Tensor, Tensor]:
        """Which blocks are not zero, [g], and what is added to the diagonals of each factor, [k, g]."""
        means = self._traces() / torch.tensor(self._sizes).to(self._example).unsqueeze(1)
        for i, factor in enumerate(self._blocked):
            self._check_values(i)
            if bool(((means[i] <= 0) & (factor != 0).flatten(1).any(1)).any()):
                raise InputError(
                    f"{self._factor(i)} is not positive semi-definite: it is not zero and its trace is "
                    f"{means[i].min().item() * self._sizes[i]:.3g}; give a second-moment matrix"
                )
        alive = (means > 0).all(0)
        logs = torch.where(alive, means, 1).log()
        return alive, (logs - logs.mean(0)).exp() * damping ** (1 / len(self.factors))

    def _invert(self, i: int, factor: Tensor, shift: Tensor, damping: float) -> Tensor:
        """(factor + shift · I)^-1 for every block: [g, d, d] or [g, d], shift [g]."""
        if self.kinds[i] is Kind.DIAGONAL:
            inverse = (factor + shift.unsqueeze(1)).reciprocal()
            bad = ~(inverse > 0).all(1)
        else:
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            lower, info = torch.linalg.cholesky_ex(factor + shift.reshape(-1, 1, 1) * eye)
            bad = info != 0
            inverse = torch.cholesky_inverse(torch.where(bad.reshape(-1, 1, 1), eye, lower))
        bad = bad | ~inverse.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            block = int(bad.nonzero()[0])
            raise InputError(
                f"{self._factor(i)}, damped by {shift[block].item():.3g} in block {block}, is not positive definite in "
                f"{factor.dtype}; raise the damping {damping:g}, or convert first: .to(torch.float64)"
            )
        return inverse

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        """Factor by factor, as running statistics do: (F_1 + F_1') ⊗ … ⊗ (F_k + F_k').

        This is not the sum of the two blocks, which is no Kronecker product in general.
        """
        return self._zip(other, torch.add) if isinstance(other, KroneckerFactors) else NotImplemented

    def ema(self, other: KroneckerFactors, decay: float) -> KroneckerFactors:
        """The moving average factor by factor, decay · F_i + (1 − decay) · F_i'; self is the old state."""
        if not 0 <= decay <= 1:
            raise InputError(f"{self.label}: the decay {decay} is not between 0 and 1")
        return self._zip(other, lambda old, new: decay * old + (1 - decay) * new)

    def _zip(self, other: KroneckerFactors, function: Callable[[Tensor, Tensor], Tensor]) -> KroneckerFactors:
        for what, mine, others in (
            ("parameter", self.parameter, other.parameter),
            ("kinds", [kind.value for kind in self.kinds], [kind.value for kind in other.kinds]),
            ("factors", [list(f.shape) for f in self.factors], [list(f.shape) for f in other.factors]),
            ("layout", self.places, other.places),
            ("dtype", self.dtype, other.dtype),
            ("device", self.device, other.device),
            ("assumption", self.assumption, other.assumption),
        ):
            if mine != others:
                raise InputError(
                    f"{self.label}: {what} {mine} and {others} differ; combine factors of one parameter "
                    "and one quantity only"
                )
        return replace(self, factors=tuple(map(function, self.factors, other.factors)))

    def scale(self, c: float | Tensor) -> KroneckerFactors:
        """c · K for a number c ≥ 0; all of the scale goes into the first factor."""
        if isinstance(c, Tensor) and c.numel() != 1:
            raise InputError(f"{self.label}: the scale has shape {list(c.shape)}; give one number")
        if not 0 <= float(c) < math.inf:
            raise InputError(
                f"{self.label}: the scale {float(c)} is not a finite number ≥ 0; negate the product instead"
            )
        return replace(self, factors=(float(c) * self.factors[0], *self.factors[1:]))

    def __mul__(self, c: float | Tensor) -> KroneckerFactors:
        return self.scale(c) if isinstance(c, int | float | Tensor) else NotImplemented

    __rmul__ = __mul__

    def to(
        self, target: torch.dtype | torch.device | str | None = None, *, device: torch.device | str | None = None
    ) -> KroneckerFactors:
        """The factors in a dtype or on a device, as `Tensor.to`; both at once: `.to(torch.float64, device="cuda")`."""
        moved = (f if device is None else f.to(device) for f in self.factors)
        return replace(self, factors=tuple(f if target is None else f.to(target) for f in moved))

    def __repr__(self) -> str:
        product = " ⊗ ".join(f"{k.value} {d}×{d}" for d, k in zip(self._sizes, self.kinds, strict=True))
        blocks = f"{self.blocks} blocks of " if self._leading(0) else ""
        return (
            f"KroneckerFactors({self.name + ' ' if self.name else ''}{list(self.parameter)}: {blocks}{product}, "
            f"trace {self.trace().item():.4g}, {self.dtype} on {self.device}, "
            f"assumption: {self.assumption or 'not stated'})"
        )
