"""Quantities: what is propagated and what is extracted, as algebra."""

from .base import Propagation, Quantity, Scale, Source, check_quantities
from .curvature import DiagGGN, DiagGGNMC, GGNGram, GGNTrace, SqrtGGN, SqrtGGNMC
from .first_order import BatchDot, BatchGrad, BatchL2, Grad, SecondMoment, Variance
from .hessian import BL89, HesScale, HessianDiag
from .jacobian import NTK, Jacobians
from .kronecker import KFAC, KFLR, KFRA, Bias, Fisher

__all__ = [
    "BL89", "KFAC", "KFLR", "KFRA", "NTK", "BatchDot", "BatchGrad", "BatchL2", "Bias", "DiagGGN", "DiagGGNMC",
    "Fisher", "GGNGram", "GGNTrace", "Grad", "HesScale", "HessianDiag", "Jacobians", "Propagation", "Quantity",
    "Scale", "SecondMoment", "Source", "SqrtGGN", "SqrtGGNMC", "Variance", "check_quantities",
]  # fmt: skip
