"""Embedding bags: a program has those of one size, where the k-th bag is that of the k-th sample."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ...errors import UnsupportedError
from ..translate.inplace import nodes_of

aten = torch.ops.aten


def refuse_ragged(program: GraphModule) -> None:
    """Offsets must count in equal steps, as those of a matrix of indices do: others may be data."""
    for node in nodes_of(program):
        if node.target is aten.embedding_bag.padding_idx and (node.args[7] or not _even(node.args[2], node.args[1])):
            raise UnsupportedError(
                "an embedding_bag whose bags may differ in size: a program has one bag of one size for each sample.\n"
                "  Give the indices as a matrix [N, size] (padding_idx leaves entries out), without offsets."
            )


def _even(offsets: object, indices: object) -> bool:
    """Whether they are 0, k, 2k, … up to the number of indices."""
    if not isinstance(offsets, Node) or not isinstance(indices, Node) or offsets.target is not aten.arange.start_step:
        return False
    start, _, step = offsets.args[:3]
    bags, total = offsets.meta["val"].shape[0], indices.meta["val"].shape[0]
    return bool(start == 0 and isinstance(step, int) and bags * step == total)
