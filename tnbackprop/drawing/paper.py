"""A scene as PNG or PDF: the SVG by cairosvg, which comes with the extra `pictures`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..errors import InputError
from .scene import Scene
from .svg import svg

SCALE = 2.0
"""Pixels of a PNG to one of the SVG."""


def png(scene: Scene) -> bytes:
    """The picture as PNG. Raises `InputError` where cairosvg or cairo is missing."""
    return _converter("svg2png")(bytestring=svg(scene).encode(), scale=SCALE)


def pdf(scene: Scene) -> bytes:
    """The picture as PDF. Raises `InputError` where cairosvg or cairo is missing."""
    return _converter("svg2pdf")(bytestring=svg(scene).encode())


def _converter(name: str) -> Callable[..., bytes]:
    what = f"a .{name[4:]} is made by cairosvg"
    try:
        found: Callable[..., bytes] = getattr(importlib.import_module("cairosvg"), name)
    except ModuleNotFoundError:
        hint = "pip install 'tnbackprop[pictures]', or save as .svg"
        raise InputError(f"{what}, which is not installed: {hint}") from None
    except OSError as error:  # the library of the system that it loads
        raise InputError(f"{what}, and that needs the cairo library of the system: {error}") from None
    return found
