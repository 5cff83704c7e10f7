"""The Jacobian: a diagram with two groups of open legs."""

from __future__ import annotations

from dataclasses import dataclass

from .diagram import Diagram, Leg


@dataclass(frozen=True, slots=True)
class Jacobian:
    """d out / d into of one value by one operand, as a diagram.

    diagram  its legs are `out + into`, all names distinct
    out      the legs of the value, row-major
    into     the legs of the operand, row-major, with names of their own (ending in ')
    """

    diagram: Diagram
    out: tuple[Leg, ...]
    into: tuple[Leg, ...]
