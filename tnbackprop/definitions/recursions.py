"""What is propagated line by line: columns, the approximate diagonals of the Hessian, KFRA's matrix.

Each takes the dense Jacobians J of the lines, by torch.func, from the model's output back to all values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .lines import Sample


def columns(sample: Sample, start: Tensor) -> dict[str, Tensor]:
    """Jᵀ s at every value, [V, elements], for columns s [V, F] of the output."""
    found = {sample.output: start}
    for line in reversed(sample.lines):
        for name in line.reads:
            found[name] = found.get(name, 0) + found[line.name] @ sample.jacobian(line, name)
    return found


def diagonals(sample: Sample, gradient: Tensor, start: Tensor) -> dict[str, Tensor]:
    """h_u = (J∘J)ᵀ h_z + diag ∂²(g·z)/∂u² at every value, [elements], from h at the output.

    Elsayed & Mahmood 2022, arXiv:2210.11639; several uses of a value add.
    """
    g, found = columns(sample, gradient.unsqueeze(0)), {sample.output: start}
    for line in reversed(sample.lines):
        for name in line.reads:
            J = sample.jacobian(line, name)
            own = found[line.name] @ (J * J) + sample.curvature(line, name, g[line.name][0])
            found[name] = found.get(name, 0) + own
    return found


def averages(samples: Sequence[Sample], start: Tensor) -> dict[str, Tensor]:
    """Ḡ_u = (1/N) Σ_n J_nᵀ Ḡ_z J_n at every value with the batch, [elements, elements], blocks between values too.

    Botev et al. 2017, arXiv:1706.03662, from Ḡ [F, F] of the output.
    """
    first = samples[0]
    sampled = {line.name for line in first.lines if line.sampled}
    alive, K, found = [first.output], start, {}
    for k in reversed(range(len(first.lines))):
        line = first.lines[k]
        if line.name not in alive:
            continue
        sizes = [first.env[name].numel() for name in alive]
        before = dict(zip(alive, torch.split(torch.eye(sum(sizes), dtype=K.dtype), sizes), strict=True))
        z = before.pop(line.name)
        found[line.name] = z @ K @ z.T
        reads = [name for name in line.reads if name in sampled]
        after = list(dict.fromkeys([*before, *reads]))
        if not after:
            break
        each = [_moved(sample, k, reads, after, before, z) for sample in samples]
        K = torch.stack([M.T @ K @ M for M in each]).mean(0)
        alive = after
    return found


def _moved(
    sample: Sample, k: int, reads: list[str], after: list[str], before: Mapping[str, Tensor], z: Tensor
) -> Tensor:
    """What the values alive after a line are to those before it, [before, after]: J for its operands, else 1."""
    parts = []
    for name in after:
        part = before[name].T if name in before else z.new_zeros(z.shape[1], sample.env[name].numel())
        parts.append(part + z.T @ sample.jacobian(sample.lines[k], name) if name in reads else part)
    return torch.cat(parts, 1)
