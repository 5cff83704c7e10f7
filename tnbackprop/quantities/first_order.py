"""First-order quantities: what can be read off the individual gradients (Dangel et al. 2020, arXiv:1912.10985).

L is the loss as the user wrote it. With a loss that averages, L = (1/N) Σ_n ℓ_n; with one that sums, L = Σ_n ℓ_n.
`Scale.PAPER` is the paper's table, `Scale.UNSCALED` is in terms of the ∇ℓ_n alone, `Scale.BACKPACK` gives the numbers
of BackPACK 1.7.1, which works on the gradients as the loss scales them.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import Diagram, N, Scalar
from ..errors import InputError
from .base import Quantity, Scale


@dataclass(frozen=True)
class Grad(Quantity):
    """Gradient of the loss: ∇L, shape [*p]."""

    name: str = "grad"

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (J.T @ g).sum("n")


@dataclass(frozen=True)
class InputGrad(Quantity):
    """Gradient of the loss by the inputs, {input: ∂L/∂x, shape of x}: "x", or "x_0", "x_name" of a tuple or a dict.

    Those that are floating numbers and that the loss depends on. It is of no parameter.
    """

    name: str = "input_grad"

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        raise InputError(f"{self.name!r} is of no parameter")


@dataclass(frozen=True)
class BatchGrad(Quantity):
    """Individual gradients, shape [N, *p]: (1/N) ∇ℓ_n for a loss that averages, ∇ℓ_n for one that sums.

    `Scale.UNSCALED`: ∇ℓ_n for either.
    """

    name: str = "batch_grad"
    scale: Scale = Scale.PAPER

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        return (J.T @ g) * _linear(self.scale, g)


@dataclass(frozen=True)
class BatchL2(Quantity):
    """Squared norms of the individual gradients, shape [N]: ‖(1/N) ∇ℓ_n‖² for a loss that averages.

    `Scale.UNSCALED`: ‖∇ℓ_n‖².
    """

    name: str = "batch_l2"
    scale: Scale = Scale.PAPER

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        G = J.T @ g
        return (G * G).sum_parameter() * _linear(self.scale, g) ** 2


@dataclass(frozen=True)
class BatchDot(Quantity):
    """Pairwise dot products of the individual gradients, shape [N, N]: ⟨(1/N) ∇ℓ_n, (1/N) ∇ℓ_m⟩.

    `Scale.UNSCALED`: ⟨∇ℓ_n, ∇ℓ_m⟩.
    """

    name: str = "batch_dot"
    scale: Scale = Scale.PAPER

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        G = J.T @ g
        return (G * G.relabel(n="m")).sum_parameter() * _linear(self.scale, g) ** 2


@dataclass(frozen=True)
class SecondMoment(Quantity):
    """Uncentred second moment of the individual gradients, shape [*p]: (1/N) Σ_n [∇ℓ_n]², elementwise.

    `Scale.BACKPACK`: its `sum_grad_squared`, Σ_n [(1/N) ∇ℓ_n]² for a loss that averages, Σ_n [∇ℓ_n]² for a sum.
    """

    name: str = "second_moment"
    scale: Scale = Scale.PAPER

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        G = J.T @ g
        factor = sympy.Integer(1) if self.scale is Scale.BACKPACK else _mean_of_squares(g)
        return (G * G).sum("n") * factor


@dataclass(frozen=True)
class Variance(Quantity):
    """Variance of the individual gradients, shape [*p]: (1/N) Σ_n [∇ℓ_n - mean]², elementwise.

    Equal to (1/N) Σ_n [∇ℓ_n]² - [∇L]² for a loss that averages, and computed so where that is faster; where
    individual gradients are built for it, the mean is subtracted first. The difference cancels in float32 when the
    gradients hardly differ: ``centred=True`` always subtracts first.
    `Scale.BACKPACK`: the variance of the (1/N) ∇ℓ_n for a loss that averages, that is 1/N² of it; no other for a sum.
    """

    name: str = "variance"
    scale: Scale = Scale.PAPER
    centred: bool = False

    def extract(self, J: Uses, g: Cotangents) -> Diagram:
        G = J.T @ g
        D: Diagram = (G - G.sum("n") / N).part(materialized=self.centred, with_inner=True)
        factor = 1 / N if self.scale is Scale.BACKPACK else _mean_of_squares(g)
        return (D * D).sum("n") * factor


def _linear(scale: Scale, g: Cotangents) -> Scalar:
    return 1 / g.scale if scale is Scale.UNSCALED else sympy.Integer(1)


def _mean_of_squares(g: Cotangents) -> Scalar:
    """From Σ G² of the scaled gradients to the mean of the unscaled squares."""
    return 1 / (N * g.scale**2)
