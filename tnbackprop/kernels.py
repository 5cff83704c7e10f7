"""Kernels of a whole model."""

from __future__ import annotations

import torch

from .errors import InputError
from .front import compute
from .quantities import NTK


def ntk(model: torch.nn.Module, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """Empirical neural tangent kernel of all trainable parameters, [N, C, M, C]: ⟨∂f(x_n)[c]/∂θ, ∂f(x'_m)[d]/∂θ⟩.

    C are the elements of one sample's output, row-major. `other` is a second batch of M samples; without it, x itself.
    The two batches ride through the model as one, so the kernel is computed for all N + M samples and cut. Jacot et
    al. 2018, arXiv:1806.07572. Raises `InputError` where the batches do not fit, and what `compile` raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model is {type(model).__name__}, not a torch.nn.Module")
    if other is not None and (other.shape[1:] != x.shape[1:] or other.dtype != x.dtype):
        raise InputError(
            f"the second batch has samples of shape {list(other.shape[1:])} and dtype {other.dtype}, the first of "
            f"{list(x.shape[1:])} and {x.dtype}: pass batches of the same kind of samples"
        )
    both = x if other is None else torch.cat([x, other])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no trainable parameters, so it has no tangent kernel")
    blocks = list(compute(model, None, (both, None), [NTK()])["ntk"].values())
    whole = torch.stack(blocks).sum(0) if len(blocks) > 1 else blocks[0]
    return whole if other is None else whole[: len(x), :, len(x) :]
