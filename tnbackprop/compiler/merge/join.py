"""Joins: how one tensor of a result joins those of other batches, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Way(Enum):
    """How values of batches join.

    ROWS     one after the other along their samples
    SUM      they add up; a mean is one, of values that each batch has over its own count
    MOMENTS  a mean of squared deviations from the mean: with that mean, which another result has
    SAME     every batch has the same
    REFUSED  not at all
    """

    ROWS = "rows"
    SUM = "sum"
    MOMENTS = "moments"
    SAME = "same"
    REFUSED = "refused"

    def __reduce_ex__(self, protocol: object) -> tuple[type[Way], tuple[str]]:
        """By its value, as newer versions of Python do it: torch.load takes no `getattr`."""
        return Way, (self.value,)


@dataclass(frozen=True)
class Mean:
    """What joins squared deviations c Σ_n (x_n - x̄)², c = factor·N^power: x̄ = over·N^(-less) of the value of `of`.

    degree  the powers of N and of the loss's scale that x_n has
    """

    of: str
    factor: float
    power: float
    over: float
    less: float
    degree: tuple[float, float]


@dataclass(frozen=True)
class Join:
    """How one tensor joins: a value of a batch has the factor N^power · s^loss, s the scale of the loss.

    axis  that of the samples
    even  only batches to whose samples the loss gives the same scale, but for N
    why   not
    """

    way: Way
    power: float = 0.0
    loss: float = 0.0
    axis: int = 0
    even: bool = False
    mean: Mean | None = None
    why: str = ""


Joins = Mapping[str, Mapping[str, tuple[Join, ...]]]
"""By quantity and parameter (or group): one for a tensor, one for each of several factors."""


@dataclass(frozen=True)
class Merging:
    """Of a program: its results, its loss, its outputs (None: no tensor).

    scale    the loss gives each sample N^scale, or of a mean over what is kept N^scale over the kept part
    divided  whether it is such a mean
    """

    joins: Joins
    loss: Join
    outputs: tuple[Join | None, ...]
    scale: float
    divided: bool


def refused(why: str) -> Join:
    return Join(Way.REFUSED, why=why)
