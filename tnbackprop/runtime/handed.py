"""HANDED: the loss of a program that is handed the cotangent of the model's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.capture.export import Wrapped, plain, takes_names
from ..compiler.capture.state import copied
from ..compiler.translate.torch_internals import alone
from ..errors import InputError, UnsupportedError
from ..quantities import Gradient, Quantity


class _Handed:
    """Σ ⟨cotangent, output⟩ over all floating tensors of the output: its gradient by them is the cotangent."""

    def __call__(self, output: Any, y: Any) -> Tensor:
        every = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        leaves = [leaf for leaf in every if leaf.is_floating_point()]
        cotangents = [c for c in pytree.tree_leaves(y) if c is not None]
        terms = [(leaf * cotangent).sum() for leaf, cotangent in zip(leaves, cotangents, strict=True)]
        total: Tensor = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def __repr__(self) -> str:
        return "tn.HANDED"

    def __reduce__(self) -> str:
        return "HANDED"


HANDED = _Handed()
"""``tn.compile(model, tn.HANDED, x, quantities)``: the program is called with the cotangent of the output for y."""


def with_cotangent(model: nn.Module, example: Any, quantities: Sequence[Quantity]) -> tuple[Any, Any]:
    """The example (x, cotangent) of a program that is handed the cotangent: random numbers like the output.

    Raises `UnsupportedError` for quantities that need the curvature of a loss.
    """
    for quantity in quantities:
        curved = [p for p in quantity.propagations if p.needs_loss and not isinstance(p, Gradient)]
        if curved:
            raise UnsupportedError(
                f"{quantity.name!r} propagates {type(curved[0]).__name__}, which needs the curvature of a loss: this "
                "program is handed the cotangent of the output; compile with the loss"
            )
    x = example[0] if isinstance(example, tuple | list) and len(example) == 2 and example[1] is None else example
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}, not a torch.nn.Module")
    wrapped = Wrapped(model, None, takes_names(model, x))
    with alone(), copied(wrapped), torch.no_grad():
        _, output = wrapped(plain(x), None)
    generator = torch.Generator().manual_seed(0)

    def like(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.randn(leaf.shape, generator=generator).to(leaf) if floating else None

    return x, pytree.tree_map(like, output)
