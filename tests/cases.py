"""One table of layers; tests are its product with a table of quantities. A bug found adds a row here."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .models import (
    Apply,
    Attention,
    Branches,
    ClassToken,
    FlatTargets,
    InPlace,
    MergedInside,
    MergedTokens,
    Positions,
    Product,
    Residual,
    Reused,
    TiedAutoencoder,
    TiedEmbedding,
    TiedNames,
    TimeFirst,
    Unused,
    Written,
    frozen,
)
from .problems import (
    Case,
    Problem,
    after_linear,
    classes,
    classifier,
    function,
    normal,
    pool,
    probabilities,
    seq,
    tokens,
    unit,
    weights,
    with_parameters,
)

__all__ = ["CASES", "EVERY", "RANDOM_CASES", "Case", "Problem", "classes", "normal", "seq"]

LINEAR = (
    Case("linear", lambda: nn.Linear(3, 2)),
    Case("linear_without_bias", lambda: nn.Linear(3, 2, bias=False)),
    Case("linear_rank3", lambda: nn.Linear(3, 2), (4, 3)),
    Case("linear_rank4", lambda: seq(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), (2, 4, 3)),
    Case("linear_one_sample", lambda: seq(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), batch=1),
    Case("linear_size_one", lambda: seq(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), (1,)),
    Case("mlp_sum", lambda: seq(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)),
         loss=lambda: nn.MSELoss(reduction="sum")),
    Case("frozen_weight", lambda: frozen(seq(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "0.weight", "2.bias")),
    Case("frozen_first_layer", lambda: frozen(seq(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "0.weight", "0.bias")),
    Case("bilinear", Product),
    Case("unused_and_zero_gradient", Unused),
    Case("tied_transposed", TiedAutoencoder, (4,)),
    Case("tied_names", TiedNames),
    Case("reused_module", lambda: Reused(nn.Linear(3, 3))),
    Case("reused_convolution", lambda: Reused(nn.Conv2d(2, 2, 3, padding=1)), (2, 4, 4)),
    Case("residual", lambda: seq(Residual(seq(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))), nn.Linear(3, 2))),
    Case("position_table", lambda: Positions(4, 3), (4, 3)),
    Case("class_token", lambda: ClassToken(3), (4, 3)),
    Case("time_first", TimeFirst, (4, 3)),
    Case("merged_inside", MergedInside, (4, 3)),
    Case("merged_output", MergedTokens, (2, 3), classes(3, 2), lambda: FlatTargets(nn.CrossEntropyLoss())),
    Case("merged_output_ignore", MergedTokens, (2, 3), classes(3, 2, ignore=-100),
         lambda: FlatTargets(nn.CrossEntropyLoss())),
    Case("in_place", InPlace),
    Case("attention", lambda: Attention(3), (4, 3)),
    Case("broadcast_one", lambda: Branches(lambda a, b: a * b, nn.Linear(3, 4), nn.Linear(3, 1))),
)  # fmt: skip

EINSUM = (
    with_parameters("einsum_shared_positions", lambda x, w: torch.einsum("nti,oi->nto", x, w), (2, 3), x=(4, 3)),
    with_parameters("einsum_two_parameters", lambda x, a, b: torch.einsum("ni,ij,jk->nk", x, a, b), (3, 2), (2, 4)),
    with_parameters("einsum_ellipsis", lambda x, w: torch.einsum("...i,io->...o", x, w), (3, 2), x=(2, 4, 3)),
    with_parameters("einsum_implicit_output", lambda x, w: torch.einsum("ab,bc", x, w).tanh(), (3, 2)),
    with_parameters("einsum_capitals", lambda x, w: torch.einsum("Nni,In->NIi", x, w), (2, 4), x=(4, 3)),
    with_parameters("einsum_diagonal", lambda x, w: torch.einsum("ni,ii->ni", x, w), (3, 3)),
    with_parameters("einsum_quadratic", lambda x, w: torch.einsum("ni,oij,nj->no", x, w, x), (2, 3, 3)),
    with_parameters("einsum_mixer", lambda x, a, b: torch.einsum("ntd,ts,de->nse", x, a, b), (4, 4), (3, 3), x=(4, 3)),
    with_parameters("mm", lambda x, w, v: torch.mm(x, w) + torch.addmv(x[:, :1].squeeze(1), x, v).unsqueeze(1),
                    (3, 2), (3,)),
    with_parameters("matmul", lambda x, w: x @ w, (3, 2)),
    with_parameters("matmul_vector", lambda x, w: x @ w, (3,), x=(4, 3)),
    with_parameters("matmul_batched", lambda x, w: x @ w, (2, 3, 4), x=(2, 4, 3)),
    with_parameters("matmul_left", lambda x, w: w @ x, (5, 4), x=(4, 3)),
    with_parameters("bmm", lambda x, w: torch.bmm(x @ w, x.transpose(1, 2)), (3, 3), x=(4, 3)),
    with_parameters("baddbmm", lambda x, w, b: torch.baddbmm(b, x @ w, x.transpose(1, 2)), (3, 3), (4, 1), x=(4, 3)),
    with_parameters("vector_products", lambda x, m, v: x * (torch.mv(m, v) + torch.dot(v, v)) @ torch.outer(v, v),
                    (3, 3), (3,)),
    with_parameters("lerp", lambda x, a, b: torch.lerp(x, torch.addcmul(x, a, b, value=2.0), b.sigmoid()), (3,), (4, 3),
                    x=(4, 3)),
    with_parameters("quotients", lambda x, a: torch.addcdiv(a, x, a.exp()) - torch.exp(a) ** a.cos(), (3,)),
    with_parameters("addmm", lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2.0), (3, 2), (2,)),
    with_parameters("weight_transposed", lambda x, w: F.linear(x, w.t()), (3, 2)),
    with_parameters("weight_exp", lambda x, w: F.linear(x, w.exp()), (2, 3)),
    with_parameters("weight_low_rank", lambda x, a, b: F.linear(x, a @ b), (4, 2), (2, 3)),
    with_parameters("weight_normalized", lambda x, w: x @ (w * (w**2).sum(0, keepdim=True).rsqrt()), (3, 2)),
    with_parameters("weight_sum_of_two", lambda x, a, b: F.linear(x, a + b) + a.sum(), (2, 3), (2, 3)),
    with_parameters("scalar_parameter", lambda x, s: torch.tanh(x * s), ()),
)  # fmt: skip


def conv2d(name: str, *args: object, x: tuple[int, ...] = (2, 5, 4), **options: object) -> Case:
    return Case(name, lambda: seq(nn.Conv2d(*args, **options), nn.Tanh(), nn.Conv2d(args[1], 1, 1)), x)  # type: ignore[arg-type]


CONVOLUTION = (
    conv2d("conv2d", 2, 3, 3),
    conv2d("conv2d_without_bias", 2, 3, (2, 3), bias=False),
    conv2d("conv2d_stride_padding", 2, 3, 3, stride=(2, 1), padding=(1, 2)),
    conv2d("conv2d_dilation", 2, 3, 2, dilation=(2, 3), padding=1),
    conv2d("conv2d_downsample", 2, 3, 2, stride=2, x=(2, 5, 4)),
    conv2d("conv2d_1x1_stride", 2, 3, 1, stride=2),
    conv2d("conv2d_groups", 4, 6, 3, groups=2, padding=1, x=(4, 4, 3)),
    conv2d("conv2d_depthwise", 3, 3, 3, groups=3, padding=1, x=(3, 4, 4)),
    conv2d("conv2d_depthwise_multiplier", 2, 4, 2, groups=2),
    conv2d("conv2d_valid", 2, 3, 3, padding="valid"),
    conv2d("conv2d_same", 2, 3, 3, padding="same"),
    conv2d("conv2d_same_even", 2, 3, (2, 4), padding="same"),
    conv2d("conv2d_same_dilated", 2, 3, (2, 3), padding="same", dilation=(1, 2)),
    conv2d("conv2d_circular", 2, 3, 3, padding=1, padding_mode="circular"),
    conv2d("conv2d_reflect", 2, 3, 3, padding=1, padding_mode="reflect"),
    conv2d("conv2d_replicate", 2, 3, 3, padding=(2, 1), padding_mode="replicate"),
    Case("conv2d_channels_last", lambda: seq(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3)), (2, 5, 4),
         prepare=lambda x: x.to(memory_format=torch.channels_last)),
    Case("conv2d_permuted_input", lambda: nn.Conv2d(2, 3, 3), (2, 5, 4), prepare=lambda x: x.transpose(2, 3)),
    Case("conv1d", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    Case("conv1d_groups_dilation", lambda: nn.Conv1d(4, 4, 2, groups=2, dilation=2), (4, 6)),
    Case("conv3d", lambda: nn.Conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 2, 3, 4)),
    Case("conv_transpose1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    Case("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 4, (2, 3), stride=2, groups=2, dilation=(2, 1)), (4, 3, 2)),
    Case("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 1, (1, 2, 2), stride=(1, 2, 1)), (2, 2, 2, 2)),
    Case("cnn", lambda: seq(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3, padding=1),
                            nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), (1, 4, 4), classes(3), nn.CrossEntropyLoss),
)  # fmt: skip

ACTIVATION = (
    *(
        after_linear(make().__class__.__name__.lower(), make)
        for make in (
            nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus,
            nn.LogSigmoid, nn.Hardtanh, nn.Mish, nn.ReLU6, nn.Hardsigmoid, nn.Hardswish, nn.Softsign, nn.Tanhshrink,
            nn.Softshrink, nn.Hardshrink, nn.PReLU,
        )
    ),
    after_linear("gelu_tanh", lambda: nn.GELU(approximate="tanh")),
    after_linear("elu_options", lambda: nn.ELU(alpha=0.7)),
    # torch keeps 1 / alpha in float32 in celu's derivative: 2 is exact there.
    after_linear("celu_options", lambda: nn.CELU(alpha=2.0)),
    after_linear("softplus_options", lambda: nn.Softplus(beta=2.0, threshold=1.0)),
    after_linear("hardtanh_options", lambda: nn.Hardtanh(-0.3, 0.4)),
    after_linear("threshold", lambda: nn.Threshold(0.1, 2.0)),
    after_linear("relu_in_place", lambda: nn.ReLU(inplace=True)),
    after_linear("prelu_channels", lambda: nn.PReLU(4)),
    after_linear("glu", nn.GLU),
    after_linear("softmax", lambda: nn.Softmax(-1)),
    after_linear("softmin", lambda: nn.Softmin(1), (4, 3)),
    after_linear("log_softmax", lambda: nn.LogSoftmax(-1)),
    after_linear("dropout_eval", lambda: nn.Dropout(0.5)),
    function("exp", torch.exp),
    function("log", lambda t: torch.log(t**2 + 0.5)),
    function("sqrt", lambda t: torch.sqrt(t.square() + 0.5)),
    function("reciprocal", lambda t: torch.reciprocal(t.abs() + 1.0)),
    function("rsqrt", lambda t: torch.rsqrt(t.abs() + 1.0)),
    function("sin_cos", lambda t: torch.sin(t) * torch.cos(2 * t)),
    function("negative_cube", lambda t: -(t**3)),
    function("fractional_power", lambda t: (t.square() + 1.0) ** 0.7),
    function("number_to_the_power", lambda t: 2.0**t),
    function("clamp", lambda t: t.clamp(-0.4, 0.5)),
    function("clamp_min", lambda t: t.clamp(min=0.1)),
    function("erf", torch.erf),
    function("where", lambda t: torch.where(t > 0, t.sin(), t.cos())),
    function("where_broadcast", lambda t: torch.where(t[:, :1] > 0, t, t**2), (2, 3)),
    function("masked_fill", lambda t: t.masked_fill(t > 0, float("-inf")).exp()),
    function("masked_fill_broadcast", lambda t: t.masked_fill(t[:, :1] > 0, 2.0), (2, 3)),
    function("logsumexp", lambda t: t.logsumexp(1) + t.logsumexp((1, 2), keepdim=True).squeeze(2), (2, 3)),
    function("minimum", lambda t: t.min(1, keepdim=True).values, (2, 3)),
    function("more_functions", lambda t: t.atan() + t.tan().asinh() + (t.cosh() + 1).acosh() - t.sinh() * t.erfc()),
    function("inverse_functions", lambda t: t.sin().mul(0.9).asin() * t.tanh().acos() + t.tanh().mul(0.9).atanh()),
    function("other_bases", lambda t: t.exp2().log2() * (t**2 + 1).log10() + t.sigmoid().logit() + t.frac()
             + torch.special.ndtr(t)),
    function("maximum_minimum", lambda t: torch.maximum(t, t.sin() * 2) * torch.minimum(t, t[:, :1])),
    function("clamp_to_tensors", lambda t: t.clamp(t.sin() - 0.2, t.cos().mean(1, keepdim=True) + 1)),
    function("norms", lambda t: t.norm(dim=1) + t.norm(p=1, dim=(1, 2), keepdim=True).squeeze(2) + F.normalize(
        t, dim=-1).norm(p=3, dim=1), (2, 2), 2),
    function("log1p_expm1", lambda t: torch.log1p(torch.expm1(t) ** 2)),
)  # fmt: skip

POOLING = (
    pool("max_pool1d", lambda: nn.MaxPool1d(3, stride=2, padding=1), (2, 7)),
    pool("max_pool2d", lambda: nn.MaxPool2d(2), (2, 4, 5)),
    pool("max_pool2d_overlapping", lambda: nn.MaxPool2d(3, stride=1, padding=1), (2, 4, 3)),
    pool("max_pool2d_dilated_ceil", lambda: nn.MaxPool2d(2, stride=2, dilation=2, ceil_mode=True), (2, 5, 6)),
    pool("max_pool3d", lambda: nn.MaxPool3d(2), (2, 2, 4, 3)),
    pool("avg_pool1d", lambda: nn.AvgPool1d(3, stride=2, padding=1), (2, 6)),
    pool("avg_pool2d", lambda: nn.AvgPool2d(2), (2, 4, 4)),
    pool("avg_pool2d_overlapping", lambda: nn.AvgPool2d((3, 2), stride=1, padding=1), (2, 4, 3)),
    pool("avg_pool2d_without_pad", lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (2, 5, 4)),
    pool("avg_pool2d_ceil", lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (2, 6, 4)),
    pool("avg_pool2d_ceil_without_pad", lambda: nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), (2, 5, 3)),
    pool("avg_pool2d_divisor", lambda: nn.AvgPool2d(2, 1, divisor_override=3), (2, 3, 3)),
    pool("avg_pool3d", lambda: nn.AvgPool3d((1, 2, 2), padding=(0, 1, 0)), (2, 2, 4, 3)),
    pool("adaptive_avg_pool1d", lambda: nn.AdaptiveAvgPool1d(3), (2, 7)),
    pool("adaptive_avg_pool2d_global", lambda: nn.AdaptiveAvgPool2d(1), (2, 4, 3)),
    pool("adaptive_avg_pool2d", lambda: nn.AdaptiveAvgPool2d((2, None)), (2, 4, 3)),
    pool("adaptive_avg_pool2d_uneven", lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 5, 4)),
    pool("adaptive_avg_pool3d", lambda: nn.AdaptiveAvgPool3d((1, 2, 2)), (2, 2, 3, 4)),
    pool("adaptive_max_pool1d", lambda: nn.AdaptiveMaxPool1d(3), (2, 7)),
    pool("adaptive_max_pool2d", lambda: nn.AdaptiveMaxPool2d((2, 3)), (2, 5, 4)),
    pool("adaptive_max_pool3d", lambda: nn.AdaptiveMaxPool3d((1, 2, 2)), (2, 2, 3, 4)),
    pool("upsample_nearest", lambda: Apply(lambda t: F.interpolate(F.interpolate(t, scale_factor=2), (3, 2),
                                                                 mode="nearest-exact")), (1, 1, 2)),
    pool("upsample_bilinear", lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"), (1, 2, 3)),
    pool("upsample_bicubic", lambda: nn.Upsample((3, 2), mode="bicubic", align_corners=True), (1, 2, 3)),
    pool("global_max", lambda: Apply(lambda t: t.flatten(2).max(-1).values), (2, 3, 3)),
    pool("global_mean", lambda: Apply(lambda t: t.mean((2, 3))), (2, 3, 3)),
)

SHAPE = (
    function("flips_rolls_turns", lambda t: t.flip(1, 2) * t.roll((1, 1), (1, 2))
             + t.rot90(1, (1, 2)).rot90(3, (1, 2)) * t.rot90(2, (1, 2)), (2, 2), 2),
    function("rolls_of_an_axis_twice", lambda t: t.roll((1, 1), (1, 1)) * t.roll((1, -3, 2), (-1, 1, 2)), (4, 3), 3),
    function("repeats", lambda t: t.repeat(1, 2, 1) * t.repeat_interleave(2, 1)
             + t.unsqueeze(1).repeat(1, 2, 1, 1).flatten(1, 2), (2, 2), 2),
    function("triangles", lambda t: (t @ t.cumsum(1).mT).tril() + (t.flip(1) @ t.mT).triu(1), (2, 3), 2),
    function("diagonals", lambda t: t.diagonal(1, 1, 2) * t.diagonal(-1, 1, 2), (3, 3), 3),
    function("pieces", lambda t: t.unfold(2, 2, 1).tanh() * t[:, :1, :2, None], (2, 2), 3),
    Case("pixel_shuffles", lambda: seq(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2), nn.Tanh(), nn.PixelUnshuffle(2),
                                       nn.ChannelShuffle(2)), (1, 1, 2)),
    Case("unfold_and_fold", lambda: seq(nn.Conv2d(1, 2, 1), nn.Unfold(2, padding=(1, 0)), nn.Tanh(),
                                        nn.Fold((3, 2), 2, padding=(1, 0))), (1, 3, 2)),
    function("index", lambda t: t[:, [1, 0, 1]] * t[:, torch.tensor([1, 0, 0]), 1:2] + t[:, :, [-1]][:, :1]
             + t[torch.arange(t.shape[0], device=t.device), (t[:, :, 0]).argmax(1)].unsqueeze(1).index_select(
                 2, torch.tensor([0, 2], device=t.device)).sum(2, keepdim=True), (2, 3), 3),
    function("gather", lambda t: t.gather(1, t.argsort(1)) + t.sort(2, descending=True).values
             * t.topk(1, 2).values + t.amax((1, 2), keepdim=True) * t.amin(2, keepdim=True)
             + t.median(2, keepdim=True).values, (2, 3), 3),
    function("scatter", lambda t: t.scatter_add(2, t.argsort(2), t.tanh()).index_add(
        1, torch.tensor([1, 1], device=t.device), t, alpha=2), (2, 3), 2),
    function("written_pieces", lambda t: torch.select_scatter(
        torch.slice_scatter(t, t[..., :2].tanh(), 2, 0, 3, 2), t[:, 0].sin(), 1, -1), (2, 2), 3),
    Case("flatten", lambda: seq(nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 2)), (4, 3)),
    Case("unflatten", lambda: seq(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 2))),
    function("view_permute", lambda t: t.view(-1, 2, 2).permute(0, 2, 1).contiguous().tanh()),
    function("squeeze_unsqueeze", lambda t: t.unsqueeze(1).tanh().squeeze(1)),
    function("movedim", lambda t: t.movedim(1, -1).tanh(), (2, 5, 3)),
    function("expand", lambda t: (t.unsqueeze(1).expand(-1, 3, -1)).tanh()),
    function("pad_constant", lambda t: F.pad(t, (1, 2), value=0.7).tanh()),
    function("pad_negative", lambda t: F.pad(t, (-1, 2, 1, -1)), (3, 3)),
    function("pad_reflect", lambda t: F.pad(t, (2, 1), mode="reflect"), (2, 3)),
    function("slice", lambda t: t[:, 1:4:2].tanh()),
    function("slice_negative", lambda t: t[:, -3:].tanh()),
    function("select", lambda t: t[:, 1].tanh() + t[:, -1], (3, 3)),
    function("chunk", lambda t: torch.cat([a * b for a, b in [t.chunk(2, dim=1)]], dim=1)),
    function("flip_halves", lambda t: torch.cat([t[:, 2:], t[:, :2], t[:, 1:2]], dim=1).tanh()),
    function("stack", lambda t: torch.stack([t, t.tanh(), 2 * t], dim=1)),
    Case("cat_branches", lambda: Branches(lambda a, b: torch.cat([a, b], 1), nn.Linear(3, 2), nn.Linear(3, 4))),
    Case(
        "three_branches",
        lambda: Branches(lambda a, b, c: a * b - c / 2, nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)),
    ),
    Case("difference_quotient", lambda: Branches(lambda a, b: (3 - a) / (b**2 + 1), nn.Linear(3, 2), nn.Linear(3, 2))),
    function("mean_sum", lambda t: t.mean(1, keepdim=True).tanh() + t.sum((1, 2), keepdim=True), (2, 3)),
    function("variance", lambda t: t.var(-1), (2, 3)),
    function("standard_deviation", lambda t: t.std((1, 2), correction=0, keepdim=True), (2, 3)),
)

NORMALIZATION = (
    Case("layer_norm", lambda: seq(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))),
    Case("layer_norm_without_bias", lambda: seq(nn.Linear(3, 4), nn.LayerNorm(4, bias=False)), (2, 3)),
    Case("layer_norm_plain", lambda: seq(nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False))),
    Case("layer_norm_two_axes", lambda: seq(nn.Linear(3, 4), nn.LayerNorm((2, 4))), (2, 3)),
    Case("rms_norm", lambda: seq(nn.Linear(3, 4), nn.RMSNorm(4)), (2, 3)),
    Case("group_norm", lambda: seq(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), (2, 3, 2)),
    Case("group_norm_flat", lambda: seq(nn.Linear(3, 4), nn.GroupNorm(2, 4, affine=False))),
    Case("instance_norm", lambda: seq(nn.Conv2d(2, 3, 1), nn.InstanceNorm2d(3, affine=True)), (2, 3, 2)),
    Case("batch_norm_eval", lambda: seq(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU()), (2, 3, 2)),
    Case("batch_norm_eval_plain", lambda: seq(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))),
)

LOSS = (
    classifier("cross_entropy", nn.CrossEntropyLoss, classes(3)),
    classifier("cross_entropy_sum", lambda: nn.CrossEntropyLoss(reduction="sum"), classes(3)),
    classifier("cross_entropy_weights", lambda: nn.CrossEntropyLoss(weights(0.3, 2.0, 0.9)), classes(3)),
    classifier("cross_entropy_ignore", nn.CrossEntropyLoss, classes(3, ignore=-100)),
    classifier("cross_entropy_ignore_class", lambda: nn.CrossEntropyLoss(ignore_index=1), classes(3, ignore=1)),
    classifier("cross_entropy_smoothing", lambda: nn.CrossEntropyLoss(label_smoothing=0.2), classes(3)),
    classifier(
        "cross_entropy_everything",
        lambda: nn.CrossEntropyLoss(weights(0.3, 2.0, 0.9), ignore_index=0, label_smoothing=0.1),
        classes(3, ignore=0),
    ),
    classifier("cross_entropy_probabilities",
               lambda: nn.CrossEntropyLoss(weights(0.3, 2.0, 0.9), label_smoothing=0.1), probabilities),
    Case("cross_entropy_positions", lambda: seq(nn.Conv1d(2, 3, 2), nn.Tanh()), (2, 4), classes(3, 3, ignore=-100),
         nn.CrossEntropyLoss),
    Case("cross_entropy_image", lambda: nn.Conv2d(2, 3, 1), (2, 2, 2), classes(3, 2, 2),
         lambda: nn.CrossEntropyLoss(weights(0.3, 2.0, 0.9), reduction="sum")),
    Case("cross_entropy_one_sample", lambda: nn.Linear(3, 3), (3,), classes(3), nn.CrossEntropyLoss, batch=1),
    Case("nll", lambda: seq(nn.Linear(3, 3), nn.LogSoftmax(1)), (3,), classes(3, ignore=-100), nn.NLLLoss, batch=4),
    Case("nll_weights_image", lambda: seq(nn.Conv2d(2, 3, 1), nn.LogSoftmax(1)), (2, 2, 2), classes(3, 2, 2),
         lambda: nn.NLLLoss(weights(0.3, 2.0, 0.9))),
    classifier("l1", nn.L1Loss, normal),
    classifier("mse_sum", lambda: nn.MSELoss(reduction="sum"), normal),
    classifier("huber", lambda: nn.HuberLoss(delta=0.7), normal),
    classifier("smooth_l1", lambda: nn.SmoothL1Loss(beta=0.6), normal),
    classifier("smooth_l1_sum", lambda: nn.SmoothL1Loss(reduction="sum", beta=0.0), normal),
    classifier("bce_with_logits", nn.BCEWithLogitsLoss, unit),
    classifier(
        "bce_with_logits_weights",
        lambda: nn.BCEWithLogitsLoss(weights(1.0, 0.2, 3.0), pos_weight=weights(0.5, 2.0, 1.5), reduction="sum"),
        unit,
    ),
    classifier("kl_div", lambda: nn.KLDivLoss(reduction="sum"), unit),
    classifier("poisson", nn.PoissonNLLLoss, unit),
    classifier("soft_margin", nn.SoftMarginLoss, lambda batch, output: torch.randn_like(output).sign()),
    Case("bce", lambda: seq(nn.Linear(3, 2), nn.Sigmoid()), (3,), unit, nn.BCELoss),
    Case("mse_rank4", lambda: nn.Conv2d(2, 2, 2), (2, 3, 3)),
    classifier("loss_scaled", lambda: Written(lambda f, y: 2.5 * F.mse_loss(f, y)), normal),
    classifier("loss_by_hand", lambda: Written(lambda f, y: ((f - y) ** 2).mean()), normal),
    classifier("loss_by_hand_batch", lambda: Written(lambda f, y: ((f - y) ** 2).sum() / f.shape[0]), normal),
    classifier("loss_unreduced", lambda: Written(lambda f, y: F.cross_entropy(f, y, reduction="none").mean()),
               classes(3)),
    classifier("loss_softmax", lambda: Written(lambda f, y: -(f.log_softmax(1) * y).sum(1).mean()), probabilities),
)  # fmt: skip

LOOKUP = (
    Case("embedding", lambda: seq(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 2)), (4,), prepare=tokens(5)),
    Case("embedding_padding", lambda: nn.Embedding(5, 2, padding_idx=3), (2, 3), prepare=tokens(5)),
    Case("embedding_one_token", lambda: seq(nn.Embedding(6, 3), nn.Linear(3, 2)), (), prepare=tokens(6)),
    Case("embedding_tied", lambda: TiedEmbedding(padding=0), (3,), classes(4), nn.CrossEntropyLoss,
         prepare=tokens(4)),
)  # fmt: skip

ATTENTION = (
    function("attention_bias", lambda t: F.scaled_dot_product_attention(t, t.sin(), t, t, scale=0.7), (2, 2), 2),
)  # fmt: skip

FIRST_ORDER = frozenset(
    """norms other_bases inverse_functions clamp_to_tensors maximum_minimum flips_rolls_turns rolls_of_an_axis_twice
    repeats triangles diagonals pieces written_pieces unfold_and_fold index upsample_bicubic poisson kl_div""".split()
)
"""Of these rows the Jacobians and the first-order quantities are tested; the others are made of the same diagrams."""
EVERY = (
    LINEAR + EINSUM + CONVOLUTION + ACTIVATION + POOLING + SHAPE + NORMALIZATION + LOOKUP + ATTENTION + LOSS
)
CASES = tuple(case for case in EVERY if case.name not in FIRST_ORDER)

RANDOM_CASES = (
    Case("dropout", lambda: seq(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)), train=True),
    Case("dropout_everything", lambda: seq(nn.Linear(3, 4), nn.Dropout(1.0), nn.Linear(4, 2)), train=True),
    Case("dropout2d", lambda: seq(nn.Conv2d(2, 6, 1), nn.Dropout2d(0.4), nn.Conv2d(6, 2, 1)), (2, 2, 2), train=True),
    Case("alpha_dropout", lambda: seq(nn.Linear(3, 8), nn.AlphaDropout(0.4), nn.Linear(8, 2)), train=True),
)
"""In train mode: the program draws as torch does on the CPU, so with the same seed the masks agree."""
