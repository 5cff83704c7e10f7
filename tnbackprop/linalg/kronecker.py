"""A curvature block as a Kronecker product of small matrices, and what is done with it without forming the block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import InputError
from .eigen import Eigen, Spectral, outer
from .factored import inverses, shifts
from .kinds import ROWS, Kind, LinAlgError, Role, Row
from .operator import Joined, Layout, LinearOperator, along, check_damping, one_number
from .stored import Stored, check_alike


class Damping(Enum):
    """What `inverse(damping)` inverts: every factor damped on its own, or the block plus damping · I exactly."""

    FACTORED = "factored"
    EXACT = "exact"


@dataclass(frozen=True)
class Template:
    """All of `KroneckerFactors` but its tensors: hashable, to build it again. See there for the fields."""

    parameter: tuple[int, ...]
    kinds: tuple[Kind, ...]
    assumption: str = ""
    layout: Layout | None = None
    name: str = ""
    roles: tuple[Role, ...] = ()
    joined: Joined | None = None

    def of(self, tensors: Sequence[Tensor]) -> KroneckerFactors:
        """The factors with these tensors, in the order of `KroneckerFactors.tensors()`; nothing is copied."""
        return KroneckerFactors(tuple(tensors), **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerFactors(Stored):
    """The block K = F_1 ⊗ … ⊗ F_k of a parameter; with a block-diagonal leg g, K = block_diag_g(F_1g ⊗ … ⊗ F_kg).

    factors       symmetric positive semi-definite, in the order of the parameter's axes (for a weight [out, in]: B, A).
                  Full [d, d], diagonal [d], blocks [b, s, s] or of low rank, U [d, r] for U Uᵀ; with a block-diagonal
                  leg all of them have it in front: [g, d, d], [g, d], …
    parameter     shape of the parameter; row-major it is the axes (g,) + one per factor unless `layout` says otherwise
    kinds         how each factor is stored (default: all full)
    assumption    what the approximation assumes, for the reader; the same text for factors that may be added
    layout        where the parameter's legs go, if a factor's legs are not neighbours (transposed convolutions)
    name          the parameter's name, for errors
    roles         what each factor stands for: `Role.LOSS` (B), `Role.INPUT` (A), … (default: not said)
    joined        of a weight with its bias, which they are: `join` and `split` go between them and [out, in + 1]
    """

    # Products and numbers.

    def _product(self, vectors: Tensor) -> Tensor:
        parts = self.places.split(vectors)
        for i, (factor, kind) in enumerate(zip(self._blocked, self.kinds, strict=True)):
            parts = along(lambda x, f=factor, times=ROWS[kind].times: times(f, x), parts, i)  # type: ignore[misc]
        return self.places.join(parts)

    def to_dense(self) -> Tensor:
        """The block for the row-major parameter, [P, P]."""
        product, *others = (ROWS[kind].full(f) for f, kind in zip(self._blocked, self.kinds, strict=True))
        for matrix in others:
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
        rows = zip(self._blocked, self.kinds, strict=True)
        traces = torch.stack([ROWS[kind].diagonal(f).double().sum(-1) for f, kind in rows])
        return traces.prod(0).sum().to(self.dtype)  # factors may be large and small

    def norm(self) -> Tensor:
        """Frobenius norm, ‖K‖² = Σ_g Π_i ‖F_ig‖², a scalar."""
        norms = torch.stack([ROWS[kind].norm(f) for f, kind in zip(self._blocked, self.kinds, strict=True)])
        total: Tensor = torch.linalg.vector_norm(norms.prod(0))
        return total.to(self.dtype)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(K + damping · I) exactly, from the eigenvalues, a scalar. A singular K without damping is refused."""
        return self.eigh().logdet(damping)

    # Decompositions and what is made with them.

    def eigh(self) -> Eigen:
        """Eigendecomposition of every factor. Negative eigenvalues of rounding size become 0, larger are refused."""
        values: list[Tensor] = []
        vectors: list[Tensor | None] = []
        for i, (factor, kind) in enumerate(zip(self._blocked, self.kinds, strict=True)):
            self._check_values(i)
            try:
                w, q = ROWS[kind].eigh(factor)
            except LinAlgError as error:
                raise InputError(f"{self._factor(i)} has no eigendecomposition in float64: {error}") from error
            slack = 0.0 if ROWS[kind].exact else _rounding(w.dtype)
            if bool((w < -slack * w.abs().amax(-1, keepdim=True)).any()):
                raise InputError(
                    f"{self._factor(i)} is not positive semi-definite: its eigenvalues begin at {w.min().item():.3g} "
                    f"and end at {w.max().item():.3g}; give a second-moment matrix"
                )
            lead = self._leading_axis(i)
            values.append(w.clamp(min=0).reshape(*lead, -1))
            vectors.append(None if q is None else q.reshape(*lead, *q.shape[1:]))
        return Eigen(tuple(values), tuple(vectors), self.kinds, self.space)

    def _check_values(self, i: int) -> None:
        """Refuse what a decomposition would turn into wrong numbers."""
        factor = self.factors[i]
        if factor.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{self._factor(i)} is {factor.dtype}, which has no decompositions; convert first: .to(torch.float32)"
            )
        if not bool(factor.isfinite().all()):
            raise InputError(f"{self._factor(i)} has entries that are not finite; look at the batch that made it")
        asymmetry = ROWS[self.kinds[i]].asymmetry(factor)
        if asymmetry is not None and bool(asymmetry > _rounding(factor.dtype) * factor.abs().max()):
            raise InputError(f"{self._factor(i)} is not symmetric; give (F + F.mT) / 2 if that is meant")

    def power(self, p: float, damping: float = 0.0) -> Spectral:
        """(K + damping · I)^p for any real p, by eigendecomposition of every factor.

        p < 0 without damping refuses singular factors. Raises `InputError` where the power is not finite.
        """
        return self.eigh().power(p, damping)

    def sqrt(self) -> Spectral:
        """The symmetric square root K^(1/2)."""
        return self.power(0.5)

    def sample(self, generator: torch.Generator | None = None, lead: Sequence[int] = ()) -> Tensor:
        """Draws from N(0, K), [*lead, *p]: K^(1/2) z.

        From N(0, (K + damping · I)^-1), as a Laplace approximation has it:
        `K.inverse(damping, Damping.EXACT).sample(generator)`.
        """
        return self.sqrt() @ self._draw(generator, tuple(lead))

    def inverse(self, damping: float, mode: Damping = Damping.FACTORED) -> KroneckerFactors | Spectral:
        """The inverse of the damped block, again an operator.

        EXACT      (K + λI)^-1, by eigendecomposition of every factor.
        FACTORED   ⊗_i (F_i + π_i λ^(1/k) I)^-1 by Cholesky, a `KroneckerFactors`. With t_i = tr F_i / d_i,
                   π_i = t_i / (t_1 ⋯ t_k)^(1/k): for k = 2 the π and 1/π of Martens & Grosse 2015 (arXiv:1503.05671,
                   §6.3, trace norm); for k = 1 it is EXACT; the dampings always multiply to λ. Each block of a
                   block-diagonal leg has its own π. A block that is zero gives I/λ, the limit of the formula. With a
                   factor of low rank it is a `Spectral`, and the formula of Woodbury.
        λ = 0 asks for the plain inverse and refuses singular factors. A λ below the rounding of the largest eigenvalue
        of a singular K only amplifies that rounding. Where float32 fails it is done in float64 and rounded; where that
        fails too, an `InputError` names factor, block, condition and damping: never inf or nan.
        """
        if not isinstance(mode, Damping):
            raise InputError(f"{self.label}: the mode {mode!r} is none of Damping.FACTORED and Damping.EXACT")
        check_damping(damping, self.label)
        if mode is Damping.EXACT:
            return self.eigh().inverse(damping)
        for i in range(len(self.factors)):
            self._check_values(i)
        if Kind.LOW_RANK in self.kinds:
            return self._factored_spectral(damping)
        if damping == 0:
            self.eigh().check_full_rank()
        found = inverses(self._blocked, self.kinds, damping, self._factor)
        inverted = tuple(each.reshape(factor.shape) for each, factor in zip(found, self.factors, strict=True))
        what = f"{self.assumption}; " if self.assumption else ""
        return replace(self, factors=inverted, assumption=f"{what}inverse, factored damping {damping:g}")

    def _factored_spectral(self, damping: float) -> Spectral:
        """The same by eigendecomposition."""
        eigen = self.eigh()
        if damping == 0:
            eigen.check_full_rank()
        alive, added = shifts(self._blocked, self.kinds, damping, self._factor)
        each = (w * alive.unsqueeze(1) + s.unsqueeze(1) for w, s in zip(eigen.blocked, added, strict=True))
        inverse = Spectral(outer(tuple(each)), eigen).inverse()
        return replace(inverse, made="inverse, factored,", damping=damping)

    def solve(self, b: Tensor, damping: float, mode: Damping = Damping.FACTORED) -> Tensor:
        """`inverse(damping, mode) @ b`, b [..., *p]. For several b one after the other, keep the inverse."""
        return self.inverse(damping, mode) @ b

    # Arithmetic.

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        """Factor by factor, as running statistics do: (F_1 + F_1') ⊗ … ⊗ (F_k + F_k').

        This is not the sum of the two blocks, which is no Kronecker product in general.
        """
        if not isinstance(other, KroneckerFactors):
            return NotImplemented
        return self._zip(other, lambda row, mine, theirs: row.added(mine, theirs))

    def ema(self, other: KroneckerFactors, decay: float) -> KroneckerFactors:
        """The moving average factor by factor, decay · F_i + (1 − decay) · F_i'; self is the old state.

        Factors of low rank are put next to each other: their ranks add up.
        """
        self._check_decay(decay)
        return self._zip(other, lambda row, a, b: row.added(row.scaled(a, decay), row.scaled(b, 1 - decay)))

    @torch.no_grad()
    def ema_(self, other: KroneckerFactors, decay: float) -> KroneckerFactors:
        """`ema`, written into the factors of self; nothing is allocated. Factors of low rank are refused."""
        self._check_decay(decay)
        if Kind.LOW_RANK in self.kinds:
            raise InputError(
                f"{self.label}: the moving average of factors of low rank has a higher rank, and no place in them; "
                "take K.ema(other, decay), or keep them whole: K.as_full().ema_(other.as_full(), decay)"
            )
        check_alike(self, other)
        for mine, theirs in zip(self.factors, other.factors, strict=True):
            mine.lerp_(theirs, 1 - decay)
        return self

    def _check_decay(self, decay: float) -> None:
        if not 0 <= one_number(decay, "decay", self.label) <= 1:
            raise InputError(f"{self.label}: the decay {decay} is not between 0 and 1")

    def _zip(self, other: KroneckerFactors, function: Callable[[Row, Tensor, Tensor], Tensor]) -> KroneckerFactors:
        check_alike(self, other)
        rows = zip(self.kinds, self.factors, other.factors, strict=True)
        return replace(self, factors=tuple(function(ROWS[kind], mine, theirs) for kind, mine, theirs in rows))

    def scale(self, c: float | Tensor) -> KroneckerFactors:
        """c · K for a number c ≥ 0; all of the scale goes into B, or the first factor where roles are not said."""
        number = one_number(c, "scale", self.label)
        if not 0 <= number < math.inf:
            raise InputError(f"{self.label}: the scale {number} is not a finite number ≥ 0; negate the product instead")
        lead = self.roles.index(Role.LOSS) if Role.LOSS in self.roles else 0
        rows = enumerate(zip(self.kinds, self.factors, strict=True))
        return replace(self, factors=tuple(ROWS[k].scaled(f, number if i == lead else 1.0) for i, (k, f) in rows))

    def __mul__(self, c: float | Tensor) -> KroneckerFactors:
        if isinstance(c, LinearOperator):
            self._refuse("a product of two blocks", "apply one after the other, K @ (L @ v)")
        return self.scale(c) if isinstance(c, Real | Tensor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, c: float | Tensor) -> KroneckerFactors:
        if isinstance(c, LinearOperator):
            self._refuse("a quotient of two blocks", "solve instead, L.solve(K @ v, damping)")
        if not isinstance(c, Real | Tensor):
            return NotImplemented
        number = one_number(c, "divisor", self.label)
        if not 0 < number < math.inf:
            raise InputError(f"{self.label}: the divisor {number} is not a finite number > 0; divide the product")
        return self.scale(1 / number)

    def __rtruediv__(self, c: float | Tensor) -> NoReturn:
        self._refuse("a number over a block", "take K.inverse(damping)")

    def __neg__(self) -> NoReturn:
        self._refuse("the negative of a block", "negate the product, -(K @ v)")

    def __sub__(self, other: object) -> NoReturn:
        self._refuse("a difference", "subtract the products, K @ v - L @ v, or shift it, K.inverse(damping)")

    __rsub__ = __sub__

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise InputError(f"{self.label}: {what} is no product of positive semi-definite factors; {remedy}")

    @property
    def template(self) -> Template:
        """What is left without the tensors."""
        return Template(**{field.name: getattr(self, field.name) for field in fields(Template)})

    def __repr__(self) -> str:
        product = " ⊗ ".join(f"{k.value} {d}×{d}" for d, k in zip(self._sizes, self.kinds, strict=True))
        blocks = f"{self.blocks} blocks of " if self._leading_axis(0) else ""
        return (
            f"KroneckerFactors({self.name + ' ' if self.name else ''}{list(self.parameter)}: {blocks}{product}, "
            f"trace {self.trace().item():.4g}, {self.dtype} on {self.device}, "
            f"assumption: {self.assumption or 'not stated'})"
        )


def _rounding(dtype: torch.dtype) -> float:
    """What is taken for rounding, next to the largest entry: factors in float64 may have been made in float32."""
    return max(math.sqrt(torch.finfo(dtype).eps), 100 * torch.finfo(torch.float32).eps)
