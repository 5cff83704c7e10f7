"""Words in a picture: their width, which are set as mathematics, and the same in TeX. Pixels at 96 per inch."""

from __future__ import annotations

import re
import textwrap
from itertools import groupby

LINE = 16.0
"""Height of a line of text."""

_SIZE = 12.5
_NARROW, _SLIM, _WIDE = frozenset(" .,:;'|!ijl·′"), frozenset("()[]{}ftrI-/"), frozenset("mwMW=+−<>≈⊗→")
_SINGLE = re.compile(r"([^\W\d_])(\d*)(['′]*)")

_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ",
        "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon varphi "
        "chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega".split(),
        strict=True,
    )
)
_SYMBOLS = {
    "𝟙": r"\mathbf{1}", "∂": r"\partial ", "∇": r"\nabla ", "√": r"\surd ", "·": r"\cdot ", "−": "-", "-": "-",
    "⊗": r"\otimes ", "→": r"\to ", "≈": r"\approx ", "≤": r"\le ", "≥": r"\ge ", "×": r"\times ", "′": "'", "'": "'",
    "<": "<", ">": ">", "|": "|", "=": "=", "+": "+", "²": "{}^2", "³": "{}^3", "ᵀ": r"{}^\top ", "…": r"\ldots ",
} | {chr(ord("₀") + k): f"{{}}_{k}" for k in range(10)}  # fmt: skip
_MATH = _SYMBOLS | {letter: f"\\{name} " for letter, name in _GREEK.items()}
_SPECIAL = {c: "\\" + c for c in "_{}&%$#"} | {"^": r"\^{}", "~": r"\~{}", "\\": r"\textbackslash{}"}


def is_math(text: str) -> bool:
    """A single letter with digits or primes: i, W, n', s1."""
    return _SINGLE.fullmatch(text) is not None


def width(text: str, scale: float = 1.0) -> float:
    """An upper bound for the usual sans-serif fonts."""
    return scale * _SIZE * sum(_em(c) for c in text)


def _em(character: str) -> float:
    if character in _NARROW:
        return 0.34
    if character in _SLIM:
        return 0.42
    return 0.95 if character in _WIDE else 0.72 if character.isupper() else 0.63


def wrapped(text: str, characters: int = 44) -> tuple[str, ...]:
    """Lines of about so many characters."""
    return tuple(textwrap.wrap(text, characters, break_long_words=False, break_on_hyphens=False)) or ("",)


def tex(text: str) -> str:
    """The text for LaTeX: a single letter as mathematics, everything else upright with its symbols."""
    single = _SINGLE.fullmatch(text)
    if single:
        letter, digits, primes = single.groups()
        base = "\\" + _GREEK[letter] if letter in _GREEK else letter
        return f"${base}{f'_{{{digits}}}' if digits else ''}{len(primes) * chr(39)}$"
    runs = groupby(text, key=_MATH.__contains__)
    return "".join(
        f"${''.join(map(_MATH.__getitem__, run))}$" if math else "".join(_SPECIAL.get(c, c) for c in run)
        for math, run in runs
    )
