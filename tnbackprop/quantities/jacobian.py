"""Derivatives of the model's output: they need no loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import COLUMN, COLUMN_COPY, Diagram, Leg, N, Product, Window
from .base import Quantity
from .propagation import Identity, Propagation


@dataclass(frozen=True)
class Jacobians(Quantity):
    """Jacobian of each sample's output f_n (C elements, row-major), shape [N, C, *p]: ∂f_n[c]/∂p. No loss needed."""

    name: str = "jacobians"

    @property
    def propagates(self) -> Propagation:
        return Identity(together=True)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (J.T @ g).ordered("n", COLUMN)


@dataclass(frozen=True)
class NTK(Quantity):
    """Empirical neural tangent kernel of each parameter, shape [N, C, N, C]; their sum is that of the model.

    [n, c, m, d] = ⟨∂f_n[c]/∂p, ∂f_m[d]/∂p⟩. No loss needed. Jacot et al. 2018, arXiv:1806.07572. `ntk` gives the sum,
    also between two batches.
    """

    name: str = "ntk"

    @property
    def propagates(self) -> Propagation:
        return Identity(together=True)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return _gram(J.T @ g).ordered("n", COLUMN, "m", COLUMN_COPY)


@dataclass(frozen=True)
class CrossNTK(NTK):
    """Empirical neural tangent kernel between the `first` samples of a batch and its M others, [C, C, first, M].

    [c, d, n, m] = ⟨∂f_n[c]/∂p, ∂f_{first+m}[d]/∂p⟩: the block of `NTK` off the diagonal, and nothing else of it. `ntk`
    calls it with two batches.
    """

    name: str = "cross_ntk"
    first: int = field(kw_only=True)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        gram = _gram(J.T @ g)
        n, m = gram.leg("n"), gram.leg("m")
        one, other = Leg("one", self.first), Leg("other", N - self.first)
        rows = Window(n, ((1, one),)), Window(m, ((1, other),), self.first)
        block = Diagram((*gram.legs, one, other), tuple(Product(p.scale, (*p.operands, *rows)) for p in gram.products))
        return block.sum("n", "m").ordered(COLUMN, COLUMN_COPY, "one", "other")


def _gram(V: Diagram) -> Diagram:
    """V Vᵀ for every pair of samples and columns."""
    return (V * V.relabel(n="m", **{COLUMN: COLUMN_COPY})).sum_parameter()
