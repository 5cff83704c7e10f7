"""Loss Hessians with negative eigenvalues, which have no square root."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from torch import Tensor

from ..compiler.entered.definite import TOLERATED
from ..errors import InputError


class Indefinite(Enum):
    """What to do with a loss Hessian that has negative eigenvalues, where its square root is asked for."""

    REFUSE = "refuse"
    CLIP = "clip"


def check_definite(smallest: Iterable[Tensor]) -> None:
    """Raises `InputError` where a smallest eigenvalue, relative to the largest, is negative."""
    for each in smallest:
        if each < -TOLERATED:
            raise InputError(
                f"the loss Hessian is indefinite (a sample's smallest eigenvalue is {float(each):.3g} of its largest): "
                "it has no real square root, and the GGN is no longer one.\n  Use a loss that is convex in the output, "
                "ask for HessianDiag, or compile with indefinite=tn.Indefinite.CLIP."
            )
