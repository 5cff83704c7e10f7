"""A symmetric matrix on all trainable parameters, known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self, overload

import torch
from torch import Tensor
from torch.func import vmap

from ..compiler.running.failure import lacks_derivative
from ..compiler.running.torch_quiet import UNWARNED
from ..compiler.translate.torch_modes import check_constant
from ..errors import InputError, UnsupportedError
from .parts import Parts, Reduction

Vector = Mapping[str, Tensor]
Multiply = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Recipe = Callable[[], tuple[Any, ...]]
"""What a product is made from once more where it is unpickled: a function and its arguments."""


class Blocks(Enum):
    """Which part of the matrix a product has: all of it, or one diagonal block per parameter and zeros elsewhere."""

    FULL = "full"
    PARAMETER = "parameter"


@dataclass(frozen=True, eq=False, repr=False)
class CurvatureProduct:
    """v -> M v for a symmetric matrix M [P, P] on the P elements of the trainable parameters, in the model's order.

    ``product(vector)``, or ``product @ vector``, with {name: [*p]}, {name: [..., *p]} (several vectors along leading
    axes), [P] (all parameters flattened, one after the other) or [P, K]; the result has the same form.
    M stays that of the parameters, the batch and the random draws with which it was made. It keeps the values of that
    forward pass. With `Blocks.PARAMETER` a call multiplies once per parameter. Many vectors are multiplied a few at a
    time on a CPU.

    Raises `InputError` where the vector does not fit, `UnsupportedError` where an operation has no second derivative.
    """

    label: str
    blocks: Blocks
    samples: int
    degree: int  # how often the factor of the loss is in it
    _theta: Mapping[str, Tensor]
    _multiply: Multiply
    _others: Mapping[str, str]  # other names of parameters -> why they have no entry
    _recipe: Recipe
    _parts: Callable[[], Parts | None]
    _at_once: int | None  # vectors; None: all

    def __deepcopy__(self, memo: object) -> CurvatureProduct:
        """Nothing in it changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """As model, loss, batch and what was drawn: where it is unpickled the model runs forward once more."""
        function, *arguments = self._recipe()
        return function, (self.label, self.blocks, *arguments)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._theta)

    @property
    def T(self) -> Self:
        """Itself: M is symmetric."""
        return self

    def parts(self) -> Parts | None:
        """Output and targets, sample by sample; None where these are not on axis 0. It runs the model once more."""
        return self._parts()

    def reduction(self) -> Reduction | None:
        """Whether the loss is the mean or the sum of those of its samples, told by two parts of the batch; else None.

        It runs the model once more.
        """
        ways = set[Reduction]() if (parts := self.parts()) is None else parts.ways()
        return ways.pop() if len(ways) == 1 else None

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(iter(self._theta.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next(iter(self._theta.values())).dtype

    @property
    def shape(self) -> tuple[int, int]:
        size = sum(p.numel() for p in self._theta.values())
        return size, size

    def __repr__(self) -> str:
        kind = "full" if self.blocks is Blocks.FULL else "one block per parameter"
        return f"CurvatureProduct({self.label}: {list(self.shape)}, {kind}, {len(self._theta)} parameters)"

    @overload
    def __call__(self, vector: Tensor) -> Tensor: ...

    @overload
    def __call__(self, vector: Vector) -> dict[str, Tensor]: ...

    def __call__(self, vector: Tensor | Vector) -> Tensor | dict[str, Tensor]:
        return self._flat(vector) if isinstance(vector, Tensor) else self._by_name(vector)

    __matmul__ = __call__

    def to_dense(self) -> Tensor:
        """M [P, P], by as many products at once: for small models."""
        return self._flat(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def _flat(self, vector: Tensor) -> Tensor:
        """[P] or [P, K], by way of the parameters."""
        size = self.shape[0]
        if len({(p.dtype, p.device) for p in self._theta.values()}) > 1:
            raise InputError(f"{self.label}: the parameters differ in dtype or device: give the vector by name")
        if vector.ndim not in (1, 2) or len(vector) != size:
            raise InputError(f"{self.label}: the vector has shape {list(vector.shape)}: give [{size}] or [{size}, K]")
        rows = vector.movedim(0, -1)
        pieces = torch.split(rows, [p.numel() for p in self._theta.values()], dim=-1)
        shapes = zip(pieces, self._theta.items(), strict=True)
        found = self._by_name({name: piece.reshape(*rows.shape[:-1], *p.shape) for piece, (name, p) in shapes})
        flat = [value.reshape(piece.shape) for value, piece in zip(found.values(), pieces, strict=True)]
        return torch.cat(flat, dim=-1).movedim(-1, 0)

    def _by_name(self, vector: Vector) -> dict[str, Tensor]:
        lead = self._leading_axes(vector)
        ordered = {name: vector[name].detach() for name in self._theta}
        count = math.prod(lead)
        if not count:
            return {name: torch.zeros_like(v) for name, v in ordered.items()}
        stacked = {name: v.reshape(count, *self._theta[name].shape) if lead else v for name, v in ordered.items()}
        try:
            with UNWARNED:
                several = vmap(self._multiply, chunk_size=self._at_once)
                found = (several if lead else self._multiply)(stacked)
        except RuntimeError as error:
            if not lacks_derivative(error):
                raise
            raise UnsupportedError(f"{self.label}: {error}. Write that operation with others of torch.") from error
        # Copies: a derivative may share memory, with the vector or with itself where it was expanded.
        return {name: value.detach().clone().reshape(ordered[name].shape) for name, value in found.items()}

    def _leading_axes(self, vector: Vector) -> tuple[int, ...]:
        """The axes before the parameters' own, which every entry has in common. Raises `InputError`."""
        if not isinstance(vector, Mapping):
            raise InputError(f"{self.label}: the vector is {type(vector).__name__}: give a tensor or {{name: tensor}}")
        for name in vector:
            if name not in self._theta:
                why = self._others.get(name, "is no parameter of the model")
                raise InputError(f"{self.label}: {name!r} {why}: give the vector for product.names and no other")
        lead = {name: self._lead(name, vector) for name in self._theta}
        first = next(iter(lead))
        for name, axes in lead.items():
            if axes != lead[first]:
                raise InputError(
                    f"{self.label}: {name!r} has the leading axes {list(axes)}, but {first!r} has {list(lead[first])}: "
                    "give as many vectors for every parameter"
                )
        return lead[first]

    def _lead(self, name: str, vector: Vector) -> tuple[int, ...]:
        p, v = self._theta[name], vector.get(name)
        if v is None:
            raise InputError(f"{self.label}: the vector has no {name!r}: give every parameter an entry, or zeros")
        if not isinstance(v, Tensor):
            raise InputError(f"{self.label}: the vector's {name!r} is {type(v).__name__}, not a tensor")
        if (v.dtype, v.device) != (p.dtype, p.device):
            raise InputError(
                f"{self.label}: the vector's {name!r} is {v.dtype} on {v.device}, but the parameter is {p.dtype} on "
                f"{p.device}: convert it with .to(...)"
            )
        check_constant(f"{self.label}: the vector's {name!r}", v)
        axes = v.ndim - p.ndim
        if axes < 0 or v.shape[axes:] != p.shape:
            raise InputError(
                f"{self.label}: the vector's {name!r} has shape {list(v.shape)}: give {list(p.shape)}, "
                "or several along leading axes"
            )
        return tuple(v.shape[:axes])
