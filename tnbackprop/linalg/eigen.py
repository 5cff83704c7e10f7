"""Eigendecomposition of a Kronecker product, factor by factor, and the matrices that are diagonal in its eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from .kinds import ROWS, Kind
from .operator import LinearOperator, Space, along, check_damping, moved, one_number


@dataclass(frozen=True, eq=False)
class Eigen:
    """K = Q Λ Qᵀ with Q = Q_1 ⊗ … ⊗ Q_k and Λ the products of the factors' eigenvalues.

    values     eigenvalues per factor, ≥ 0: [d] or [g, d]; ascending, those of a diagonal factor in its own order and
               those of blocks block by block
    vectors    eigenvectors per factor as columns: [d, d]; None for a diagonal factor (the identity), [b, s, s] for
               blocks, [d, r] for a factor of low rank, whose other eigenvalues are 0; each of them may have g in front
    kinds      how the factors were stored
    space      what K acts on
    """

    values: tuple[Tensor, ...]
    vectors: tuple[Tensor | None, ...]
    kinds: tuple[Kind, ...]
    space: Space

    @property
    def label(self) -> str:
        return f"Kronecker factors of {self.space}"

    @property
    def blocked(self) -> tuple[Tensor, ...]:
        """The eigenvalues as [g, d]."""
        return tuple(value.reshape(self.space.layout.blocks, -1) for value in self.values)

    def spectrum(self) -> Tensor:
        """All eigenvalues of K, [g, d_1, ..., d_k]."""
        return outer(self.blocked)

    def check_full_rank(self) -> None:
        """Refuse a singular factor: an eigenvalue ≤ d · eps · the largest one (a diagonal one is exact: only 0)."""
        for i, (value, kind) in enumerate(zip(self.blocked, self.kinds, strict=True)):
            size = value.shape[1]
            slack = 0.0 if ROWS[kind].exact else size * torch.finfo(value.dtype).eps
            ranks = (value > slack * value.amax(1, keepdim=True)).sum(1)
            if bool((ranks < size).any()):
                block = int((ranks < size).nonzero()[0])
                raise InputError(
                    f"{self.label}: factor {i} is singular: rank {int(ranks[block])} of {size} in block {block}; "
                    "give a positive damping"
                )

    def inverse(self, damping: float) -> Spectral:
        """(K + damping · I)^-1 exactly; one decomposition serves many dampings. Without damping K has to be regular."""
        return self.power(-1.0, damping)

    def power(self, p: float, damping: float = 0.0) -> Spectral:
        """(K + damping · I)^p = Q (Λ + damping)^p Qᵀ for any real p; p < 0 without damping refuses a singular K."""
        check_damping(damping, self.label)
        if damping == 0 and one_number(p, "power", self.label) < 0:
            self.check_full_rank()
        (first, *_) = self.values
        exact = outer([value.double() for value in self.blocked])  # the products could leave the range of float32
        found = _powers(exact, p, damping, first.dtype, f"eigenvalues of {self.label}")
        return Spectral(found, self, _made(p), damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(K + damping · I), a scalar."""
        check_damping(damping, self.label)
        if damping == 0:  # per factor, as there is no sum in it
            self.check_full_rank()
            size = math.prod(self.space.layout.sizes)
            return torch.stack([size / value.shape[1] * value.log().sum() for value in self.blocked]).sum()
        (first, *_) = self.values
        return (outer([value.double() for value in self.blocked]) + damping).log().sum().to(first.dtype)

    def with_eigenvalues(self, eigenvalues: Tensor) -> Spectral:
        """Q diag(eigenvalues) Qᵀ, of the parameter's shape, in the place of `to_eigenbasis`: EKFAC.

        With the diagonal of Qᵀ G Q, the second moments of rotated gradients, it is the matrix of this eigenbasis that
        is next to G in the Frobenius norm. George et al. 2018, arXiv:1806.03884.
        """
        self._check_whole("give")
        (first, *_) = self.values
        if (tuple(eigenvalues.shape), eigenvalues.dtype, eigenvalues.device) != (
            self.space.shape, first.dtype, first.device,
        ):  # fmt: skip
            raise InputError(
                f"{self.label}: the eigenvalues are {eigenvalues.dtype} {list(eigenvalues.shape)} on "
                f"{eigenvalues.device}; give {first.dtype} {list(self.space.shape)} on {first.device}"
            )
        if not bool((eigenvalues.isfinite() & (eigenvalues >= 0)).all()):
            raise InputError(
                f"{self.label}: the eigenvalues begin at {eigenvalues.min().item():.3g} and end at "
                f"{eigenvalues.max().item():.3g}; give finite ones ≥ 0, second moments in the eigenbasis"
            )
        return Spectral(self.space.layout.split(eigenvalues.reshape(1, -1)).squeeze(1).clone(), self, "eigenvalues")

    def to_eigenbasis(self, vector: Tensor) -> Tensor:
        """Qᵀ v, [..., *p] -> [..., *p]."""
        return self._turned(vector, back=False)

    def from_eigenbasis(self, vector: Tensor) -> Tensor:
        """Q v, the inverse of `to_eigenbasis`."""
        return self._turned(vector, back=True)

    def to(
        self, target: torch.dtype | torch.device | str | None = None, *, device: torch.device | str | None = None
    ) -> Eigen:
        """In a dtype or on a device, as `KroneckerFactors.to`: decompose in float64, multiply in float32."""
        values = tuple(moved(value, target, device) for value in self.values)
        return replace(
            self, values=values, vectors=tuple(q if q is None else moved(q, target, device) for q in self.vectors)
        )

    def _turned(self, vector: Tensor, back: bool) -> Tensor:
        self._check_whole("turn")
        axes = vector.ndim - len(self.space.shape)
        if axes < 0 or tuple(vector.shape[axes:]) != self.space.shape:
            raise InputError(
                f"{self.label}: the vector has shape {list(vector.shape)}; give one of shape {list(self.space.shape)}, "
                "or several along leading axes"
            )
        parts = self.space.layout.split(vector.reshape(math.prod(vector.shape[:axes]), self.space.size))
        return self.space.layout.join(self.turn(parts, back)).reshape(vector.shape)

    def _check_whole(self, what: str) -> None:
        for i, (kind, vectors) in enumerate(zip(self.kinds, self.vectors, strict=True)):
            if kind is Kind.LOW_RANK and vectors is not None and vectors.shape[-1] < vectors.shape[-2]:
                raise InputError(
                    f"{self.label}: factor {i} has low rank, {vectors.shape[-1]} of {vectors.shape[-2]}, and no basis "
                    f"of all of the space to {what} elements in; store it whole first: K.as_full().eigh()"
                )

    def turn(self, parts: Tensor, back: bool = False) -> Tensor:
        """Qᵀ (or back by Q) along every leg of parts; a factor of low rank has more coordinates than elements."""
        blocks = self.space.layout.blocks
        for i, (kind, vectors) in enumerate(zip(self.kinds, self.vectors, strict=True)):
            if vectors is not None:
                row = ROWS[kind]
                q = vectors.reshape(blocks, *vectors.shape[-row.axes :])
                parts = along(lambda x, q=q, f=row.back if back else row.rotate: f(q, x), parts, i)  # type: ignore[misc]
        return parts

    def at_coordinates(self, eigenvalues: Tensor) -> Tensor:
        """[g, d_1, ..., d_k] -> one for every coordinate."""
        for i, (kind, vectors) in enumerate(zip(self.kinds, self.vectors, strict=True)):
            index = None if vectors is None else ROWS[kind].coordinates(vectors, eigenvalues.shape[1 + i])
            if index is not None:
                eigenvalues = eigenvalues.index_select(1 + i, index)
        return eigenvalues


@dataclass(frozen=True, eq=False, repr=False)
class Spectral(LinearOperator):
    """Q diag(eigenvalues) Qᵀ: a matrix that is diagonal in the eigenbasis of Kronecker factors.

    eigenvalues    ≥ 0, [g, d_1, ..., d_k]
    eigen          the decomposition that Q is from
    made           what it is, for the reader: inverse, power, eigenvalues of one's own
    damping        what was added to the eigenvalues last
    """

    eigenvalues: Tensor
    eigen: Eigen
    made: str = "eigenvalues"
    damping: float = 0.0

    @property
    def space(self) -> Space:
        return self.eigen.space

    @property
    def _example(self) -> Tensor:
        return self.eigenvalues

    @property
    def label(self) -> str:
        return f"{self.made} of {self.eigen.label}"

    def _product(self, vectors: Tensor) -> Tensor:
        layout = self.space.layout
        parts = self.eigen.turn(layout.split(vectors))
        parts = parts * self.eigen.at_coordinates(self.eigenvalues).unsqueeze(1)
        return layout.join(self.eigen.turn(parts, back=True))

    def inverse(self, damping: float = 0.0) -> Spectral:
        """(M + damping · I)^-1; without damping a zero eigenvalue is refused."""
        return self.power(-1.0, damping)

    def sqrt(self) -> Spectral:
        """The symmetric square root, M^(1/2)."""
        return self.power(0.5)

    def power(self, p: float, damping: float = 0.0) -> Spectral:
        """(M + damping · I)^p for any real p. Raises `InputError` where that is not finite in this dtype."""
        check_damping(damping, self.label)
        found = _powers(self.eigenvalues.double(), p, damping, self.eigenvalues.dtype, self.label)
        return Spectral(found, self.eigen, _made(p), damping)

    def sample(self, generator: torch.Generator | None = None, lead: Sequence[int] = ()) -> Tensor:
        """Draws from N(0, M), [*lead, *p]: M^(1/2) z. Of an inverse it draws from N(0, (K + damping · I)^-1)."""
        return self.sqrt() @ self._draw(generator, tuple(lead))

    def to(
        self, target: torch.dtype | torch.device | str | None = None, *, device: torch.device | str | None = None
    ) -> Spectral:
        """In a dtype or on a device, as `KroneckerFactors.to`."""
        return replace(
            self, eigenvalues=moved(self.eigenvalues, target, device), eigen=self.eigen.to(target, device=device)
        )

    def trace(self) -> Tensor:
        """A scalar."""
        return self.eigenvalues.sum()

    def norm(self) -> Tensor:
        """Frobenius norm, a scalar."""
        found: Tensor = torch.linalg.vector_norm(self.eigenvalues, dtype=torch.float64)
        return found.to(self.eigenvalues.dtype)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(M + damping · I), a scalar. Raises `InputError` for a singular M without damping."""
        check_damping(damping, self.label)
        shifted = self.eigenvalues.double() + damping
        if not bool((shifted > 0).all()):
            raise InputError(f"{self.label} is singular: its smallest eigenvalue is 0; give a damping")
        return shifted.log().sum().to(self.eigenvalues.dtype)

    def __repr__(self) -> str:
        layout = self.space.layout
        sizes = "×".join(map(str, layout.sizes))
        return f"Spectral({self.label}, {layout.blocks} blocks of {sizes}, damping {self.damping:g})"


def _made(p: float) -> str:
    return "inverse" if p == -1 else f"power {p:g}"


def _powers(exact: Tensor, p: float, damping: float, dtype: torch.dtype, label: str) -> Tensor:
    """(eigenvalues + damping)^p, of eigenvalues in float64. Raises `InputError` where that is not finite in a dtype."""
    if not math.isfinite(one_number(p, "power", label)):
        raise InputError(f"{label}: the power {p} is not a finite number")
    found = (exact + damping).pow(p).to(dtype)
    if bool(found.isfinite().all()):
        return found
    low = float(exact.min())
    if low + damping < 0 or (p < 0 and low + damping == 0):
        raise InputError(f"{label} is singular: its smallest eigenvalue is {low:g}; give a damping")
    which, base = ("smallest", low) if p < 0 else ("largest", float(exact.max()))
    remedies = ["raise the damping" if p < 0 else "take a smaller power"]
    remedies += ["convert first: .to(torch.float64)"] if dtype != torch.float64 else []
    raise InputError(
        f"{label}: ({which} eigenvalue {base:g} + damping {damping:g}) to the power {p:g} overflows {dtype}; "
        f"{', or '.join(remedies)}"
    )


def outer(values: Sequence[Tensor]) -> Tensor:
    """All products of [g, d_1], …, [g, d_k] within a block, [g, d_1, ..., d_k]."""
    first, *others = values
    products = first
    for value in others:
        products = products.unsqueeze(-1) * value.reshape(len(value), *[1] * (products.ndim - 1), -1)
    return products
