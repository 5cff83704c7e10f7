"""What runs one plan of a program, and what its values are made into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from ..compiler import Compiled
from ..compiler.emit.loaded import load
from ..compiler.merge.join import Merging
from ..results import Blocks, blocks, merged_by
from .halves import Halves


@dataclass(frozen=True)
class Loaded:
    """One plan: its function, the names of what that takes, what blocks are made of, how batches join, its halves."""

    function: Callable[..., Any]
    takes: frozenset[str]
    blocks: Mapping[str, Blocks]
    merging: Merging
    halves: Halves

    @classmethod
    def of(cls, title: str, quantities: Iterable[str], compiled: Compiled, valued: bool = True) -> Loaded:
        """`valued`   whether the value of the loss is a result"""
        function = load(compiled.source)
        found = {name: blocks(compiled, name) for name in quantities}
        takes, halves = frozenset(signature(function).parameters), Halves(compiled, title, valued)
        return cls(function, takes, found, merged_by(compiled, found), halves)
