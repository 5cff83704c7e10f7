"""Derivatives of derivatives that keep little: cross-entropy in closed form, and values that nobody reads.

Of cross-entropy what is kept is the input alone:

L = Σ w (logsumexp f - f_y) / divisor, ∂L/∂f = w (p - onehot(y)) / divisor, ∂²L/∂f² v = w p ∘ (v - pᵀ v) / divisor, with
p = softmax(f). torch keeps several values as large as f for the product with the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class ClosedForm(TorchFunctionMode):
    """While it is open, `F.cross_entropy` of class indices without label smoothing has these derivatives."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_cross_entropy if func is F.cross_entropy else func)(*args, **(kwargs or {}))


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    own = input.ndim > 1 and target.ndim == input.ndim - 1 and not target.is_floating_point() and not label_smoothing
    if not own or size_average is not None or reduce is not None or (weight is not None and weight.requires_grad):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )  # fmt: skip
    found: Tensor = _Loss.apply(input, target, weight, ignore_index, reduction)  # type: ignore[no-untyped-call]
    return found


def _shares(
    input: Tensor, target: Tensor, weight: Tensor | None, ignored: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """The class of each position, and its weight over the divisor: 0 where it is ignored."""
    kept = target != ignored
    label = target.masked_fill(~kept, 0)
    share = kept.to(input.dtype) if weight is None else weight[label] * kept
    return label, share / (share.sum() + (~kept).all()) if reduction == "mean" else share


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, ignored: int, reduction: str) -> Tensor:
        return F.cross_entropy(input, target, weight, ignore_index=ignored, reduction=reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        found: Tensor = _Slope.apply(*ctx.saved_tensors, *ctx.options, *cotangents)  # type: ignore[no-untyped-call]
        return found, None, None, None, None


class _Slope(torch.autograd.Function):
    """The cotangent of the input, from that of the loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, ignored: int, reduction: str, cotangent: Tensor
    ) -> Tensor:
        label, share = _shares(input, target, weight, ignored, reduction)
        by = (share * cotangent).unsqueeze(1)
        return (torch.softmax(input, 1) * by).scatter_add_(1, label.unsqueeze(1), -by)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *options, cotangent = inputs[3:]
        ctx.save_for_backward(*inputs[:3], cotangent)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        (v,), (input, target, weight, cotangent) = vectors, ctx.saved_tensors
        label, share = _shares(input, target, weight, *ctx.options)
        p = torch.softmax(input, 1)
        found = p * v
        inner = found.sum(1, keepdim=True)
        along = None
        if ctx.needs_input_grad[-1]:
            along = share * (inner - v.gather(1, label.unsqueeze(1))).squeeze(1)
            along = along.sum() if cotangent.ndim == 0 else along
        found = found.addcmul_(p, inner, value=-1).mul_((share * cotangent).unsqueeze(1))
        return found, None, None, None, None, along


def hessian_at(loss: Callable[[Any], Tensor], output: Any) -> Callable[[Any], Any]:
    """u -> Hu, H the Hessian of a loss at some output."""
    pull = vjp(lambda f: pytree.tree_map(_Unread.apply, grad(loss)(f)), output)[1]
    return lambda u: pull(u)[0]


class _Unread(torch.autograd.Function):
    """Of the shape and with the derivative of a value, but without its memory: its VJP is all that is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.new_zeros(()).expand(value.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0]
