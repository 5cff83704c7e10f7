"""Linear algebra on results: structured curvature blocks, in plain PyTorch."""

from torch.serialization import add_safe_globals

from .eigen import Eigen, KroneckerInverse
from .kronecker import Damping, Kind, KroneckerFactors
from .operator import Layout, LinearOperator

__all__ = ["Damping", "Eigen", "Kind", "KroneckerFactors", "KroneckerInverse", "Layout", "LinearOperator"]

add_safe_globals([Damping, Eigen, Kind, KroneckerFactors, KroneckerInverse, Layout])  # what torch.load takes as it is
