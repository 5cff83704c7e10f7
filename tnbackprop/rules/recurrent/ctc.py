"""Connectionist temporal classification (Graves et al. 2006), as its forward algorithm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...table import Table

TABLE = Table()
NEVER = -1e30
"""The logarithm of the probability of what cannot be: minus infinity would have no derivative."""


@TABLE.composite(torch.ops.aten.ctc_loss.Tensor)
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    """-log p(y) for each sample, log_probs [T, N, C], targets [N, S].

    The label is written with blanks around every class, y' = (-, y_1, -, …, y_S, -), and
    a_t(s) = log p_t(y'_s) + log Σ exp a_{t-1}(s, s - 1, and s - 2 where y'_s is a class other than y'_{s-2}).
    """
    length = 2 * targets.shape[1] + 1
    between = torch.full_like(targets, blank)
    written = F.pad(torch.stack([between, targets], 2).flatten(1), (0, 1), value=blank)
    chosen = log_probs.transpose(0, 1)
    chosen = chosen.gather(2, written.unsqueeze(1).expand(-1, log_probs.shape[0], -1))
    place = torch.arange(length, device=targets.device)
    skips = (written != blank) & (written != F.pad(written, (2, 0), value=blank)[:, :length]) & (place > 1)
    paths = torch.where(place < 2, chosen[:, 0], NEVER)
    for t in range(1, log_probs.shape[0]):
        one, two = (F.pad(paths, (k, 0), value=NEVER)[:, :length] for k in (1, 2))
        before = torch.stack([paths, one, torch.where(skips, two, NEVER)], 2).logsumexp(2)
        paths = torch.where((t < input_lengths).unsqueeze(1), before + chosen[:, t], paths)
    end = 2 * target_lengths.unsqueeze(1)
    total = torch.where((place == end) | (place == end - 1), paths, NEVER).logsumexp(1)
    possible = total > NEVER / 2
    each = torch.where(possible, -total, 0.0 if zero_infinity else float("inf"))
    if reduction == 1:
        return (each / target_lengths.clamp(min=1)).mean()
    return each.sum() if reduction else each
