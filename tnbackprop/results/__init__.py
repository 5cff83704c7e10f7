"""What a program gives: values by quantity and parameter, how they are put together, and how batches join."""

from .assemble import Blocks, Values, assemble, blocks, merged_by
from .batch import Batch, shown
from .merger import Merger
from .result import Axes, Result

__all__ = [
    "Axes", "Batch", "Blocks", "Merger", "Result", "Values", "assemble", "blocks", "merged_by",
    "shown",
]  # fmt: skip
