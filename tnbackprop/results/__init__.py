"""What a program gives: values by quantity and parameter, and how they are put together."""

from .assemble import Blocks, Values, assemble, blocks, parameter_shapes
from .result import Axes, Result

__all__ = ["Axes", "Blocks", "Result", "Values", "assemble", "blocks", "parameter_shapes"]
