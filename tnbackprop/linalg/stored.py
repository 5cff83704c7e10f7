"""What `KroneckerFactors` hold: tensors, and what is to be said of them; checked, moved, saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from .kinds import ROWS, Kind, Role
from .operator import Joined, Layout, LinearOperator, Space, moved
from .state import from_plain, to_plain


@dataclass(frozen=True, eq=False, repr=False)
class Stored(LinearOperator):
    """The fields of `KroneckerFactors`, which says what they are."""

    factors: tuple[Tensor, ...]
    parameter: tuple[int, ...]
    kinds: tuple[Kind, ...] = ()
    assumption: str = ""
    layout: Layout | None = None
    name: str = ""
    roles: tuple[Role, ...] = ()
    joined: Joined | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        object.__setattr__(self, "parameter", tuple(self.parameter))
        object.__setattr__(self, "kinds", tuple(self.kinds) or (Kind.FULL,) * len(self.factors))
        object.__setattr__(self, "roles", tuple(self.roles) or (Role.UNKNOWN,) * len(self.factors))
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
        if not self.factors or {len(self.kinds), len(self.roles)} != {len(self.factors)}:
            raise InputError(
                f"{self.label}: {len(self.factors)} factors and {len(self.kinds)} kinds and {len(self.roles)} roles; "
                "give at least one factor, and one kind and role for each"
            )
        first = self.factors[0]
        for i, (factor, kind) in enumerate(zip(self.factors, self.kinds, strict=True)):
            row = ROWS[kind]
            if factor.ndim not in (row.axes, row.axes + 1) or not row.square(factor.shape) or factor.numel() == 0:
                raise InputError(f"{self._factor(i)}: a {kind.value} factor has shape {row.shapes}, without empty axes")
            if not factor.is_floating_point() or (factor.dtype, factor.device) != (first.dtype, first.device):
                raise InputError(
                    f"{self._factor(i)} is {factor.dtype} on {factor.device}; "
                    "all factors are of one real floating-point dtype and on one device"
                )
        if len({tuple(self._leading_axis(i)) for i in range(len(self.factors))}) > 1:
            raise InputError(
                f"{self.label}: the factors {[list(f.shape) for f in self.factors]} do not share their leading axis; "
                "give all of them the block axis g, or none"
            )

    def _leading_axis(self, i: int) -> torch.Size:
        """The block axis of factor i, [g] or []."""
        return self.factors[i].shape[: -ROWS[self.kinds[i]].axes]

    def _factor(self, i: int) -> str:
        role = f"{self.names[i]}, " if self.roles[i] is not Role.UNKNOWN else ""
        return f"{self.label}: factor {i} ({role}{self.kinds[i].value} {list(self.factors[i].shape)})"

    @property
    def space(self) -> Space:
        return Space(self.parameter, self.places, self.name, self.joined)

    @property
    def _example(self) -> Tensor:
        return self.factors[0]

    @property
    def label(self) -> str:
        return f"Kronecker factors of parameter {repr(self.name) + ' ' if self.name else ''}{list(self.parameter)}"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the factors: B, A, C by their roles, F where that is not said; A1, A2 where there are several."""
        letters = [role.value or "F" for role in self.roles]
        return tuple(
            letter if letters.count(letter) == 1 else f"{letter}{letters[: k + 1].count(letter)}"
            for k, letter in enumerate(letters)
        )

    @property
    def blocks(self) -> int:
        """The size of the block-diagonal leg g, 1 if there is none."""
        return math.prod(self._leading_axis(0))

    @property
    def places(self) -> Layout:
        """The layout; by default the legs (g, d_1, ..., d_k)."""
        default = Layout((self.blocks, *self._sizes), tuple((1 + i,) for i in range(len(self.factors))))
        return default if self.layout is None else self.layout

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(ROWS[kind].size(factor.shape) for factor, kind in zip(self.factors, self.kinds, strict=True))

    @property
    def shapes(self) -> list[list[int]]:
        """Of the factors, but for the rank of one that is low."""
        return [
            list(f.shape if kind is not Kind.LOW_RANK else f.shape[:-1])
            for f, kind in zip(self.factors, self.kinds, strict=True)
        ]

    @property
    def _blocked(self) -> tuple[Tensor, ...]:
        """The factors with the block axis, of size 1 if there is none: [g, ...]."""
        return tuple(f if self._leading_axis(i) else f.unsqueeze(0) for i, f in enumerate(self.factors))

    # As a value that is kept.

    def as_matrix_factors(self) -> tuple[Tensor, Tensor] | None:
        """(B [out, out], A [rest, rest]) for the row-major parameter as a matrix [out, rest]: K = B ⊗ A.

        With A = 1 for what has one factor (a bias, [out, 1]). None where the block is no such: another order of the
        axes (transposed convolutions, embeddings), several input factors, groups, factors that are not stored whole.
        The factors themselves, not copies.
        """
        first, *others = self.roles
        if self.layout is not None and self.places.order != tuple(range(len(self.places.legs))):
            return None
        if self._leading_axis(0) or {*self.kinds} != {Kind.FULL} or first is not Role.LOSS or len(others) > 1:
            return None
        if Role.LOSS in others or Role.RELATIVE in others:
            return None
        B, *rest = self.factors
        return B, rest[0] if rest else B.new_ones(1, 1)

    def as_full(self) -> Self:
        """The same with every factor stored whole, [d, d]."""
        rows = zip(self.factors, self._blocked, self.kinds, self._sizes, strict=True)
        whole = tuple(ROWS[k].full(b).reshape(*f.shape[: -ROWS[k].axes], d, d).clone() for f, b, k, d in rows)
        return replace(self, factors=whole, kinds=(Kind.FULL,) * len(whole))

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors, flat; `template.of(tensors)` builds them again."""
        return self.factors

    def clone(self) -> Self:
        """A copy in memory of its own."""
        return replace(self, factors=tuple(factor.clone() for factor in self.factors))

    def to(
        self, target: torch.dtype | torch.device | str | None = None, *, device: torch.device | str | None = None
    ) -> Self:
        """The factors in a dtype or on a device, as `Tensor.to`; both at once: `.to(torch.float64, device="cuda")`.

        Itself where it is there already.
        """
        found = tuple(moved(factor, target, device) for factor in self.factors)
        return self if all(a is b for a, b in zip(found, self.factors, strict=True)) else replace(self, factors=found)

    def state_dict(self) -> dict[str, Any]:
        """All of it as a dict of tensors, texts and numbers, for any torch.load; the factors themselves, no copies."""
        found: dict[str, Any] = to_plain(self)
        return found

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """What `state_dict` was taken of, in memory of its own. Raises `InputError` where something is missing."""
        return cls(**from_plain(cls, state)).clone()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the factors of a state, of any dtype and device, into self. Raises `InputError` for another block's."""
        other = type(self).from_state_dict(state).to(self.dtype, device=self.device)
        check_alike(self, other)
        for mine, theirs in zip(self.factors, other.factors, strict=True):
            if mine.shape != theirs.shape:
                raise InputError(
                    f"{self.label}: the state has {list(theirs.shape)} for a factor {list(mine.shape)}; build it anew: "
                    "from_state_dict(state)"
                )
            mine.copy_(theirs)


def check_alike(one: Stored, other: Stored) -> None:
    """Both are of one parameter and one quantity. Raises `InputError`."""
    if not isinstance(other, type(one)):
        raise InputError(f"{one.label}: a {type(other).__name__} is not of this kind; give a {type(one).__name__}")
    for what, mine, others in (
        ("parameter", one.parameter, other.parameter),
        ("kinds", [kind.value for kind in one.kinds], [kind.value for kind in other.kinds]),
        ("factors", one.shapes, other.shapes),
        ("layout", one.places, other.places),
        ("roles", list(one.names), list(other.names)),
        ("joined parameters", one.joined, other.joined),
        ("dtype", one.dtype, other.dtype),
        ("device", one.device, other.device),
        ("assumption", one.assumption, other.assumption),
    ):
        if mine != others:
            raise InputError(
                f"{one.label}: {what} {mine} and {others} differ; combine factors of one parameter "
                "and one quantity only"
            )
