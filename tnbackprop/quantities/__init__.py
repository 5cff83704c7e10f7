"""Quantities: what is propagated and what is extracted, as algebra."""

from .base import Quantity, Scale
from .first_order import BatchDot, BatchGrad, BatchL2, Grad, SecondMoment, Variance

__all__ = ["BatchDot", "BatchGrad", "BatchL2", "Grad", "Quantity", "Scale", "SecondMoment", "Variance"]
