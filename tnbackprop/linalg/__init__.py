"""Linear algebra on results: structured curvature blocks, in plain PyTorch."""

from .eigen import Eigen, KroneckerInverse
from .kronecker import Damping, Kind, KroneckerFactors
from .operator import Layout, LinearOperator

__all__ = ["Damping", "Eigen", "Kind", "KroneckerFactors", "KroneckerInverse", "Layout", "LinearOperator"]
