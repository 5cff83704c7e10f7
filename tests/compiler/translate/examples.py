"""A small call of every operator in the table: its arguments, in the order of the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

f64 = torch.float64


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=f64) - 0.4


X = drawn(3, 4, 5)
"""What the operators are called with: no two of its elements are equal, and no two of its sizes."""
CUBE = drawn(3, 4, 4, 4)[:, None].expand(3, 2, 4, 4, 4) * torch.tensor([1.0, 2.0], dtype=f64).view(2, 1, 1, 1)
IMAGES = {1: CUBE[..., 0, 0], 2: CUBE[..., 0], 3: CUBE}
INDEX = torch.tensor([2, 0, 3, 1])
ALONG_1 = INDEX.view(1, 4, 1).expand(3, 4, 5)
"""An index of X along axis 1, the same for all of the rest; so are the values that are put there."""
PUT = torch.arange(4, dtype=f64).view(1, 4, 1).expand(3, 4, 5)
FLAT = drawn(4, 5)


def _recurrent(gates: int, states: int) -> tuple[Any, ...]:
    """[time, N, features], as without batch_first; the state of all samples is zero."""
    state = torch.zeros(1, 4, 3, dtype=f64)
    weights = [drawn(3 * gates, *shape).abs() for shape in ((5,), (3,), (), ())]
    return (X, [state] * states if states > 1 else state, weights, True, 1, 0.0, False, False, False)


CALLS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        "alias lift_fresh clone contiguous lift_fresh_copy positive ravel relu detach zeros_like ones_like "
        "empty_like rand_like randn_like zero sign floor ceil round trunc normal_functional normal_".split(), (X,)
    ),
    "to.dtype": (X, torch.float32), "to.dtype_layout": (X,), "to.device": (X, "cpu", torch.float32),
    "to.other": (X, X.float()), "_to_copy": (X,), "type_as": (X, X.float()),
    "copy": (X, drawn(4, 5)),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), (X, 0.5, True)),
    "native_dropout": (X, 0.5, None),
    **dict.fromkeys(("reshape", "view", "_unsafe_view"), (X, [6, 10])),
    **dict.fromkeys(("view_as", "reshape_as"), (X, drawn(6, 10))),
    "squeeze": (X[:, :1],), "squeeze.dims": (X[:, :1], [1, 2]), "squeeze.dim": (X[:, :1], 1), "unsqueeze": (X, 1),
    "flatten.using_ints": (X, 1, 2), "unflatten.int": (X, 1, [2, 2]),
    "expand": (X, [2, 3, 4, 5]), "broadcast_to": (X, [2, 3, 4, 5]), "expand_as": (X, drawn(2, 3, 4, 5)),
    "swapaxes": (X, 0, 2), "swapdims": (X, -1, 0),
    "slice.Tensor": (X, 1, -3, 2 ** 60, 1), "narrow": (X, 1, 1, 2), "sgn": (X,), "select.int": (X, 1, 2),
    "slice_scatter": (X, PUT[:, 1:], 1, 1), "select_scatter": (X, PUT[:, 2], 1, 1),
    "split.Tensor": (X, 2, 2), "split.sizes": (X, [1, 3], 1), "split_with_sizes": (X, [1, 3], 1), "chunk": (X, 2, 2),
    "tensor_split.sections": (X, 2, -1), "tensor_split.indices": (X, [1, 2], -1), "unsafe_split.Tensor": (X, 2, 2),
    "unsafe_chunk": (X, 2, 2), "unbind.int": (X, -2), "broadcast_tensors": ([X, FLAT],),
    "index.Tensor": (X, [None, INDEX]), "index_put": (X, [None, INDEX[:2]], torch.zeros(5, dtype=f64)),
    "index_select": (X, 1, INDEX), "gather": (X, 1, ALONG_1), "take_along_dim": (X, ALONG_1, 1),
    "scatter.src": (X, 1, ALONG_1[:, :2], PUT), "scatter.value": (X, 1, ALONG_1[:, :2], 7.0),
    "scatter.reduce": (X, 1, ALONG_1[:, :2], PUT), "scatter.value_reduce": (X, 1, ALONG_1[:, :2], 7.0),
    "scatter_add": (X, 1, ALONG_1[:, :2], PUT), "scatter_reduce.two": (X, 1, ALONG_1[:, :2], PUT, "sum"),
    "index_add": (X, 1, INDEX, PUT), "index_copy": (X, 1, INDEX[:3], PUT[:, :3]),
    "index_fill.int_Scalar": (X, 1, INDEX[:2], 7.0),
    "index_fill.int_Tensor": (X, 1, INDEX[:2], torch.tensor(7.0, dtype=f64)),
    "unfold": (X, 1, 2, 1), "flip": (X, [1]), "roll": (X, [1], [1]),
    "repeat": (X, [2, 1, 1]), "tile": (X, [2, 1]),
    "cat": ([X, X],), "concat": ([X, X],), "repeat_interleave.self_int": (X, 2, 0),
    **dict.fromkeys(
        "softmax.int log_softmax.int _safe_softmax cumsum cumprod logcumsumexp cummax cummin glu argsort sort".split(),
        (X, 1),
    ),
    "_softmax": (X, 1, False), "_log_softmax": (X, 1, False), "diff": (X, 1, 1), "fft_fft": (X, None, 1),
    "fft_ifft": (X, None, 1), "topk": (X, 2, 1), "renorm": (X, 2.0, 1, 0.1),
    "var_mean.correction": (X, [1]), "std_mean.correction": (X, [1]), "var_mean.dim": (X, [1]),
    "std_mean.dim": (X, [1]), "max.dim": (X, 1), "min.dim": (X, 1, True),
    "scaled_dot_product_attention": (X, X, X), "lstm.input": _recurrent(4, 2), "gru.input": _recurrent(3, 1),
    "rnn_tanh.input": _recurrent(1, 1), "rnn_relu.input": _recurrent(1, 1),
    "einsum": ("ij,jk->ik", [FLAT, drawn(5, 2)]),
    "conv_transpose1d": (IMAGES[1], drawn(2, 2, 2)), "conv_transpose2d.input": (IMAGES[2], drawn(2, 2, 2, 2)),
    "conv_transpose3d.input": (IMAGES[3], drawn(2, 2, 2, 2, 2)),
    "linear": (X, drawn(2, 5), drawn(2)), "mm": (FLAT, drawn(5, 2)), "bmm": (X, drawn(3, 5, 2)),
    "addmm": (drawn(2), FLAT, drawn(5, 2)), "matmul": (X, drawn(5)),
    "batch_norm": (X, None, None, drawn(4), drawn(4).abs(), False, 0.1, 1e-5, False),
    "layer_norm": (X, [5]), "group_norm": (X, 2),
    **dict.fromkeys(("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"), (X, drawn(5))),
    "gelu_backward": (X, X.cos()), "mish_backward": (X, X.cos()), "hardswish_backward": (X, X.cos()),
    "threshold_backward": (X, X.cos(), 0.9), "sigmoid_backward": (X, X.cos()), "tanh_backward": (X, X.cos()),
    "silu_backward": (X, X.cos()), "elu_backward": (X, 1.0, 2.0, 3.0, False, X.cos()),
    "leaky_relu_backward": (X, X.sin(), 0.1, False), "hardtanh_backward": (X, X.cos(), 0.5, 0.9),
    "softplus_backward": (X, X.cos(), 2.0, 20.0), "hardsigmoid_backward": (X, 4 * X.cos()),
    "native_layer_norm_backward": (X, X.cos(), [5], drawn(3, 4, 1), drawn(3, 4, 1), None, None, [True, False, False]),
    "native_group_norm_backward": (X, X.cos(), drawn(3, 2), drawn(3, 2), None, 3, 4, 5, 2, [True, False, False]),
    "native_batch_norm_backward": (
        X, X.cos(), drawn(4), drawn(4), drawn(4).abs(), None, None, False, 1e-5, [True, True, True],
    ),
    "full_like": (X, 2.0), "new_zeros": (X, [2]), "new_ones": (X, [2]), "new_full": (X, [2], 3.0),
    "new_empty": (X, [2]), "fill.Scalar": (X, 2.0), "fill.Tensor": (X, torch.tensor(2.0, dtype=f64)),
    "bernoulli": (X.abs(),), "bernoulli.p": (X, 0.5), "bernoulli_.float": (X, 0.5),
    "zeros": ([2, 3],), "ones": ([2, 3],), "full": ([2, 3], 3.0), "empty.memory_format": ([2, 3],),
    "arange": (5,), "arange.start": (0, 5), "arange.start_step": (0, 5),
    "embedding_renorm_": (FLAT, INDEX[:2], 0.1, 2.0),
}  # fmt: skip
"""By the name that the table has."""
OPTIONS: dict[str, Mapping[str, Any]] = {
    "sort.stable": {"stable": True, "dim": 1}, "argsort.stable": {"stable": True, "dim": 1},
    "scatter.reduce": {"reduce": "add"},
    "scatter.value_reduce": {"reduce": "add"}, "_to_copy": {"dtype": torch.float32},
    "to.dtype_layout": {"dtype": torch.float32},
}  # fmt: skip
CALLS |= {"sort.stable": (X,), "argsort.stable": (X,)}

for k in (1, 2, 3):
    image, kernel = IMAGES[k], [2] * k
    CALLS |= {
        f"conv{k}d": (image, drawn(3, 2, *kernel)),
        f"conv{k}d.padding": (image, drawn(3, 2, *[3] * k), None, [1] * k, "same"),
        **dict.fromkeys((f"avg_pool{k}d", f"max_pool{k}d", f"max_pool{k}d_with_indices"), (image, kernel)),
        **dict.fromkeys((f"adaptive_avg_pool{k}d", f"_adaptive_avg_pool{k}d"), (image, kernel)),
        f"adaptive_max_pool{k}d": (image, kernel),
        **dict.fromkeys((f"reflection_pad{k}d", f"replication_pad{k}d"), (image, [1] * (2 * k))),
        **dict.fromkeys((f"upsample_nearest{k}d", f"_upsample_nearest_exact{k}d"), (image, [8] * k)),
        **dict.fromkeys((f"upsample_nearest{k}d.vec", f"_upsample_nearest_exact{k}d.vec"), (image, [8] * k, None)),
        f"max_unpool{k}d": (image, torch.arange(4**k).view(1, 1, *[4] * k).expand_as(image), [5] * k)
        + (([1] * k, [0] * k) if k == 3 else ()),
        f"fractional_max_pool{k}d": (image, kernel, kernel, torch.full((3, 2, k), 0.3, dtype=f64)),
    }
for name, k in (("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3)):
    CALLS |= {f"upsample_{name}{k}d": (IMAGES[k], [8] * k, False)}
    CALLS |= {f"upsample_{name}{k}d.vec": (IMAGES[k], [8] * k, False, None)}
    CALLS |= {f"_upsample_{name}{k}d_aa": (IMAGES[k], [8] * k, False)}
    CALLS |= {f"_upsample_{name}{k}d_aa.vec": (IMAGES[k], [8] * k, False, None)}

UNCHANGED: dict[str, tuple[Any, ...]] = {
    "reshape": (X, [3, 4, 5]), "squeeze.dims": (X, [0, 1]), "flatten.using_ints": (X, 1, 1), "expand": (X, [-1, 4, 5]),
    "slice.Tensor": (X, 1, 0, 4), "slice_scatter": (X, PUT, 1, 0, 4), "copy": (X, PUT),
    "to.dtype": (X, f64), "to.dtype_layout": (X.float(),), "to.device": (X, "cpu", f64), "to.other": (X, PUT),
    "type_as": (X, PUT), "_to_copy": (X.float(),),
}  # fmt: skip
"""Calls after which shape and dtype are the same, of operators that then give an argument back."""
EVAL = dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), (X, 0.5, False))
