"""What runs: the program, its checks and its result."""

from ..results import Result
from .attached import Attached, attach
from .graphed import Graphed
from .halves import Halves, Saved
from .handed import HANDED, HANDED_MEAN
from .indefinite import Indefinite
from .over import over
from .program import Program
from .projections import projections

__all__ = [
    "HANDED", "HANDED_MEAN", "Attached", "Graphed", "Halves", "Indefinite", "Program", "Result", "Saved", "attach",
    "over", "projections",
]  # fmt: skip
