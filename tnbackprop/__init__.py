"""tnbackprop: declare a layer once as an einsum formula, get every derivative quantity as plain PyTorch."""

from .errors import InputError, InvariantError, RuleError, TnError, UnsupportedError
from .front import compile, compute
from .approximate import Sharing
from .linalg import Damping, KroneckerFactors
from .quantities import (
    KFAC,
    KFLR,
    Fisher,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagGGNMC,
    GGNTrace,
    Grad,
    Propagation,
    Quantity,
    Scale,
    SecondMoment,
    Source,
    SqrtGGN,
    SqrtGGNMC,
    Variance,
)
from .rule import Root, Rule, Table
from .rules import RULES
from .runtime import Program, Result

__version__ = "0.1.0"

__all__ = [
    "KFAC", "KFLR", "RULES", "Damping", "Fisher", "KroneckerFactors", "Sharing", "BatchDot", "BatchGrad", "BatchL2", "DiagGGN", "DiagGGNMC", "GGNTrace", "Grad", "InputError",
    "InvariantError", "Program", "Propagation", "Quantity", "Result", "Root", "Rule", "RuleError", "Scale",
    "SecondMoment", "Source", "SqrtGGN", "SqrtGGNMC", "Table", "TnError", "UnsupportedError", "Variance", "compile",
    "compute",
]  # fmt: skip
