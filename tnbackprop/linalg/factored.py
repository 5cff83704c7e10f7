"""The inverse of a Kronecker product whose factors are damped one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .kinds import ROWS, Kind

Name = Callable[[int], str]


def shifts(factors: Sequence[Tensor], kinds: Sequence[Kind], damping: float, name: Name) -> tuple[Tensor, Tensor]:
    """Which blocks are not zero, [g], and what is added to the diagonals of each factor, [k, g].

    With t_i = tr F_i / d_i it is π_i λ^(1/k), π_i = t_i / (t_1 ⋯ t_k)^(1/k). Factors as [g, ...].
    """
    diagonals = [ROWS[kind].diagonal(factor) for factor, kind in zip(factors, kinds, strict=True)]
    means = torch.stack([diagonal.mean(1) for diagonal in diagonals])
    for i, factor in enumerate(factors):
        if bool(((means[i] <= 0) & (factor != 0).flatten(1).any(1)).any()):
            raise InputError(
                f"{name(i)} is not positive semi-definite: it is not zero and its trace is "
                f"{means[i].min().item() * diagonals[i].shape[1]:.3g}; give a second-moment matrix"
            )
    alive = (means > 0).all(0)
    logs = torch.where(alive, means, 1).log()
    return alive, (logs - logs.mean(0)).exp() * damping ** (1 / len(factors))


def inverses(factors: Sequence[Tensor], kinds: Sequence[Kind], damping: float, name: Name) -> list[Tensor]:
    """(F_i + π_i λ^(1/k) I)^-1, each of its factor's own kind, as [g, ...].

    What fails in float32 is done in float64 and rounded. Raises `InputError` where that fails too.
    """
    alive, added = shifts(factors, kinds, damping, name)
    found = []
    for i, (factor, kind) in enumerate(zip(factors, kinds, strict=True)):
        living = factor * alive.reshape(-1, *[1] * (factor.ndim - 1))
        inverse, bad = ROWS[kind].inverse(living, added[i])
        if bool(bad.any()):
            block = int(bad.nonzero()[0])
            shift = added[i, block].item()
            raise InputError(
                f"{name(i)}, damped by {shift:.3g} in block {block}, is not positive definite in {factor.dtype}"
                f"{_condition(ROWS[kind].spectrum(living[block : block + 1]), shift)}; raise the damping {damping:g}"
                f"{'' if factor.dtype == torch.float64 else ', or convert first: .to(torch.float64)'}"
            )
        found.append(inverse)
    return found


def _condition(spectrum: Tensor, shift: float) -> str:
    """What the eigenvalues of the damped block say."""
    low, high = float(spectrum.min()) + shift, float(spectrum.max()) + shift
    number = f"condition {high / low:.3g}" if low > 0 else "no condition number"
    return f" (eigenvalues {low:.3g} to {high:.3g}, {number})"
