"""tnbackprop: declare a layer once as an einsum formula, get every derivative quantity as plain PyTorch."""

from .errors import InputError, InvariantError, RuleError, TnError, UnsupportedError
from .front import compile, compute
from .quantities import BatchDot, BatchGrad, BatchL2, Grad, Quantity, Scale, SecondMoment, Variance
from .rule import Rule, Table
from .rules import RULES
from .runtime import Program, Result

__version__ = "0.1.0"

__all__ = [
    "RULES", "BatchDot", "BatchGrad", "BatchL2", "Grad", "InputError", "InvariantError", "Program", "Quantity",
    "Result", "Rule", "RuleError", "Scale", "SecondMoment", "Table", "TnError", "UnsupportedError", "Variance",
    "compile", "compute",
]  # fmt: skip
