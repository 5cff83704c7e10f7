"""tnbackprop: declare a layer once as an einsum formula, get every derivative quantity as plain PyTorch."""

from .api import compile, compute
from .declare import REGISTRY, primitive, registered, rule
from .diagram.algebra import Cotangents, Uses
from .diagram.core import Diagram, N
from .drawing import Drawing, draw
from .errors import InputError, InvariantError, RuleError, TnError, UnsupportedError, VerificationError
from .generation import Generated, Target, generate
from .kernels import ntk
from .layer import EinsumLayer, einsum_layer
from .linalg import Damping, KroneckerFactors
from .notation.rule import Primitive, Root, Rule, Table
from .products import Blocks, CurvatureProduct, fisher_product, ggn_product, hessian_product
from .quantities import (
    BL89,
    KFAC,
    KFLR,
    KFRA,
    NTK,
    BatchDot,
    BatchGrad,
    BatchL2,
    Bias,
    DiagGGN,
    DiagGGNMC,
    Fisher,
    GGNGram,
    GGNTrace,
    Grad,
    HesScale,
    HessianDiag,
    Jacobians,
    Propagation,
    Quantity,
    Scale,
    SecondMoment,
    Source,
    SqrtGGN,
    SqrtGGNMC,
    Variance,
)
from .quantities.factors import Factors, Sharing
from .rules import RULES
from .rules.declared import Declared
from .runtime import Graphed, Indefinite, Program, Result
from .verification import Verification, verify
from .version import __version__ as __version__

__all__ = [
    "BL89",
    "KFAC",
    "KFLR",
    "KFRA",
    "NTK",
    "REGISTRY",
    "RULES",
    "BatchDot",
    "BatchGrad",
    "BatchL2",
    "Bias",
    "Blocks",
    "Cotangents",
    "CurvatureProduct",
    "Damping",
    "Declared",
    "DiagGGN",
    "DiagGGNMC",
    "Diagram",
    "Drawing",
    "EinsumLayer",
    "Factors",
    "Fisher",
    "GGNGram",
    "GGNTrace",
    "Generated",
    "Grad",
    "Graphed",
    "HesScale",
    "HessianDiag",
    "Indefinite",
    "InputError",
    "InvariantError",
    "Jacobians",
    "KroneckerFactors",
    "N",
    "Primitive",
    "Program",
    "Propagation",
    "Quantity",
    "Result",
    "Root",
    "Rule",
    "RuleError",
    "Scale",
    "SecondMoment",
    "Sharing",
    "Source",
    "SqrtGGN",
    "SqrtGGNMC",
    "Table",
    "Target",
    "TnError",
    "UnsupportedError",
    "Uses",
    "Variance",
    "Verification",
    "VerificationError",
    "compile",
    "compute",
    "draw",
    "einsum_layer",
    "fisher_product",
    "generate",
    "ggn_product",
    "hessian_product",
    "ntk",
    "primitive",
    "registered",
    "rule",
    "verify",
]  # fmt: skip
