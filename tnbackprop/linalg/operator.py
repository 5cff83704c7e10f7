"""A symmetric matrix on the elements of one parameter, and how the parameter's legs meet the matrix's factors.

Inside, a batch of vectors is one tensor `parts` of legs [g, b, d_1, ..., d_k]: block, vector, one leg per factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError


class ByValue(Enum):
    """Members are pickled by their value, as newer versions of Python do it: torch.load takes no `getattr`."""

    def __reduce_ex__(self, protocol: object) -> tuple[Any, tuple[str]]:
        return type(self), (self.value,)


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
    def order(self) -> tuple[int, ...]:
        """The positions of all legs, those of the blocks first, then one factor's after the other's."""
        return (*self.block_positions, *(position for positions in self.factors for position in positions))

    @property
    def _axes(self) -> tuple[int, ...]:
        """The axes of [b, *legs] in the order of parts."""
        outer = len(self.block_positions)
        return (*(1 + position for position in self.order[:outer]), 0, *(1 + p for p in self.order[outer:]))

    def split(self, vectors: Tensor) -> Tensor:
        """[b, P] -> parts [g, b, d_1, ..., d_k]."""
        batch = len(vectors)
        return vectors.reshape(batch, *self.legs).permute(self._axes).reshape(self.blocks, batch, *self.sizes)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`: parts -> [b, P]."""
        batch, order = parts.shape[1], self._axes
        axes = (batch, *self.legs)
        back = sorted(range(len(order)), key=order.__getitem__)
        return parts.reshape([axes[axis] for axis in order]).permute(back).reshape(batch, math.prod(self.legs))


@dataclass(frozen=True)
class Joined:
    """A weight and its bias as one matrix [out, in + 1], the bias the last column.

    weight, bias         their names
    shape, bias_shape    their own shapes
    layout               which legs of the weight are `out`, and which `in`
    """

    weight: str
    bias: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...]
    layout: Layout

    def join(self, weight: Tensor, bias: Tensor) -> Tensor:
        """[..., *shape] and [..., *bias_shape] -> [..., out, in + 1]."""
        lead = weight.shape[: weight.ndim - len(self.shape)]
        batch = math.prod(lead)
        (matrices,) = self.layout.split(weight.reshape(batch, math.prod(self.shape)))
        found = torch.cat([matrices, bias.reshape(batch, -1, 1)], 2)
        return found.reshape(*lead, *found.shape[1:])

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`."""
        lead = matrix.shape[:-2]
        batch = math.prod(lead)
        rows = matrix.reshape(batch, *matrix.shape[-2:])
        weight = self.layout.join(rows[:, :, :-1].unsqueeze(0))
        return weight.reshape(*lead, *self.shape), rows[:, :, -1].reshape(*lead, *self.bias_shape)


@dataclass(frozen=True)
class Space:
    """What an operator acts on: the elements of one parameter, or those of a weight and its bias."""

    shape: tuple[int, ...]
    layout: Layout
    name: str = ""
    joined: Joined | None = None

    def __str__(self) -> str:
        return f"parameter {repr(self.name) + ' ' if self.name else ''}{list(self.shape)}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class LinearOperator(ABC):
    """A symmetric matrix on the elements of one parameter, known by its products."""

    __array_ufunc__ = None  # numpy would take it for an element of an array of objects

    @property
    @abstractmethod
    def space(self) -> Space:
        """What it acts on."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How errors name the operator."""

    @property
    @abstractmethod
    def _example(self) -> Tensor:
        """Any tensor with the operator's dtype and device."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape (the matrix is [P, P], P its number of elements)."""
        return self.space.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._example.dtype

    @property
    def device(self) -> torch.device:
        return self._example.device

    @property
    def T(self) -> Self:
        """Itself: it is symmetric."""
        return self

    @abstractmethod
    def _product(self, vectors: Tensor) -> Tensor:
        """[b, P] -> [b, P]."""

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector in the parameter's shape, or with a batch of them: [..., *shape] -> the same."""
        axes = self._leading(vector)
        if (vector.dtype, vector.device) != (self.dtype, self.device):
            raise InputError(
                f"{self.label}: the vector is {vector.dtype} on {vector.device}, the factors are {self.dtype} "
                f"on {self.device}; convert one of them with .to(...)"
            )
        batch = math.prod(vector.shape[:axes])
        return self._product(vector.reshape(batch, self.space.size)).reshape(vector.shape)

    def __matmul__(self, vector: Tensor | LinearOperator) -> Tensor:
        if isinstance(vector, LinearOperator):
            raise InputError(
                f"{self.label}: a product of two matrices is not symmetric, and none of this kind; "
                "apply one after the other, K @ (L @ v)"
            )
        return self.matvec(vector)

    def _leading(self, vector: Tensor) -> int:
        """How many axes are in front of the parameter's own."""
        if not isinstance(vector, Tensor):
            raise InputError(f"{self.label}: the vector is a {type(vector).__name__}; give a torch.Tensor")
        axes = vector.ndim - len(self.shape)
        if axes < 0 or tuple(vector.shape[axes:]) != self.shape:
            raise InputError(
                f"{self.label}: the vector has shape {list(vector.shape)}; give one of shape {list(self.shape)}, "
                "or several along leading axes"
            )
        return axes

    def to_dense(self) -> Tensor:
        """The matrix for the row-major parameter, [P, P]."""
        return self._product(torch.eye(self.space.size, dtype=self.dtype, device=self.device)).mT

    @property
    def parameters(self) -> tuple[str, ...]:
        """The name of the parameter, or those of a weight and the bias that is joined to it."""
        joined = self.space.joined
        return (self.space.name,) if joined is None else (joined.weight, joined.bias)

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [..., *its shape]} -> the vector that the operator multiplies, [..., *shape].

        Of one parameter its value; of a weight and a bias the matrix [..., out, in + 1]. Names of others may be there.
        """
        for name in self.parameters:
            if not isinstance(values, Mapping) or name not in values:
                raise InputError(f"{self.label}: there is no value of {name!r} to join; give {list(self.parameters)}")
        joined, (first, *rest) = self.space.joined, (values[name] for name in self.parameters)
        if joined is None:
            return first
        (bias,) = rest
        lead = first.shape[: first.ndim - len(joined.shape)]
        if first.shape != (*lead, *joined.shape) or bias.shape != (*lead, *joined.bias_shape):
            raise InputError(
                f"{self.label}: {joined.weight!r} {list(first.shape)} and {joined.bias!r} {list(bias.shape)} do not "
                f"join; give {list(joined.shape)} and {list(joined.bias_shape)}, or as many of both along leading axes"
            )
        return joined.join(first, bias)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`: [..., *shape] -> {name: [..., *its shape]}."""
        self._leading(vector)
        joined = self.space.joined
        parts = (vector,) if joined is None else joined.split(vector)
        return dict(zip(self.parameters, parts, strict=True))

    def _draw(self, generator: torch.Generator | None, lead: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, [*lead, *shape]."""
        if not isinstance(generator, torch.Generator | None):
            raise InputError(f"{self.label}: the generator {generator!r} is none; give a torch.Generator, or nothing")
        if generator is not None and generator.device.type != self.device.type:
            raise InputError(
                f"{self.label} is on {self.device}, the generator on {generator.device}; "
                f"give torch.Generator({self.device.type!r})"
            )
        return torch.randn((*lead, *self.shape), dtype=self.dtype, device=self.device, generator=generator)


def along(function: Callable[[Tensor], Tensor], parts: Tensor, i: int) -> Tensor:
    """Apply [g, m, d_i] -> [g, m, d] to the leg d_i of parts [g, b, d_1, ..., d_k]."""
    moved = parts.movedim(2 + i, -1)
    found = function(moved.flatten(1, -2))  # the blocks lead, so that all vectors of a block are one matrix product
    return found.reshape(*moved.shape[:-1], found.shape[-1]).movedim(-1, 2 + i)


def moved(tensor: Tensor, target: torch.dtype | torch.device | str | None, device: torch.device | str | None) -> Tensor:
    """A tensor on a device, in a dtype: itself where it is there already."""
    there = tensor if device is None else tensor.to(device)
    return there if target is None else there.to(target)


def one_number(value: object, what: str, label: str) -> float:
    """A number, or a tensor of one, as a float. Raises `InputError` for anything else."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InputError(f"{label}: the {what} has shape {list(value.shape)}; give one number")
    if not isinstance(value, Real | Tensor):
        raise InputError(f"{label}: the {what} {value!r} is not a number")
    return float(value)


def check_damping(damping: float, label: str) -> None:
    if not 0 <= one_number(damping, "damping", label) < math.inf:
        raise InputError(f"{label}: the damping {damping} is not a finite number ≥ 0")
