"""Quantities with torch code between their phases. The algebra alone, in `quantities`, needs no torch."""

from .weights import ClippedGrad, Clipping, NaturalGradientSMW

__all__ = ["ClippedGrad", "Clipping", "NaturalGradientSMW"]
