"""What runs: the program, its checks and its result."""

from .program import Indefinite, Program
from .result import Result

__all__ = ["Indefinite", "Program", "Result"]
