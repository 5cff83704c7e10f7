"""Generate: a layer's or a model's derivative quantities as one file of source that runs without this library."""

from .front import generate
from .generated import Generated, Target

__all__ = ["Generated", "Target", "generate"]
