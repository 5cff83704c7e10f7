"""Operators whose own kernel reads the batch size as a number, so that exporting them would fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .torch_internals import composite_kernel, is_in_data, shapes_by, traced_as

aten = torch.ops.aten
NONE, MEAN = 0, 1  # at::Reduction


def _cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """For probabilities older torch (2.11 is one) divides by their number as an int.

    For smoothed classes torch takes a mean of one part, and a sum by a number that it counts of the other.
    """
    axis, classes = min(1, input.ndim - 1), not target.is_floating_point()
    if classes and label_smoothing > 0:
        return _smoothed(input.log_softmax(axis), target, weight, reduction, ignore_index, label_smoothing)
    if input.shape != target.shape or classes or ignore_index >= 0:
        rest = weight, reduction, ignore_index, label_smoothing
        own: Tensor = composite_kernel(aten.cross_entropy_loss.default, input, target, *rest)
        return own
    target = target * (1 - label_smoothing) + label_smoothing / input.shape[axis]
    if weight is not None:
        target = target * weight.reshape(-1, *(1,) * (input.ndim - axis - 1))
    each = -(input.log_softmax(axis) * target).sum(axis)
    return each if reduction == NONE else each.mean() if reduction == MEAN else each.sum()


def _smoothed(
    log_p: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, smoothing: float
) -> Tensor:
    """The loss of classes, a part of each spread over all of them."""
    axis, counts = min(1, log_p.ndim - 1), target != ignore_index
    own = aten.nll_loss_nd.default(log_p, target, weight, NONE, ignore_index)
    weighted = log_p if weight is None else log_p * weight.reshape(-1, *(1,) * (log_p.ndim - axis - 1))
    spread = -weighted.sum(axis).masked_fill(~counts, 0) / log_p.shape[axis]
    each: Tensor = (1 - smoothing) * own + smoothing * spread
    if reduction != MEAN:
        return each if reduction == NONE else each.sum()
    return each.sum() / (counts if weight is None else weight[target.where(counts, 0)].where(counts, 0)).sum()


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """It takes another way for more than 25 rows."""
    found: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)
    return found


def _chain(tensors: Sequence[Tensor]) -> Tensor:
    """It looks for the best order."""
    product = tensors[0]
    for each in tensors[1:]:
        product = product @ each
    return product


def _nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN, ignore_index: int = -100
) -> Tensor:
    """Decomposing, torch calls a Python function of the same name whose arguments are others: it takes any mean."""
    loss: Tensor = aten.nll_loss_forward.default(input, target, weight, reduction, ignore_index)[0]
    return loss


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """It has no kernel for tensors without values: this has the shape."""
    each = log_probs.sum((0, 2))
    return each if reduction == NONE else each.sum()


def _ctc_of_numbers(*operands: object) -> Tensor:
    raise UnsupportedError(
        "ctc_loss with lengths as numbers is for one batch size.\n"
        "  Give them as tensors [N]: torch.full((x.shape[0],), steps)."
    )


KERNELS: dict[Any, Callable[..., Tensor]] = {
    aten.cross_entropy_loss.default: _cross_entropy_loss,
    aten.cdist.default: _cdist,
    aten.ctc_loss.Tensor: _ctc_loss,
    aten.ctc_loss.IntList: _ctc_of_numbers,
    aten.linalg_multi_dot.default: _chain,
    aten.chain_matmul.default: _chain,
    aten.nll_loss.default: _nll_loss,
}
"""The same values as the operator's own; the shape alone of one that is replaced by others afterwards (CTC)."""


def _shape_of_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN, *rest: Any
) -> Tensor:
    """A loss of classes or probabilities has one value for each column of classes, or one in all."""
    sizes = [tensor.shape[0] for tensor in (input, target) if tensor.ndim]
    if target.ndim and not any(map(is_in_data, sizes)) and sizes[0] != sizes[1]:
        raise RuntimeError(f"{input.shape[0]} samples of the input, and {target.shape[0]} of the target")
    return input.sum(min(1, input.ndim - 1)) if reduction == NONE else input.sum()


WHOLE: dict[Any, Callable[..., Tensor]] = {aten.cross_entropy_loss.default: _shape_of_loss}
"""The same shape and dtype: a third of the time of exporting a small model goes into shapes inside a cross-entropy."""


def _divided(own: Callable[..., Any], mode: Any, *operands: Any) -> Any:
    """A quotient of integers is no integer: PyTorch 2.7 takes it for one where the batch size is symbolic."""
    if any(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in operands):
        return own(mode, *operands)
    return own(mode, *(x.to(torch.get_default_dtype()) if isinstance(x, Tensor) else x for x in operands))


SHAPES: dict[Any, Callable[..., Any]] = {aten.div.Tensor: _divided}


@contextmanager
def shapes_only() -> Iterator[None]:
    """While active, tracing computes no more of an operator that stays one node than the shape of its value."""
    with traced_as(WHOLE):
        yield


@contextmanager
def symbolic_kernels() -> Iterator[None]:
    """While active, tracing runs these; the operator stays one node. Eager calls never see them."""
    with shapes_by(SHAPES), traced_as(KERNELS):
        yield
