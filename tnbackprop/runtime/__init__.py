"""What runs: the program, its checks and its result."""

from .program import Program
from .result import Result

__all__ = ["Program", "Result"]
