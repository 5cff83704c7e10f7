"""Linear algebra on results: structured curvature blocks, in plain PyTorch."""

from torch.serialization import add_safe_globals

from .eigen import Eigen, Spectral
from .kinds import Kind, Role
from .kronecker import Damping, KroneckerFactors, Template
from .operator import Joined, Layout, LinearOperator, Space

__all__ = [
    "Damping", "Eigen", "Joined", "Kind", "KroneckerFactors", "Layout", "LinearOperator", "Role", "Space", "Spectral",
    "Template",
]  # fmt: skip

add_safe_globals(  # what torch.load takes as it is
    [Damping, Eigen, Joined, Kind, KroneckerFactors, Layout, Role, Space, Spectral, Template]
)
