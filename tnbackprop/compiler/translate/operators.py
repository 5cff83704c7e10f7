"""One table of what the compiler knows of ATen's operators beyond their schemas: what each aliases, mixes and becomes.

A key lists overloads in torch's own spelling, "default" left out. What has no row is `PLAIN`: an operator that makes
something new of its tensors, and treats every entry of a batch on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from . import spellings as s
from .torch_internals import OpOverload, overload

Axes = Callable[[Mapping[str, Any], int], Collection[int]]
"""From the arguments of a call and the rank of its tensor to some of its axes."""


class Same(Enum):
    """When a call gives an argument back as it is, where it has the dtype and the shape of the result."""

    ALWAYS = "it has both"
    CAST = "it may have another dtype"
    SHAPE = "it may have another shape"


class Copies(Enum):
    """How copies stand in an axis with the batch."""

    OUTER = "one batch after the other"
    INNER = "those of a sample side by side"
    ONE = "they are all one, so that it may be any order: a sample's side by side"


class Memory(Enum):
    """Whose memory the result has, where the schema does not say it."""

    OWN = "its own, whatever it is given"
    ITSELF = "it is the argument itself"
    EITHER = "the schema says its own, and it may be the argument's"


def _none(arguments: Mapping[str, Any], rank: int) -> Collection[int]:
    return ()


@dataclass(frozen=True)
class Operator:
    """One row.

    same         when it gives the argument `given` back as it is
    reshapes     the same elements in row-major order
    canonical    the call in the one spelling that rules have
    pieces       its outputs, all of one kind, as calls of their own
    outputs      operators that make its outputs, where they are of several kinds: "" for the operator itself
    no_gradient  the derivative of the output is zero, or none, in every input
    source       the argument that `along`, `takes` and `positions` are about
    along        axes along which it couples entries or tells them apart, and which it keeps: what `dim` says
    takes        axes of which it takes single entries
    positions    axes on which it couples entries, whatever the arguments
    indices      the argument whose k-th entry picks along axis k
    equation     the argument that is an equation of einsum
    copies       how it repeats an axis
    counts       0, 1, 2, … where it starts at nothing
    uniform      all its entries are equal, whatever the order of an axis is
    memory       whose the result's is
    into         its overload for memory that is given, where that may be the first operand's
    functional   of one that writes: the operator that makes the same values, where that is not the one without a _
    copying      of a view: the operator that copies where the strides ask for it
    refused      why no program can have it
    """

    same: Same | None = None
    given: str = "input"
    reshapes: bool = False
    canonical: s.Spelled | None = None
    pieces: s.Piece | None = None
    outputs: tuple[str, ...] = ()
    no_gradient: bool = False
    source: str = "input"
    along: Axes = _none
    takes: Axes = _none
    positions: Axes = _none
    indices: str = ""
    equation: str = ""
    copies: Copies | None = None
    counts: bool = False
    uniform: bool = False
    memory: Memory | None = None
    into: str = ""
    functional: str = ""
    copying: str = ""
    refused: str = ""


PLAIN = Operator()


def named(argument: str) -> Axes:
    """The axes that an argument lists; all where it is None, for then the tensor is taken as flat."""

    def axes(arguments: Mapping[str, Any], rank: int) -> Collection[int]:
        dims = arguments[argument]
        if dims is None:
            return range(rank)
        return {dim % rank for dim in (dims if isinstance(dims, tuple) else (dims,))}

    return axes


def but(argument: str) -> Axes:
    """All axes but those that an argument lists."""
    return lambda arguments, rank: set(range(rank)) - set(named(argument)(arguments, rank))


def last(count: int) -> Axes:
    """The last axes."""
    return lambda arguments, rank: range(rank - count, rank)


def _rolled(arguments: Mapping[str, Any], rank: int) -> Collection[int]:
    return named("dims")(arguments, rank) if arguments["dims"] else range(rank)


def _not_batch(arguments: Mapping[str, Any], rank: int) -> Collection[int]:
    """Of a recurrent layer, whose sequence is [time, N, features], or the batch first."""
    return set(range(rank)) - {0 if arguments["batch_first"] else 1}


DIM = named("dim")

TABLE: Mapping[str, Operator] = {
    # the same values
    "alias lift_fresh": Operator(same=Same.ALWAYS, memory=Memory.ITSELF),
    "clone contiguous lift_fresh_copy positive": Operator(same=Same.ALWAYS),
    "to.dtype": Operator(same=Same.CAST),
    "to.dtype_layout to.device to.other _to_copy type_as": Operator(same=Same.CAST, canonical=s.as_cast),
    "copy": Operator(canonical=s.copied_as_expand, same=Same.SHAPE, given="src"),
    "dropout feature_dropout alpha_dropout": Operator(memory=Memory.EITHER),
    "native_dropout": Operator(canonical=s.as_dropout),
    # in another shape
    "reshape": Operator(reshapes=True, canonical=s.as_reshape, same=Same.SHAPE),
    "view _unsafe_view": Operator(reshapes=True, canonical=s.as_reshape, copying="reshape"),
    "view_as": Operator(reshapes=True, canonical=s.as_reshape, copying="reshape_as"),
    "reshape_as": Operator(reshapes=True, canonical=s.as_reshape),
    "squeeze": Operator(reshapes=True, canonical=s.with_axes_of_one),
    "squeeze.dims flatten.using_ints": Operator(reshapes=True, same=Same.SHAPE),
    "squeeze.dim unsqueeze unflatten.int ravel": Operator(reshapes=True),
    "expand": Operator(canonical=s.as_expand, same=Same.SHAPE, copies=Copies.ONE),
    "expand_as broadcast_to": Operator(canonical=s.as_expand),
    "swapaxes swapdims": Operator(canonical=s.as_transpose),
    # parts and copies
    "slice.Tensor": Operator(canonical=s.with_ends, same=Same.SHAPE, along=DIM),
    "narrow": Operator(canonical=s.narrowed_as_slice),
    "select.int": Operator(takes=DIM),
    "slice_scatter": Operator(same=Same.SHAPE, given="src", along=DIM),
    "select_scatter": Operator(along=DIM),
    "split.Tensor split.sizes split_with_sizes chunk tensor_split.sections tensor_split.indices "
    "unsafe_split.Tensor unsafe_chunk": Operator(pieces=s.slice_piece),
    "unbind.int": Operator(pieces=s.select_piece),
    "broadcast_tensors": Operator(pieces=s.broadcast_piece),
    "index.Tensor index_put": Operator(indices="indices"),
    "index_select gather take_along_dim": Operator(along=DIM),
    "scatter.src scatter.value scatter.reduce scatter.value_reduce scatter_add scatter_reduce.two": Operator(along=DIM),
    "index_add index_copy index_fill.int_Scalar index_fill.int_Tensor": Operator(along=DIM),
    "unfold": Operator(along=named("dimension")),
    "flip": Operator(along=named("dims")),
    "roll": Operator(along=_rolled),
    "repeat": Operator(copies=Copies.OUTER),
    "tile": Operator(canonical=s.as_repeat),
    "cat concat": Operator(copies=Copies.OUTER, canonical=s.as_its_only_part),
    "repeat_interleave.self_int": Operator(copies=Copies.INNER),
    # along an axis
    "softmax.int _softmax log_softmax.int _log_softmax _safe_softmax": Operator(memory=Memory.OWN, along=DIM),
    "cumsum cumprod logcumsumexp cummax cummin diff glu fft_fft fft_ifft": Operator(along=DIM),
    "topk sort sort.stable argsort argsort.stable": Operator(along=DIM),
    "renorm": Operator(along=but("dim")),
    "var_mean.correction": Operator(outputs=("var.correction", "mean.dim")),
    "std_mean.correction": Operator(outputs=("std.correction", "mean.dim")),
    "var_mean.dim": Operator(outputs=("var.dim", "mean.dim")),
    "std_mean.dim": Operator(outputs=("std.dim", "mean.dim")),
    # over positions
    **{
        f"conv{k}d conv{k}d.padding": Operator(memory=Memory.OWN, positions=last(k + 1)) for k in (1, 2, 3)
    },
    "conv_transpose1d": Operator(positions=last(2)),
    "conv_transpose2d.input": Operator(positions=last(3)),
    "conv_transpose3d.input": Operator(positions=last(4)),
    **{
        f"avg_pool{k}d max_pool{k}d max_pool{k}d_with_indices adaptive_avg_pool{k}d adaptive_max_pool{k}d "
        f"reflection_pad{k}d replication_pad{k}d "
        f"upsample_nearest{k}d upsample_nearest{k}d.vec _upsample_nearest_exact{k}d _upsample_nearest_exact{k}d.vec":
        Operator(positions=last(k))
        for k in (1, 2, 3)
    },
    "upsample_linear1d upsample_linear1d.vec": Operator(positions=last(1)),
    "upsample_bilinear2d upsample_bilinear2d.vec upsample_bicubic2d upsample_bicubic2d.vec "
    "_upsample_bilinear2d_aa _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa _upsample_bicubic2d_aa.vec "
    "_adaptive_avg_pool2d fractional_max_pool2d max_unpool2d": Operator(positions=last(2)),
    "upsample_trilinear3d upsample_trilinear3d.vec _adaptive_avg_pool3d fractional_max_pool3d "
    "max_unpool3d": Operator(positions=last(3)),
    "scaled_dot_product_attention": Operator(source="query", positions=last(2)),
    "lstm.input gru.input rnn_tanh.input rnn_relu.input": Operator(positions=_not_batch),
    "einsum": Operator(equation="equation"),
    # memory
    "linear mm bmm addmm matmul batch_norm layer_norm group_norm add.Tensor sub.Tensor mul.Tensor div.Tensor "
    "relu": Operator(memory=Memory.OWN),
    "threshold_backward sigmoid_backward tanh_backward silu_backward elu_backward leaky_relu_backward "
    "hardtanh_backward softplus_backward hardsigmoid_backward": Operator(memory=Memory.OWN, into="grad_input"),
    "gelu_backward mish_backward hardswish_backward native_layer_norm_backward native_group_norm_backward "
    "native_batch_norm_backward": Operator(memory=Memory.OWN),
    # no derivative
    "detach rand_like randn_like zero fill.Scalar bernoulli bernoulli.p normal_functional sign floor ceil round "
    "trunc": Operator(no_gradient=True),
    "sgn": Operator(canonical=s.as_sign),
    "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full": Operator(
        no_gradient=True, uniform=True
    ),
    "empty.memory_format": Operator(canonical=s.as_zeros),
    "empty_like": Operator(canonical=s.as_zeros_like),
    "new_empty": Operator(canonical=s.as_new_zeros),
    "fill.Tensor": Operator(canonical=s.filled_as_expand),
    "arange arange.start arange.start_step": Operator(counts=True),
    # writing
    "normal_": Operator(functional="normal_functional"),
    "bernoulli_.float": Operator(functional="bernoulli.p"),
    "embedding_renorm_": Operator(
        refused="an embedding with max_norm writes to its weight during forward: a program changes no parameter. "
        "Leave max_norm out, and renormalize between steps"
    ),
}  # fmt: skip


def _entered(table: Mapping[str, Operator]) -> dict[OpOverload, Operator]:
    """By overload. Those that this version of torch does not have are in no model."""
    found: dict[OpOverload, Operator] = {}
    for names, row in table.items():
        for name in names.split():
            target = overload(name)
            if target is not None:
                assert target not in found, f"two rows for {name}"
                found[target] = row
    return found


_ROWS = _entered(TABLE)


def row_of(target: object) -> Operator:
    """The row of an overload; `PLAIN` for what has none, modules among them."""
    return _ROWS.get(target, PLAIN)  # type: ignore[call-overload, no-any-return]
