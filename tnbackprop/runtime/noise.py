"""Noise: the random numbers that a program reads, drawn outside of the emitted function."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..compiler.program.cost import size_at
from ..compiler.program.expr import Value
from ..errors import InputError


def drawn(
    noises: Mapping[str, Value], batch: int, like: torch.Tensor, seed: int | None, generator: torch.Generator | None
) -> dict[str, torch.Tensor]:
    """Uniform numbers for every sampled root, of `generator`, of one seeded with `seed`, or of torch's own."""
    whole = (seed is None or is_seed(seed)) and isinstance(generator, torch.Generator | None)
    if not whole or None not in (seed, generator):
        raise InputError(
            f"seed={seed!r}, generator={generator!r}: give a whole number of 64 bits, or a torch.Generator"
        )
    if not noises:
        return {}
    dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
    if seed is not None:
        generator = torch.Generator(like.device).manual_seed(seed)
    shapes = {name: [size_at(s, batch) for s in value.shape] for name, value in noises.items()}
    return {
        name: torch.rand(shape, dtype=dtype, device=like.device, generator=generator) for name, shape in shapes.items()
    }


def is_seed(seed: object) -> bool:
    """Whether a generator takes it: a whole number of 64 bits."""
    return isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**64
