"""A symmetric matrix on the elements of one parameter, and how the parameter's legs meet the matrix's factors.

Inside, a batch of vectors is one tensor `parts` of legs [g, b, d_1, ..., d_k]: block, vector, one leg per factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Layout:
    """Where the legs of the row-major parameter go.

    legs       their sizes; the product is the number of elements, one axis of the parameter may be several legs
    factors    for every factor the positions in `legs` that it acts on, in its own row-major order
    The positions that no factor takes are the block-diagonal legs.
    """

    legs: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        taken = [position for positions in self.factors for position in positions]
        if len({*taken}) != len(taken) or not {*taken} <= {*range(len(self.legs))}:
            raise InputError(
                f"a layout's factors {self.factors} take each of the positions 0 to {len(self.legs) - 1} "
                f"of the legs {self.legs} at most once"
            )

    @property
    def block_positions(self) -> tuple[int, ...]:
        taken = {position for positions in self.factors for position in positions}
        return tuple(position for position in range(len(self.legs)) if position not in taken)

    @property
    def blocks(self) -> int:
        return math.prod(self.legs[position] for position in self.block_positions)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size d_i of every factor."""
        return tuple(math.prod(self.legs[position] for position in positions) for positions in self.factors)

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of [b, *legs] in the order of parts."""
        inner = (1 + position for positions in self.factors for position in positions)
        return (*(1 + position for position in self.block_positions), 0, *inner)

    def split(self, vectors: Tensor) -> Tensor:
        """[b, P] -> parts [g, b, d_1, ..., d_k]."""
        batch = len(vectors)
        return vectors.reshape(batch, *self.legs).permute(self._order).reshape(self.blocks, batch, *self.sizes)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`: parts -> [b, P]."""
        batch, order = parts.shape[1], self._order
        axes = (batch, *self.legs)
        back = sorted(range(len(order)), key=order.__getitem__)
        return parts.reshape([axes[axis] for axis in order]).permute(back).reshape(batch, math.prod(self.legs))


class LinearOperator(ABC):
    """A symmetric matrix on the elements of one parameter, known by its products."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape (the matrix is [P, P], P its number of elements)."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How errors name the operator."""

    @property
    @abstractmethod
    def _example(self) -> Tensor:
        """Any tensor with the operator's dtype and device."""

    @property
    def dtype(self) -> torch.dtype:
        return self._example.dtype

    @property
    def device(self) -> torch.device:
        return self._example.device

    @abstractmethod
    def _product(self, vectors: Tensor) -> Tensor:
        """[b, P] -> [b, P]."""

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector in the parameter's shape, or with a batch of them: [..., *shape] -> the same."""
        axes = vector.ndim - len(self.shape)
        if axes < 0 or tuple(vector.shape[axes:]) != self.shape:
            raise InputError(
                f"{self.label}: the vector has shape {list(vector.shape)}; give one of shape {list(self.shape)}, "
                "or several along leading axes"
            )
        if (vector.dtype, vector.device) != (self.dtype, self.device):
            raise InputError(
                f"{self.label}: the vector is {vector.dtype} on {vector.device}, the factors are {self.dtype} "
                f"on {self.device}; convert one of them with .to(...)"
            )
        batch = math.prod(vector.shape[:axes])
        return self._product(vector.reshape(batch, math.prod(self.shape))).reshape(vector.shape)

    def __matmul__(self, vector: Tensor) -> Tensor:
        return self.matvec(vector)

    def to_dense(self) -> Tensor:
        """The matrix for the row-major parameter, [P, P]."""
        size = math.prod(self.shape)
        return self._product(torch.eye(size, dtype=self.dtype, device=self.device)).mT


def along(matrices: Tensor, parts: Tensor, i: int) -> Tensor:
    """Multiply the leg d_i of parts [g, b, d_1, ..., d_k] by matrices [g, d_i, d_i], or by diagonals [g, d_i]."""
    moved = parts.movedim(2 + i, -1)
    if matrices.ndim == 2:
        product = moved * matrices.reshape(len(matrices), *[1] * (moved.ndim - 2), -1)
    else:  # the blocks lead, so that all vectors of a block are one matrix product
        product = (moved.flatten(1, -2) @ matrices.mT).reshape(moved.shape)
    return product.movedim(-1, 2 + i)


def check_damping(damping: float, label: str) -> None:
    if not 0 <= damping < math.inf:
        raise InputError(f"{label}: the damping {damping} is not a finite number ≥ 0")
