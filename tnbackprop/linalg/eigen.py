"""Eigendecomposition of a Kronecker product, factor by factor, and the exactly damped inverse made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .operator import Layout, LinearOperator, along, check_damping


@dataclass(frozen=True, eq=False)
class Eigen:
    """K = Q Λ Qᵀ with Q = Q_1 ⊗ … ⊗ Q_k and Λ the products of the factors' eigenvalues.

    values     eigenvalues per factor, ≥ 0: [d] or [g, d]; ascending, those of a diagonal factor in its own order
    vectors    eigenvectors per factor as columns: [d, d] or [g, d, d]; None for a diagonal factor (the identity)
    """

    values: tuple[Tensor, ...]
    vectors: tuple[Tensor | None, ...]
    parameter: tuple[int, ...]
    layout: Layout
    label: str

    @property
    def _blocked(self) -> tuple[Tensor, ...]:
        """The eigenvalues as [g, d]."""
        return tuple(value.reshape(self.layout.blocks, -1) for value in self.values)

    def spectrum(self) -> Tensor:
        """All eigenvalues of K, [g, d_1, ..., d_k]."""
        first, *others = self._blocked
        products = first
        for value in others:
            products = products.unsqueeze(-1) * value.reshape(len(value), *[1] * (products.ndim - 1), -1)
        return products

    def check_full_rank(self) -> None:
        """Refuse a singular factor: an eigenvalue ≤ d · eps · the largest one (a diagonal one is exact: only 0)."""
        for i, (value, vectors) in enumerate(zip(self._blocked, self.vectors, strict=True)):
            size = value.shape[1]
            slack = 0.0 if vectors is None else size * torch.finfo(value.dtype).eps
            ranks = (value > slack * value.amax(1, keepdim=True)).sum(1)
            if bool((ranks < size).any()):
                block = int((ranks < size).nonzero()[0])
                raise InputError(
                    f"{self.label}: factor {i} is singular: rank {int(ranks[block])} of {size} in block {block}; "
                    "give a positive damping"
                )

    def inverse(self, damping: float) -> KroneckerInverse:
        """(K + damping · I)^-1 exactly; one decomposition serves many dampings. Without damping K has to be regular."""
        check_damping(damping, self.label)
        if damping == 0:
            self.check_full_rank()
        reciprocals = (self.spectrum() + damping).reciprocal()
        if not bool(reciprocals.isfinite().all()):
            raise InputError(
                f"{self.label}: 1 / (smallest eigenvalue + damping {damping:g}) overflows {reciprocals.dtype}; "
                "raise the damping, or convert first: .to(torch.float64)"
            )
        return KroneckerInverse(reciprocals, self, damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(K + damping · I), a scalar."""
        check_damping(damping, self.label)
        if damping == 0:  # per factor: the products could leave the range of float32
            self.check_full_rank()
            size = math.prod(self.layout.sizes)
            return torch.stack([size / value.shape[1] * value.log().sum() for value in self._blocked]).sum()
        return (self.spectrum() + damping).log().sum()


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerInverse(LinearOperator):
    """(K + damping · I)^-1 = Q diag(eigenvalues) Qᵀ.

    eigenvalues    1 / (Λ + damping), [g, d_1, ..., d_k]
    eigen          the decomposition of K
    """

    eigenvalues: Tensor
    eigen: Eigen
    damping: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.eigen.parameter

    @property
    def _example(self) -> Tensor:
        return self.eigenvalues

    @property
    def label(self) -> str:
        return f"inverse of {self.eigen.label}"

    def _product(self, vectors: Tensor) -> Tensor:
        blocks = self.eigen.layout.blocks
        rotations = [(i, q.reshape(blocks, *q.shape[-2:])) for i, q in enumerate(self.eigen.vectors) if q is not None]
        parts = self.eigen.layout.split(vectors)
        for i, q in rotations:
            parts = along(q.mT, parts, i)
        parts = parts * self.eigenvalues.unsqueeze(1)
        for i, q in rotations:
            parts = along(q, parts, i)
        return self.eigen.layout.join(parts)

    def trace(self) -> Tensor:
        """Trace of the inverse, a scalar."""
        return self.eigenvalues.sum()

    def logdet(self) -> Tensor:
        """log det of the inverse, a scalar."""
        return self.eigenvalues.log().sum()

    def __repr__(self) -> str:
        sizes = "×".join(map(str, self.eigen.layout.sizes))
        return f"KroneckerInverse({self.label}, {self.eigen.layout.blocks} blocks of {sizes}, damping {self.damping:g})"
