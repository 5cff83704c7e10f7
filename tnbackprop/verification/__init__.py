"""Verification: rules, models and programs against torch.func in float64; oracle.py knows nothing of the compiler."""

from ..definitions.report import LeftOut, Row, Verification
from .verify import verify

__all__ = ["LeftOut", "Row", "Verification", "verify"]
