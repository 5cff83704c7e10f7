"""Products of curvature matrices with vectors, without the matrices: of a batch, and of all batches of a loader."""

from .make import fisher_product, ggn_product, hessian_product
from .over_data import OverData
from .parts import Reduction
from .product import Blocks, CurvatureProduct

__all__ = [
    "Blocks", "CurvatureProduct", "OverData", "Reduction", "fisher_product", "ggn_product", "hessian_product",
]  # fmt: skip
