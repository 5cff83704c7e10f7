"""HANDED: the loss of a program that is handed the cotangent of the model's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.capture.export import Wrapped, batch_size, plain, takes_names
from ..compiler.capture.outputs import Fields, as_tree
from ..compiler.capture.state import copied
from ..compiler.translate.torch_internals import alone
from ..compiler.translate.torch_modes import device_of_module, own_dtypes
from ..errors import InputError, UnsupportedError
from ..quantities import Gradient, Quantity


@dataclass(frozen=True)
class Handed:
    """Σ ⟨cotangent, output⟩ over all floating tensors of the output: its gradient by them is the cotangent.

    mean  the loss is a mean over samples, (1/N) Σ_n ℓ_n: a sample's cotangent is that of ℓ_n over N
    """

    mean: bool = False

    def __call__(self, output: Any, y: Any) -> Tensor:
        every = (leaf for leaf in pytree.tree_leaves(as_tree(output)) if isinstance(leaf, Tensor))
        leaves = [leaf for leaf in every if leaf.is_floating_point()]
        cotangents = [c for c in pytree.tree_leaves(y) if c is not None]
        terms = [self._term(leaf, cotangent) for leaf, cotangent in zip(leaves, cotangents, strict=True)]
        total: Tensor = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _term(self, leaf: Tensor, cotangent: Tensor) -> Tensor:
        return (leaf * (cotangent * leaf.shape[0])).mean(0).sum() if self.mean else (leaf * cotangent).sum()

    def __repr__(self) -> str:
        return "tn.HANDED_MEAN" if self.mean else "tn.HANDED"


HANDED = Handed()
"""``tn.compile(model, tn.HANDED, x, quantities)``: the program is called with the cotangent of the output for y, that
of a loss which sums over samples: the gradient of ℓ_n is what arrives at sample n."""
HANDED_MEAN = Handed(mean=True)
"""The same of a loss that is a mean over samples: the gradient of ℓ_n is N times what arrives at sample n."""


def with_cotangent(model: nn.Module, example: Any, quantities: Sequence[Quantity]) -> tuple[Any, Any]:
    """The example (x, cotangent) of a program that is handed the cotangent: random numbers like the output.

    Raises `UnsupportedError` for quantities that need the curvature of a loss.
    """
    for quantity in quantities:
        if curved := [p for p in quantity.propagations if p.needs_loss and not isinstance(p, Gradient)]:
            raise UnsupportedError(
                f"{quantity.name!r} propagates {type(curved[0]).__name__}, which needs the curvature of a loss: this "
                "program is handed the cotangent of the output; compile with the loss"
            )
    x = example[0] if isinstance(example, tuple | list) and len(example) == 2 and example[1] is None else example
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}, not a torch.nn.Module")
    wrapped = Wrapped(model, None, takes_names(model, x))
    with alone(), own_dtypes(device_of_module(model)), copied(wrapped), torch.no_grad():
        try:
            _, output = wrapped(plain(x), None)
        except TypeError as error:
            raise InputError(
                f"the model fails on the example: {error}\n  With loss=tn.HANDED the example is x alone: the cotangent "
                "of the output takes the place of y."
            ) from error
    parts = pytree.tree_leaves(output, is_leaf=lambda part: isinstance(part, Fields))
    if any(isinstance(part, Fields) for part in parts):
        raise UnsupportedError(
            "the model returns an object of a class of its own, and a cotangent that is handed in is a tensor, a tuple "
            "or a dict, as the output is.\n  Return one of these, or compile with the loss."
        )
    floating = {
        f"output{pytree.keystr(path)}": list(leaf.shape)
        for path, leaf in pytree.tree_flatten_with_path(output)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    if not floating:
        raise UnsupportedError("the model has no output of floating numbers, so there is no cotangent to hand in")
    batch = batch_size((plain(x), None))
    for name, shape in floating.items():
        if shape[:1] != [batch]:
            raise UnsupportedError(
                f"{name} has shape {shape}, and a cotangent that is handed in has the {batch} samples on axis 0.\n"
                "  Wrap the model in one that returns the samples first, or compile with the loss."
            )
    generator = torch.Generator().manual_seed(0)

    def like(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return torch.randn(leaf.shape, generator=generator).to(leaf) if floating else None

    return x, pytree.tree_map(like, output)
