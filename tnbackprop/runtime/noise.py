"""Noise: the random numbers that a program reads, drawn outside of the emitted function."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch

from ..compiler.program.cost import size_at
from ..compiler.program.expr import Value
from ..errors import InputError


def drawn(
    noises: Mapping[str, Value], batch: int, like: torch.Tensor, seed: int | None, generator: torch.Generator | None
) -> dict[str, torch.Tensor]:
    """Uniform numbers for every sampled root, of `generator`, of one seeded with `seed`, or of torch's own."""
    if seed is not None and generator is not None:
        raise InputError(f"seed={seed!r} and a generator: give one of them, as each says what is drawn")
    if not (seed is None or is_seed(seed)) or not isinstance(generator, torch.Generator | None):
        wrong = f"generator={generator!r}" if seed is None else f"seed={seed!r}"
        raise InputError(f"{wrong}: give seed= a whole number of 64 bits, or generator= a torch.Generator")
    if not noises:
        return {}
    dtype = torch.float32 if like.dtype.itemsize == 2 else like.dtype
    if seed is not None:
        generator = torch.Generator(like.device).manual_seed(int(seed))
    shapes = {name: [size_at(s, batch) for s in value.shape] for name, value in noises.items()}
    return {
        name: torch.rand(shape, dtype=dtype, device=like.device, generator=generator) for name, shape in shapes.items()
    }


def is_seed(seed: object) -> bool:
    """Whether a generator takes it: a whole number of 64 bits."""
    return isinstance(seed, int | numpy.integer) and not isinstance(seed, bool) and -(2**63) <= int(seed) < 2**64
