"""What runs: the program, its checks and its result."""

from ..results import Result
from .graphed import Graphed
from .halves import Halves, Saved
from .handed import HANDED, HANDED_MEAN
from .indefinite import Indefinite
from .over import over
from .program import Program
from .projections import projections

__all__ = [
    "HANDED", "HANDED_MEAN", "Graphed", "Halves", "Indefinite", "Program", "Result", "Saved",
    "over", "projections",
]  # fmt: skip
