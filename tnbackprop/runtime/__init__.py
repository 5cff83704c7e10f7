"""What runs: the program, its checks and its result."""

from ..results import Result
from .graphed import Graphed
from .program import Indefinite, Program

__all__ = ["Graphed", "Indefinite", "Program", "Result"]
