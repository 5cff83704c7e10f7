"""Tensor network pictures: diagram to scene (network, grid, place), model to scene (flow), scene to text."""

from .find import formulas, jacobian, quantity
from .picture import Drawing, draw

__all__ = ["Drawing", "draw", "formulas", "jacobian", "quantity"]
