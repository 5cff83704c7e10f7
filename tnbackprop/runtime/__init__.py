"""What runs: the program, its checks and its result."""

from ..results import Result
from .attached import Attached, attach
from .graphed import Graphed
from .halves import Halves, Saved
from .handed import HANDED
from .over import over
from .program import Indefinite, Program

__all__ = ["HANDED", "Attached", "Graphed", "Halves", "Indefinite", "Program", "Result", "Saved", "attach", "over"]
