"""Roots: which columns a Gauss-Newton quantity is made of, all of them, drawn ones, or the gradients of the labels.

``tn.DiagGGN(root=tn.Draws(4))`` is `DiagGGNMC`, ``tn.KFLR(root=tn.Labels())`` is the empirical `KFAC`; what has no name
of its own is a class of its own here, of which nothing says that it is the exact one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from .base import Quantity
from .curvature import DiagGGN, DiagGGNMC, GGNGram, GGNTrace, SqrtGGN, SqrtGGNMC
from .kronecker import KFAC, KFLR, Fisher
from .operands import DirectionalCurvature, DirectionalRoot
from .propagation import Draws, Exact, Labels


@dataclass(frozen=True)
class OtherSqrt(SqrtGGN):
    """Of the gradients of the labels, given or drawn by a sampler."""


@dataclass(frozen=True)
class OtherDiag(DiagGGN):
    """Of the gradients of the labels, given or drawn by a sampler."""


@dataclass(frozen=True)
class OtherFactors(KFLR):
    """Of columns from labels that a sampler draws."""


@dataclass(frozen=True)
class OtherTrace(GGNTrace):
    """Of drawn columns, or the gradients of the labels."""


@dataclass(frozen=True)
class OtherGram(GGNGram):
    """Of drawn columns, or the gradients of the labels."""


@dataclass(frozen=True)
class OtherAlong(DirectionalRoot):
    """Of drawn columns, or the gradients of the labels."""


@dataclass(frozen=True)
class OtherCurvature(DirectionalCurvature):
    """Of drawn columns, or the gradients of the labels."""


OTHERS: dict[type[Quantity], type[Quantity]] = {
    SqrtGGN: OtherSqrt,
    DiagGGN: OtherDiag,
    KFLR: OtherFactors,
    GGNTrace: OtherTrace,
    GGNGram: OtherGram,
    DirectionalRoot: OtherAlong,
    DirectionalCurvature: OtherCurvature,
}


def resolved(quantities: Iterable[Quantity]) -> list[Quantity]:
    """The quantities under the names of their classes: what is drawn is one that is drawn."""
    return [_resolved(quantity) for quantity in quantities]


def _resolved(quantity: Quantity) -> Quantity:
    root, kind = getattr(quantity, "root", None), type(quantity)
    if root is None or isinstance(root, Exact):
        return quantity
    drawn = root.samples if isinstance(root, Draws) and root.sampler is None else 0
    if drawn and kind is DiagGGN and isinstance(quantity, DiagGGN):
        return DiagGGNMC(quantity.name, quantity.per_sample, drawn)
    if drawn and kind is SqrtGGN:
        return SqrtGGNMC(quantity.name, drawn)
    if (drawn or isinstance(root, Labels)) and kind is KFLR:
        own = {name: getattr(quantity, name) for name in ("sharing", "bias", "largest", "strict")}
        return KFAC(quantity.name, drawn, **own) if drawn else KFAC(quantity.name, fisher=Fisher.EMPIRICAL, **own)
    if kind in OTHERS:
        return OTHERS[kind](**{field.name: getattr(quantity, field.name) for field in fields(quantity)})
    return quantity
