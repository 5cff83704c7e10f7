"""What runs: the program, its checks and its result."""

from .graphed import Graphed
from .program import Indefinite, Program
from .result import Result

__all__ = ["Graphed", "Indefinite", "Program", "Result"]
