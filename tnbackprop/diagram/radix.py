"""Mixed radix: a window that counts a leg by several others, each index once, as a row-major view does."""

from __future__ import annotations

from .core import Leg, Window


def counted(image: Leg, digits: tuple[Leg, ...]) -> Window:
    """image = the row-major place of the digits; the first one is the outermost."""
    place, terms = 1, []
    for digit in reversed(digits):
        terms.append((place, digit))
        place *= int(digit.size)
    return Window(image, tuple(reversed(terms)))


def digits_of(window: Window) -> tuple[Leg, ...] | None:
    """The digits that count the image of a window, the outermost first; None where it is any other pattern."""
    if window.offset != 0 or len({leg for _, leg in window.terms}) != len(window.terms):
        return None
    digits = sorted(window.terms, key=lambda term: -term[0])
    place = 1
    for coefficient, leg in reversed(digits):
        if coefficient != place:
            return None
        place *= leg.size
    return tuple(leg for _, leg in digits) if place == window.image.size else None
