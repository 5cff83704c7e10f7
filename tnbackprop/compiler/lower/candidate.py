"""Candidates: the ways in which a lowering would compute a product. It says what is to be built; the planner builds it.

A row of the table of lowerings is ``(store, product, output legs) -> candidates``: an empty list where it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ...diagram.core import Diagram, Leg, Product
from ..program.expr import Ref
from ..program.store import Store

Legs = tuple[Leg, ...]


@dataclass(frozen=True)
class Candidate:
    """The parts that are built first, and what is made of their values."""

    finish: Callable[..., Made]
    parts: tuple[Diagram, ...] = ()


@dataclass(frozen=True)
class Then:
    """The cheapest of some candidates, and what is made of its value."""

    choices: tuple[Candidate, ...]
    finish: Callable[[Store, Ref], Made]


Made: TypeAlias = "Ref | Diagram | Candidate | Then"
"""A value, or what the planner goes on with: a diagram that it builds, another candidate, a choice."""
Lowering = Callable[[Store, Product, Legs], list[Candidate]]
