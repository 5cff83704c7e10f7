"""Compared: for each kind of quantity what autograd has of it, and the same of the program's values. A row for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..compiler.running.magnitudes import largest, largest_difference, sum_of_squares
from ..quantities import (
    BL89,
    KFAC,
    KFLR,
    KFRA,
    NTK,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagGGNMC,
    GGNGram,
    GGNTrace,
    Grad,
    HesScale,
    HessianDiag,
    Jacobians,
    Quantity,
    Scale,
    SecondMoment,
    SqrtGGN,
    SqrtGGNMC,
    Variance,
)
from ..quantities.jacobian import CrossNTK
from .reference import SEED, NotComparedError, Reference

Values = Mapping[str, Any]
FIRST, ROOT, SECOND = "a derivative", "a root of the loss's Hessian", "a second derivative"


@dataclass(frozen=True)
class Pair:
    """A value, or a function of it, from the program and from autograd.

    size    what a difference is measured by, where that is more than the largest value
    """

    of: str
    parameter: str
    got: Tensor
    want: Tensor
    size: float = 0.0
    kind: str = FIRST

    @property
    def key(self) -> tuple[str, str]:
        return self.of, self.parameter

    @property
    def quantity(self) -> str:
        return self.of.partition(" (")[0]

    @cached_property
    def largest(self) -> float:
        """The largest finite value of autograd's."""
        found = largest(self.want)
        return found if math.isfinite(found) else float(self.want.abs().nan_to_num(nan=0.0, posinf=0.0).max())

    @cached_property
    def error(self) -> float:
        return error(self.got, self.want)


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference where autograd has a number."""
    if got.shape != want.shape and got.numel() != want.numel():
        return float("inf")
    got, want = (each.int() if each.dtype == torch.bool else each for each in (got, want))
    if math.isfinite(difference := largest_difference(got, want)):
        return difference
    off = (got.reshape(-1) - want.reshape(-1)).abs()[want.reshape(-1).isfinite()]
    return float(off.nan_to_num(nan=float("inf")).max()) if off.numel() else 0.0


Found = tuple[str, str, Tensor, Tensor, float]
"""Parameter, which part of its value, the program's, autograd's, size."""


def grad(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    for name, want in reference.gradient.items():
        yield name, "", got[name], want, 0.0


def batch_grad(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    for n, row in reference.rows.items():
        for name, want in row.items():
            yield name, f"sample {n}", got[name][n], _scaled(reference, quantity, got[name][n], want, 1), 0.0


def batch_l2(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    for n, row in reference.rows.items():
        for name, g in row.items():
            want = _scaled(reference, quantity, got[name][n], sum_of_squares(g), 2)
            yield name, f"sample {n}", got[name][n], want, 0.0


def batch_dot(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    at = list(reference.rows)
    for name in reference.parameters:
        rows = torch.stack([reference.rows[n][name].double().reshape(-1) for n in at])
        own = got[name][at][:, at]
        yield name, "", own, _scaled(reference, quantity, own, rows @ rows.T, 2), 0.0


def second_moment(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    for name, G in reference.individual.items():
        squares = G.double().square().sum(0)
        yield name, "", got[name], _moment(reference, quantity, got[name], squares, 1.0), 0.0


def variance(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """It cancels where the gradients hardly differ: a difference is measured by the second moment."""
    backpack = 1 / reference.size
    for name, G in reference.individual.items():
        D = G.double() - G.double().mean(0)
        want = _moment(reference, quantity, got[name], D.square().sum(0), backpack)
        whole = _moment(reference, quantity, got[name], G.double().square().sum(0), backpack)
        yield name, "", got[name], want, float(whole.abs().max())


def _moment(reference: Reference, quantity: Any, got: Tensor, squares: Tensor, backpack: float) -> Tensor:
    """Σ_n G_n² with the factor of the scale."""
    if quantity.scale is Scale.BACKPACK:
        return squares * backpack
    return _nearest(got, [squares / (reference.size * c**2) for c in reference.scales])


def _scaled(reference: Reference, quantity: Any, got: Tensor, want: Tensor, power: int) -> Tensor:
    if quantity.scale is not Scale.UNSCALED:
        return want
    return _nearest(got, [want / c**power for c in reference.scales])


def _nearest(got: Tensor, wants: list[Tensor]) -> Tensor:
    """Whether a loss counts as a mean or as a sum is not compared."""
    return min(wants, key=lambda want: error(got, want))


# -- columns


def jacobians(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """Σ_nc u[n, c] J[n, c] for a random u: one VJP."""
    u, want = _random_vjp(reference)
    for name, wanted in want.items():
        yield name, "times a vector", torch.tensordot(u, got[name].double().flatten(0, 1), 1), wanted, 0.0


def ntk(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """uᵀ Θ u = ‖Jᵀ u‖² for a random u."""
    u, want = _random_vjp(reference)
    for name, wanted in want.items():
        kernel = got[name].double().reshape(len(u), len(u))
        yield name, "times a vector, twice", u @ kernel @ u, wanted.double().square().sum(), 0.0


def cross_ntk(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """uᵀ Θ w = ⟨Jᵀ u, Jᵀ w⟩ for a random u of the first samples, and w of the others: two VJPs."""
    u, _ = _random_vjp(reference)
    both = u.reshape(reference.size, -1)
    first, others = both[: quantity.first], both[quantity.first :]
    halves = torch.cat([first, 0 * others]), torch.cat([0 * first, others])
    one, other = (reference.vjp([half.reshape(reference.ends[0].shape).to(reference.ends[0])]) for half in halves)
    for name in reference.parameters:
        value = torch.einsum("nc,cdnm,md->", first, got[name].double(), others)
        yield name, "times a vector, twice", value, (one[name].double() * other[name].double()).sum(), 0.0


def _random_vjp(reference: Reference) -> tuple[Tensor, Mapping[str, Tensor]]:
    """u [N C] in float64, and Jᵀ u."""
    if len(reference.ends) != 1 or reference.ends[0].shape[:1] != (reference.size,):
        raise NotComparedError("the model has not one output with the samples along axis 0")
    (end,) = reference.ends
    source = torch.Generator().manual_seed(SEED)
    u = torch.randn(end.shape, generator=source, dtype=torch.float64).to(end)
    return u.double().reshape(-1), reference.vjp([u])


def diag_ggn(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """All of it where there are few columns; else some entries, by a Jacobian-vector product each."""
    if reference.few_columns:
        for name, diagonal in reference.curvature.diagonal.items():
            yield name, "", got[name], diagonal if quantity.per_sample else diagonal.sum(0), 0.0
        return
    for name, want in reference.ggn_entries.items():
        value = got[name].reshape(reference.size if quantity.per_sample else 1, -1)[:, reference.entries[name]]
        yield name, "entries", value.T, want if quantity.per_sample else want.sum(1, keepdim=True), 0.0


def sqrt_ggn(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """A root has another one with turned columns: its squares are compared, and dᵀ V Vᵀ d for a random d."""
    if not reference.few_columns:
        for name, want in reference.ggn_entries.items():
            V = got[name].reshape(len(got[name]), reference.size, -1)[:, :, reference.entries[name]]
            yield name, "entries, squared", V.double().square().sum(0).T, want, 0.0
        return
    curvature = reference.curvature
    for name, d in reference.directions.items():
        V = got[name].double()
        yield name, "squared", V.square().sum(0), curvature.diagonal[name], 0.0
        along = (V.flatten(2) @ d.reshape(-1)).square().sum(0) if d.ndim else (V * d).square().sum(0)
        yield name, "times a vector", along, curvature.along[name], 0.0


def ggn_trace(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    for name, diagonal in reference.curvature.diagonal.items():
        yield name, "", got[name], diagonal.reshape(reference.size, -1).sum(1), 0.0


def ggn_gram(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    """The trace of each sample's block: columns may be turned."""
    for name, diagonal in reference.curvature.diagonal.items():
        gram = torch.einsum("vnvn->n", got[name].double())
        yield name, "trace", gram, diagonal.reshape(reference.size, -1).sum(1), 0.0


def hessian_diag(reference: Reference, quantity: Any, got: Values) -> Iterator[Found]:
    for name, want in reference.hessian_entries.items():
        at, value = reference.entries[name], got[name].double()
        value = value.sum(0) if quantity.per_sample else value
        yield name, "" if len(at) == value.numel() else "entries", value.reshape(-1)[at], want, 0.0


Row = Callable[[Reference, Any, Values], Iterator[Found]]

ROWS: Mapping[type[Quantity], Row] = {
    Grad: grad,
    BatchGrad: batch_grad,
    BatchL2: batch_l2,
    BatchDot: batch_dot,
    SecondMoment: second_moment,
    Variance: variance,
    Jacobians: jacobians,
    NTK: ntk,
    CrossNTK: cross_ntk,
    DiagGGN: diag_ggn,
    SqrtGGN: sqrt_ggn,
    GGNTrace: ggn_trace,
    GGNGram: ggn_gram,
    HessianDiag: hessian_diag,
}
KINDS: Mapping[type[Quantity], str] = {
    **dict.fromkeys((DiagGGN, SqrtGGN, GGNTrace, GGNGram), ROOT),
    HessianDiag: SECOND,
}

BY_ITS_WAY = "defined by its way through the model, not by autograd; tn.verify compares it line by line"
LEFT: Mapping[type[Quantity], str] = {
    SqrtGGNMC: "drawn",
    DiagGGNMC: "drawn",
    KFLR: BY_ITS_WAY,
    KFRA: BY_ITS_WAY,
    KFAC: BY_ITS_WAY,
    HesScale: BY_ITS_WAY,
    BL89: BY_ITS_WAY,
}
"""Why the others are not compared."""
UNKNOWN = "nothing here says what it must be (tn.verify may)"


def pairs_of(
    reference: Reference, quantities: Mapping[str, Quantity], values: Mapping[str, Values]
) -> tuple[list[Pair], dict[str, str]]:
    """What is compared of each quantity of each parameter; which quantities are not, and why."""
    found: list[Pair] = []
    left: dict[str, str] = {}
    for key, quantity in quantities.items():
        row = ROWS.get(type(quantity))
        if row is None:
            left[key] = LEFT.get(type(quantity), UNKNOWN)
            continue
        kind = KINDS.get(type(quantity), FIRST)
        try:
            for name, part, got, want, size in row(reference, quantity, values[key]):
                of = f"{key} ({part})" if part else key
                found.append(Pair(of, name, got, want.detach(), size, kind))
        except NotComparedError as reason:
            left[key] = str(reason)
        except RuntimeError as error:  # an operation without a second derivative, say
            left[key] = f"autograd has no such derivative: {(str(error).splitlines() or [''])[0]}"
    return found, left
