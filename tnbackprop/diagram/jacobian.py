"""The Jacobian: a diagram with two groups of open legs."""

from __future__ import annotations

from dataclasses import dataclass

from .core import Diagram, Leg


@dataclass(frozen=True, slots=True)
class Unit:
    """An axis of size 1 of an operand: no leg is left of it, but it is one of the value, or of what the operand meets.

    axis    its place among all axes of the operand as the rule reads them
    output  whether the value has it
    met     names of the other operands that have it
    """

    axis: int
    output: bool
    met: frozenset[str]


@dataclass(frozen=True, slots=True)
class Jacobian:
    """d out / d into of one value by one operand, as a diagram.

    diagram  its legs are `out + into`, all names distinct
    out      the legs of the value, row-major
    into     the legs of the operand, row-major, with names of their own (ending in ')
    units    the operand's axes of size 1, where the value is that of one line
    """

    diagram: Diagram
    out: tuple[Leg, ...]
    into: tuple[Leg, ...]
    units: tuple[Unit, ...] = ()
