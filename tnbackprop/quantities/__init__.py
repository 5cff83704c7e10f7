"""Quantities: what is propagated and what is extracted, as algebra."""

from .base import Quantity, Scale, check_quantities
from .curvature import DiagGGN, DiagGGNMC, GGNGram, GGNTrace, SqrtGGN, SqrtGGNMC
from .first_order import BatchDot, BatchGrad, BatchL2, Grad, SecondMoment, Variance
from .hessian import BL89, HesScale, HessianDiag
from .jacobian import NTK, Jacobians
from .kronecker import KFAC, KFLR, KFRA, Bias, Fisher
from .propagation import (
    Average,
    Diagonal,
    Draws,
    Elementwise,
    Exact,
    Gradient,
    Handed,
    Hessian,
    Identity,
    Output,
    Propagation,
    Residual,
)
from .total import Total

__all__ = [
    "BL89", "KFAC", "KFLR", "KFRA", "NTK", "Average", "BatchDot", "BatchGrad", "BatchL2", "Bias", "DiagGGN",
    "DiagGGNMC", "Diagonal", "Draws", "Elementwise", "Exact", "Fisher", "GGNGram", "GGNTrace", "Grad", "Gradient",
    "Handed", "HesScale", "Hessian", "HessianDiag", "Identity", "Jacobians", "Output", "Propagation", "Quantity",
    "Residual", "Scale", "SecondMoment", "SqrtGGN", "SqrtGGNMC", "Total", "Variance", "check_quantities",
]  # fmt: skip
