"""Derivatives of the model's output: they need no loss."""

from __future__ import annotations

from dataclasses import dataclass

from ..algebra import Cotangents, Uses
from ..diagram import COLUMN, COLUMN_COPY, Diagram
from .base import Propagation, Quantity, Source


@dataclass(frozen=True)
class Jacobians(Quantity):
    """Jacobian of each sample's output f_n (C elements, row-major), shape [N, C, *p]: ∂f_n[c]/∂p. No loss needed."""

    name: str = "jacobians"

    @property
    def propagates(self) -> Propagation:
        return Propagation(Source.IDENTITY, together=True)

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
        return Propagation(Source.IDENTITY, together=True)

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        V = J.T @ g
        gram = (V * V.relabel(n="m", **{COLUMN: COLUMN_COPY})).sum_parameter()
        return gram.ordered("n", COLUMN, "m", COLUMN_COPY)
