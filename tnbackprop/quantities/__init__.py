"""Quantities: what is propagated and what is extracted, as algebra."""

from .base import Quantity, Scale, check_quantities
from .curvature import DiagGGN, DiagGGNMC, GGNGram, GGNTrace, SqrtGGN, SqrtGGNMC
from .first_order import BatchDot, BatchGrad, BatchL2, Grad, InputGrad, SecondMoment, Variance
from .hessian import BL89, HesScale, HessianDiag
from .jacobian import NTK, Jacobians
from .kronecker import KFAC, KFLR, KFRA, Bias, Fisher
from .operands import (
    AxisMoments,
    DirectionalCurvature,
    DirectionalGrad,
    DirectionalRoot,
    ProjectedFactors,
    RotatedSecondMoment,
    Sketch,
    Structure,
    WeightedGrad,
)
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
    Labels,
    Output,
    Propagation,
    Residual,
    Sampler,
)
from .stream import Stream
from .total import Total

__all__ = [
    "BL89", "KFAC", "KFLR", "KFRA", "NTK", "Average", "AxisMoments", "BatchDot", "BatchGrad", "BatchL2", "Bias",
    "DiagGGN", "DiagGGNMC", "Diagonal", "DirectionalCurvature", "DirectionalGrad",
    "DirectionalRoot", "Draws", "Elementwise", "Exact", "Fisher", "GGNGram", "GGNTrace", "Grad", "Gradient", "Handed",
    "HesScale", "Hessian", "HessianDiag", "Identity", "InputGrad", "Jacobians", "Labels",
    "Output", "ProjectedFactors", "Propagation", "Quantity", "Residual", "RotatedSecondMoment", "Sampler", "Scale",
    "SecondMoment", "Sketch", "SqrtGGN", "SqrtGGNMC", "Stream", "Structure", "Total", "Variance", "WeightedGrad",
    "check_quantities",
]  # fmt: skip
