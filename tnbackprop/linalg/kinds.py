"""How a factor F [d, d], symmetric and positive semi-definite, is stored: one row per kind.

Inside, a factor has its block axis g in front, of size 1 if there is none; `x` are rows of vectors, [g, m, d].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .operator import ByValue

Pair = tuple[Tensor, Tensor]
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What a decomposition raises that does not converge."""


class Kind(ByValue):
    """How a factor is stored.

    FULL        all of it, [d, d]
    DIAGONAL    its diagonal, [d] (a one-hot input)
    BLOCKS      the blocks on its diagonal, [b, s, s], d = b s
    LOW_RANK    U [d, r] with F = U Uᵀ
    """

    FULL = "full"
    DIAGONAL = "diagonal"
    BLOCKS = "blocks"
    LOW_RANK = "low_rank"


class Role(ByValue):
    """What a factor stands for. Its value is its name; "" where it is not said.

    LOSS        B, with the cotangent: all scale of the loss is here
    INPUT       A, without it: the mean over samples and positions
    RELATIVE    C, an axis that was cut out of another factor: divided by the mean of its diagonal
    """

    LOSS = "B"
    INPUT = "A"
    RELATIVE = "C"
    UNKNOWN = ""


class Row(ABC):
    """What one kind says of F.

    axes      of a factor without g
    shapes    of a factor, for errors
    exact     whether a rank is counted without slack for rounding
    """

    axes: int
    shapes: str
    exact = False

    def square(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is that of a factor of this kind."""
        return True

    def size(self, shape: tuple[int, ...]) -> int:
        """d."""
        return shape[-1]

    @abstractmethod
    def full(self, f: Tensor) -> Tensor:
        """F [g, d, d]."""

    @abstractmethod
    def diagonal(self, f: Tensor) -> Tensor:
        """[g, d]."""

    @abstractmethod
    def times(self, f: Tensor, x: Tensor) -> Tensor:
        """F x for every row."""

    def norm(self, f: Tensor) -> Tensor:
        """Frobenius norms [g], in float64: squares of float32 are 0 or infinite where numbers are not."""
        found: Tensor = torch.linalg.vector_norm(f.flatten(1), dim=1, dtype=torch.float64)
        return found

    def scaled(self, f: Tensor, c: float) -> Tensor:
        """c F, in new memory."""
        return f * c

    def added(self, f: Tensor, other: Tensor) -> Tensor:
        """F + F'."""
        return f + other

    def asymmetry(self, f: Tensor) -> Tensor | None:
        """The largest |F - Fᵀ|, if the kind leaves room for one."""
        return None

    @abstractmethod
    def eigh(self, f: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues [g, d] and eigenvectors as the kind stores them; None is the identity."""

    @abstractmethod
    def inverse(self, f: Tensor, shift: Tensor) -> Pair:
        """(F + shift I)^-1 of the same kind, shift [g], and which blocks have none, [g]."""

    def spectrum(self, f: Tensor) -> Tensor:
        """Eigenvalues in float64, [g, d], for errors."""
        found: Tensor = torch.linalg.eigvalsh(self.full(f).double())
        return found

    @abstractmethod
    def rotate(self, q: Tensor, x: Tensor) -> Tensor:
        """Qᵀ x for every row: coordinates [g, m, c]."""

    @abstractmethod
    def back(self, q: Tensor, x: Tensor) -> Tensor:
        """The inverse of `rotate`."""

    def coordinates(self, q: Tensor, size: int) -> Tensor | None:
        """Which of the d eigenvalues each coordinate has; None: one each, in their order."""
        return None


class _Full(Row):
    axes, shapes = 2, "[d, d] or [g, d, d]"

    def square(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] == shape[-2]

    def full(self, f: Tensor) -> Tensor:
        return f

    def diagonal(self, f: Tensor) -> Tensor:
        return f.diagonal(dim1=-2, dim2=-1)

    def times(self, f: Tensor, x: Tensor) -> Tensor:
        return product(x, f.mT)

    def asymmetry(self, f: Tensor) -> Tensor:
        return (f - f.mT).abs().max()

    def eigh(self, f: Tensor) -> Pair:
        return _in_float64_at_need(torch.linalg.eigh, f)

    def inverse(self, f: Tensor, shift: Tensor) -> Pair:
        return _cholesky_inverse(f, shift)

    def rotate(self, q: Tensor, x: Tensor) -> Tensor:
        return product(x, q)

    def back(self, q: Tensor, x: Tensor) -> Tensor:
        return product(x, q.mT)


class _Diagonal(Row):
    axes, shapes, exact = 1, "[d] or [g, d]", True

    def full(self, f: Tensor) -> Tensor:
        return f.diag_embed()

    def diagonal(self, f: Tensor) -> Tensor:
        return f

    def times(self, f: Tensor, x: Tensor) -> Tensor:
        return x * f.unsqueeze(1)

    def eigh(self, f: Tensor) -> tuple[Tensor, None]:
        return f, None

    def inverse(self, f: Tensor, shift: Tensor) -> Pair:
        inverse = (f + shift.unsqueeze(1)).reciprocal()
        return inverse, ~((inverse > 0) & inverse.isfinite()).all(1)

    def spectrum(self, f: Tensor) -> Tensor:
        return f.double()

    def rotate(self, q: Tensor, x: Tensor) -> Tensor:
        return x

    back = rotate


class _Blocks(Row):
    axes, shapes = 3, "[b, s, s] or [g, b, s, s]"

    def square(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] == shape[-2]

    def size(self, shape: tuple[int, ...]) -> int:
        return shape[-3] * shape[-1]

    def full(self, f: Tensor) -> Tensor:
        g, b, s, _ = f.shape
        found = f.new_zeros(g, b, s, b, s)
        index = torch.arange(b, device=f.device)
        found[:, index, :, index] = f.transpose(0, 1)
        return found.reshape(g, b * s, b * s)

    def diagonal(self, f: Tensor) -> Tensor:
        return f.diagonal(dim1=-2, dim2=-1).flatten(1)

    def times(self, f: Tensor, x: Tensor) -> Tensor:
        return self.back(f, x)

    def asymmetry(self, f: Tensor) -> Tensor:
        return (f - f.mT).abs().max()

    def eigh(self, f: Tensor) -> Pair:
        values, vectors = _in_float64_at_need(torch.linalg.eigh, f)
        return values.flatten(1), vectors

    def inverse(self, f: Tensor, shift: Tensor) -> Pair:
        inverse, bad = _cholesky_inverse(f, shift.unsqueeze(1).expand(f.shape[:2]))
        return inverse, bad.any(1)

    def spectrum(self, f: Tensor) -> Tensor:
        found: Tensor = torch.linalg.eigvalsh(f.double())
        return found.flatten(1)

    def rotate(self, q: Tensor, x: Tensor) -> Tensor:
        return self.back(q.mT, x)

    def back(self, q: Tensor, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], *q.shape[1:3]).transpose(1, 2)  # [g, b, m, s]
        return product(parts, q.mT).transpose(1, 2).flatten(-2)


class _LowRank(Row):
    """F = U Uᵀ: eigenvectors are the left singular vectors Q [d, m], m = min(d, r), and all that is orthogonal to them.

    Not of the small Gram matrix Uᵀ U: it would square the condition number. Coordinates are Qᵀ x, and x - Q Qᵀ x where
    there is something orthogonal, whose eigenvalue is the first one, 0. So (U Uᵀ + λ I)^-1 is the formula of Woodbury.
    """

    axes, shapes = 2, "[d, r] or [g, d, r]"

    def size(self, shape: tuple[int, ...]) -> int:
        return shape[-2]

    def full(self, f: Tensor) -> Tensor:
        return product(f, f.mT)

    def diagonal(self, f: Tensor) -> Tensor:
        return f.square().sum(-1)

    def times(self, f: Tensor, x: Tensor) -> Tensor:
        return product(product(x, f), f.mT)

    def norm(self, f: Tensor) -> Tensor:
        small = (f if f.shape[-2] < f.shape[-1] else f.mT).double()
        found: Tensor = torch.linalg.matrix_norm(product(small, small.mT))
        return found

    def scaled(self, f: Tensor, c: float) -> Tensor:
        return f * math.sqrt(c)

    def added(self, f: Tensor, other: Tensor) -> Tensor:
        return torch.cat([f, other], -1)

    def eigh(self, f: Tensor) -> Pair:
        q, s = _in_float64_at_need(lambda m: torch.linalg.svd(m, full_matrices=False)[:2], f)
        values = torch.nn.functional.pad(s.square().flip(-1), (f.shape[-2] - s.shape[-1], 0))
        return values, q.flip(-1)

    def inverse(self, f: Tensor, shift: Tensor) -> Pair:
        raise NotImplementedError("an inverse has full rank: it is taken in the eigenbasis")

    def rotate(self, q: Tensor, x: Tensor) -> Tensor:
        inside = product(x, q)
        return inside if q.shape[-2] == q.shape[-1] else torch.cat([inside, x - product(inside, q.mT)], -1)

    def back(self, q: Tensor, x: Tensor) -> Tensor:
        rank = q.shape[-1]
        inside = product(x[..., :rank], q.mT)
        return inside if x.shape[-1] == rank else inside + x[..., rank:]

    def coordinates(self, q: Tensor, size: int) -> Tensor | None:
        rank = q.shape[-1]
        if rank == size:
            return None
        inside = torch.arange(size - rank, size, device=q.device)
        return torch.cat([inside, inside.new_zeros(size)])


ROWS: Mapping[Kind, Row] = {
    Kind.FULL: _Full(),
    Kind.DIAGONAL: _Diagonal(),
    Kind.BLOCKS: _Blocks(),
    Kind.LOW_RANK: _LowRank(),
}


def product(one: Tensor, other: Tensor) -> Tensor:
    """Of matrices, in the dtype that they have: `torch.autocast` would take a shorter one."""
    kind = one.device.type
    known = torch.amp.autocast_mode.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if known and torch.is_autocast_enabled(kind) else nullcontext():
        return one @ other


def _in_float64_at_need(decompose: Callable[[Tensor], Sequence[Tensor]], matrices: Tensor) -> Pair:
    """A decomposition; where it does not converge in float32, of float64 and rounded."""
    try:
        first, second = decompose(matrices)
    except LinAlgError:
        if matrices.dtype == torch.float64:
            raise
        first, second = decompose(matrices.double())
    return first.to(matrices.dtype), second.to(matrices.dtype)


def _cholesky_inverse(matrices: Tensor, shift: Tensor) -> Pair:
    """(M + shift I)^-1 for every matrix [..., s, s], shift [...], and where there is none, [...].

    In float64 and rounded where float32 fails, or where the condition number leaves it without a right digit.
    """
    inverse, bad, condition = _once(matrices, shift)
    again = bad | (condition > 0.1 / torch.finfo(matrices.dtype).eps)
    if matrices.dtype != torch.float64 and bool(again.any()):
        exact, still, _ = _once(matrices[again].double(), shift[again].double())
        inverse[again] = rounded = exact.to(matrices.dtype)
        bad = bad.masked_scatter(again, still | _unbounded(rounded))
    return inverse, bad


def _once(matrices: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverses, which are none, and their condition numbers in the 1-norm."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    damped = matrices + shift[..., None, None] * eye
    lower, info = torch.linalg.cholesky_ex(damped)
    bad = info != 0
    inverse = torch.cholesky_inverse(torch.where(bad[..., None, None], eye, lower))
    one, other = (m.abs().sum(-1).amax(-1) for m in (damped, inverse))
    return inverse, bad | _unbounded(inverse), one * other


def _unbounded(matrices: Tensor) -> Tensor:
    return ~matrices.isfinite().flatten(-2).all(-1)
