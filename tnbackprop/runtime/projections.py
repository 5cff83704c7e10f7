"""Projections: the operands of sketches, drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..quantities.operands import SKETCH
from .noise import is_seed
from .program import Program


def projections(program: Program, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Normal numbers for the projections that a program with `Sketch` reads: its operands, or some of them.

    Those of the first side of a parameter have variance 1 / size, so that E⟨sketch_n, sketch_m⟩ = ⟨∇ℓ_n, ∇ℓ_m⟩: of the
    parameter, and with ``tn.Total(tn.Sketch())`` of all together. The same seed is the same numbers.

    Raises `InputError` for a program without sketches.
    """
    keys = sorted(key for key in program.operands if key.startswith(SKETCH))
    if not keys:
        raise InputError("tn.projections: the program has no tn.Sketch: compile with one")
    if not is_seed(seed):
        raise InputError(f"tn.projections: seed={seed!r}: give a whole number of 64 bits")
    generator, parameters = torch.Generator("cpu").manual_seed(int(seed)), dict(program.model.named_parameters())
    found: dict[str, dict[str, Tensor]] = {}
    for key in keys:
        shapes: Any = program.operands[key]
        for name, shape in shapes.items():
            drawn = torch.randn(*map(int, shape), generator=generator, dtype=torch.float64, device="cpu")
            drawn = drawn / drawn.shape[-1] ** 0.5 if key == keys[0] else drawn
            found.setdefault(key, {})[name] = drawn.to(parameters[name])
    return found
