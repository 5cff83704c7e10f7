"""Which calls draw random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

MODES = ("train", "training")
CHANCES = ("p", "dropout_p", "dropout")


def draws(target: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws: dropout does neither outside of training nor with the probability 0."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    shut = any(arguments.get(mode) is False for mode in MODES)
    return not shut and not any(arguments.get(chance) == 0 for chance in CHANCES)
