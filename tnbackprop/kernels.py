"""Kernels of a whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .api import compute
from .errors import InputError
from .quantities import NTK
from .quantities.jacobian import CrossNTK


def ntk(model: torch.nn.Module, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Empirical neural tangent kernel of all trainable parameters, [N, C, M, C]: ⟨∂f(x_n)[c]/∂θ, ∂f(x'_m)[d]/∂θ⟩.

    C are the elements of one sample's output, row-major. `other` is a second batch of M samples; without it, x itself.
    The two batches go through the model as one, then only their N times M pairs are multiplied. Jacot et al. 2018,
    arXiv:1806.07572. Raises `InputError` where the batches do not fit, and what `compile` raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model is {type(model).__name__}, not a torch.nn.Module")
    if other is not None and (other.shape[1:] != x.shape[1:] or other.dtype != x.dtype):
        raise InputError(
            f"the second batch has samples of shape {list(other.shape[1:])} and dtype {other.dtype}, the first of "
            f"{list(x.shape[1:])} and {x.dtype}: pass batches of the same kind of samples"
        )
    if other is not None and not (len(x) and len(other)):
        raise InputError(f"the kernel of {len(x)} with {len(other)} samples is empty: pass one of each at least")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "the model has no trainable parameters, so it has no tangent kernel: requires_grad_(True) on those it is of"
        )
    if other is None:
        return _sum(compute(model, None, (x, None), [NTK()])["ntk"])
    quantity = CrossNTK(first=len(x))
    return _sum(compute(model, None, (torch.cat([x, other]), None), [quantity])[quantity.name]).permute(2, 0, 3, 1)


def _sum(blocks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, *others = blocks.values()
    return sum(others, first)
