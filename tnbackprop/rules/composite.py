"""Operators made of others, which are captured in their place: attention, some losses and moves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..notation.rule import Rule
from ..table import Composite, Table
from .writing.text import access, broadcast_sizes

TABLE = Table()
aten = torch.ops.aten

# what PyTorch itself makes of others
for _target in (
    aten.tile.default, aten.fliplr.default, aten.flipud.default, aten.concat.default, aten.concatenate.default,
    aten.inner.default, aten.tensordot.default, aten.linalg_vecdot.default,
    aten.max.other, aten.min.other, aten.clip.default, aten.special_expit.default,
    aten.multiply.Tensor, aten.multiply.Scalar, aten.subtract.Tensor, aten.divide.Tensor, aten.divide.Scalar,
    aten.true_divide.Tensor, aten.negative.default, aten.absolute.default, aten.arctan.default,
    aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
    aten.kl_div.default, aten.poisson_nll_loss.default, aten.hinge_embedding_loss.default,
    aten.margin_ranking_loss.default, aten.cosine_embedding_loss.default, aten.triplet_margin_loss.default,
    aten.cosine_similarity.default, aten.pairwise_distance.default, aten.diff.default,
    aten.kron.default, aten.meshgrid.default, aten.meshgrid.indexing, aten.block_diag.default,
    aten.atleast_1d.Sequence, aten.atleast_2d.Sequence, aten.atleast_3d.Sequence,
    aten.column_stack.default, aten.vstack.default, aten.dstack.default, aten.row_stack.default, aten.ger.default,
    aten.trapezoid.dx, aten.trapezoid.x, aten.trapz.dx, aten.trapz.x, aten.linalg_vander.default,
    aten.diag.default, aten.linalg_matmul.default, aten.special_logit.default, aten.special_logsumexp.default,
    aten.linalg_matrix_power.default,
    aten.multi_margin_loss.default, aten.index_copy.default, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor,
    aten.take.default,
):  # fmt: skip
    TABLE.rule(_target)(Composite())


@TABLE.composite(aten.ldexp.Tensor)
def ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    return x * torch.pow(2.0, exponent)


@TABLE.composite(aten.hstack.default)
def hstack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors), min(1, tensors[0].ndim - 1))


@TABLE.composite(aten.hsplit.int, aten.hsplit.array)
def hsplit(x: Tensor, parts: Any) -> Sequence[Tensor]:
    return torch.tensor_split(x, parts, min(1, x.ndim - 1))


for _dim, _split in ((0, aten.vsplit), (2, aten.dsplit)):
    TABLE.composite(_split.int, _split.array)(partial(torch.tensor_split, dim=_dim))


@TABLE.composite(aten.take_along_dim.default)
def take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """What PyTorch makes of it asks whether sizes are equal, which leaves one batch size."""
    if dim is None:
        return x.flatten().gather(0, indices.flatten())
    one, other = x.select(dim, 0).shape, indices.select(dim, 0).shape
    others = torch.broadcast_shapes(one, other)  # type: ignore[no-untyped-call]
    place = dim % x.ndim
    wide = (*others[:place], -1, *others[place:])
    return x.expand(wide).gather(dim, indices.expand(wide))


@TABLE.composite(aten.aminmax.default)
def aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    axes = () if dim is None else (dim,)
    return torch.amin(x, axes, keepdim), torch.amax(x, axes, keepdim)


@TABLE.composite(aten.linalg_cross.default)
def cross(x: Tensor, other: Tensor, *, dim: int = -1) -> Tensor:
    x, other = x + torch.zeros_like(other), other + torch.zeros_like(x)
    return x.roll(-1, dim) * other.roll(-2, dim) - x.roll(-2, dim) * other.roll(-1, dim)


@TABLE.composite(aten.cross.default)
def first_cross(x: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    """Without `dim` along the first axis of three."""
    found: Tensor = cross(x, other, dim=x.shape.index(3) if dim is None else dim)
    return found


@TABLE.composite(aten.diag_embed.default)
def diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    rows = x.unsqueeze(-1) * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    up, down = max(offset, 0), max(-offset, 0)
    return F.pad(rows, (up, down, down, up)).movedim((-2, -1), (dim1, dim2))


@TABLE.composite(aten.linalg_multi_dot.default, aten.chain_matmul.default)
def chain(tensors: Sequence[Tensor]) -> Tensor:
    """From the left; the compiler looks for no better order, as torch does where all sizes are known."""
    product = tensors[0]
    for each in tensors[1:]:
        product = product @ each
    return product


@TABLE.composite(aten.logit.default)
def logit(x: Tensor, eps: float | None = None) -> Tensor:
    inside = x if eps is None else x.clamp(eps, 1 - eps)
    return inside.log() - (1 - inside).log()


@TABLE.composite(aten._weight_norm.default)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """w = g v / |v|, the norm over all axes but `dim`, with -1 over all (Salimans & Kingma 2016, arXiv:1602.07868)."""
    rest = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    return v * (g * v.square().sum(rest, keepdim=True).rsqrt())


QKV = ("query", "key", "value")


def _flash(call: Any) -> Rule:
    """The kernel of PyTorch for processors (Dao et al. 2022, arXiv:2205.14135); the formula with numbers that fit."""
    kept, mask, saved = _masked(call)
    kernel = "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"
    as_it_is = "{0} if {0}.stride(-1) == 1 else {0}.contiguous()"
    dense = {
        f"dense_{name}[n, h, {position}, d]": as_it_is.format(f"{{{name}}}")
        for name, position in zip(QKV, "tss", strict=True)
    }
    operands = ", ".join(f"{{dense_{name}}}" for name in QKV)
    options = f"0.0, {call.is_causal}, {mask}scale={call.scale!r})"
    backward = f"{kernel}_backward({as_it_is.format('{cotangent}')}, {operands}, {{both}}[0], {{both}}[1], {options}"
    return Rule(
        f"""score[n, h, t, s] = c * query[n, h, t, d] * key[n, h, s, d]
           weight[n, h, t, s] = exp(score[n, h, t, s]) * {kept}
           total[n, h, t] = weight[n, h, t, s]
           output[n, h, t, d] = weight[n, h, t, s] * total[n, h, t]**(-1) * value[n, h, s, d]""",
        constants={"c": call.scale} | broadcast_sizes(kept),
        saved=saved | dense | {"both": f"{kernel}({operands}, {options}"},
        forward="{both}[0]",
        vjp={", ".join(QKV): backward},
    )


def _masked(call: Any) -> tuple[str, str, dict[str, str]]:
    """The factor of exp(score), the mask as an argument of the kernel, which adds it, and what is saved for them.

    A row of which nothing is left is zeros; it is nan where it is `hidden` by hand, as `softmax` makes it.
    """
    length, shape = call.key.shape[2], call.output.shape[:3]
    name = next((each for each in ("attn_mask", "hidden") if call.arguments.get(each) is not None), "")
    if not name:
        ones = f"torch.ones({shape[2]}, {length}, dtype={{query}}.dtype, device={{query}}.device)"
        return "kept[t, s]", "", {"kept[t, s]": f"{ones}.tril()" if call.is_causal else ones}
    mask, added = call.arguments[name], f"{{{name}}}"
    if mask.dtype == torch.bool:
        rows = ".masked_fill_({hidden}.all(-1, keepdim=True), float('nan'))" if name == "hidden" else ""
        hidden = added if name == "hidden" else f"~{added}"
        added = f"torch.zeros_like({added}, dtype={{query}}.dtype).masked_fill_({hidden}, float('-inf')){rows}"
    kept = access("kept", mask, SimpleNamespace(shape=(*shape, length)), ["n", "h", "t", "s"])
    fit = "" if len(mask.shape) in (2, 4) else ".unsqueeze(0)"  # the kernel takes no other
    return kept, f"attn_mask={{added}}{fit}, ", {"added": added, kept: "{added}.exp()"}


@TABLE.composite(aten.scaled_dot_product_attention.default, whole=_flash)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query keyᵀ + mask) value (Vaswani et al. 2017, arXiv:1706.03762)."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    softmax = torch.softmax if attn_mask is None else aten._safe_softmax  # a row that is masked whole gives zeros
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    weights = softmax(scores, -1)
    return (torch.dropout(weights, dropout_p, True) if dropout_p else weights) @ value


@TABLE.composite(aten.embedding_bag.padding_idx)
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bags of one size: the sum, the mean or the maximum of their rows. The other outputs belong to torch's kernel."""
    places = indices.view(offsets.shape[0], indices.shape[0] // offsets.shape[0])
    rows = F.embedding(places, weight)
    left = None if padding_idx is None else (places != padding_idx).unsqueeze(-1)
    if mode == 2:
        found = (rows if left is None else rows.masked_fill(~left, float("-inf"))).max(1)[0]
    else:
        rows = rows if per_sample_weights is None else rows * per_sample_weights.view(places.shape).unsqueeze(-1)
        found = (rows if left is None else rows * left).sum(1)
        count = places.shape[1] if left is None else left.sum(1).clamp(min=1)
        found = found / count if mode == 1 else found
    return found, offsets, offsets, offsets


@TABLE.composite(aten.multilabel_margin_loss.default)
def multilabel_margin(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """Σ_j Σ_i max(0, 1 - x[y_j] + x[i]) / C with the classes y_j of a sample before the first -1, and i all others."""
    classes = torch.arange(x.shape[-1], device=x.device)
    named = (target >= 0).to(torch.int64).cumprod(-1) > 0
    place = target.clamp(min=0)
    others = ~((place.unsqueeze(-1) == classes) & named.unsqueeze(-1)).any(-2)
    margin = (1 - x.gather(-1, place).unsqueeze(-1) + x.unsqueeze(-2)).relu()
    each = (margin * (named.unsqueeze(-1) & others.unsqueeze(-2))).sum((-1, -2)) / x.shape[-1]
    return each if reduction == 0 else each.mean() if reduction == 1 else each.sum()
