"""Convolutions with a group for each sample: its kernels are its own, as in a modulated convolution."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import UnsupportedError

from ... import oracle
from ...capturing import Function
from ...oracle_second import diag_ggn, hessian_diag
from ...rehearsing import layers, refused

CE = nn.CrossEntropyLoss()


class Modulated(nn.Module):
    """Kernels [N, out, in, …] of an image, by its mean; `of` makes the positions of the output."""

    def __init__(self, of: Callable[..., Tensor], *kernel: int) -> None:
        super().__init__()
        self.of = of
        self.weight, self.style, self.head = nn.Parameter(torch.randn(*kernel)), nn.Linear(4, 4), nn.LazyLinear(3)
        self.shift = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.of(self, x, 1 + self.style(x.mean((2, 3))))
        return self.head(y.tanh().flatten(2).mean(2))


def styled(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """With strides, dilation and demodulation."""
    size, *shape = x.shape
    w = m.weight[None] * style[:, None, :, None, None]
    w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    flat, wide = x.reshape(1, -1, *shape[1:]), w.reshape(-1, *m.weight.shape[1:])
    y = F.conv2d(flat, wide, padding=1, stride=2, dilation=(1, 2), groups=size)
    return y.reshape(size, -1, *y.shape[2:])


def shifted(m: Any, x: Tensor, style: Tensor) -> Tensor:
    w = (m.weight[None] * style[:, None, :, None, None]).flatten(0, 1)
    y = F.conv2d(x.view(1, -1, *x.shape[2:]), w, m.shift(style).flatten(), groups=len(x), padding="same")
    return y.view(len(x), -1, *y.shape[2:])


def correlated(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Channel by channel, as trackers correlate a template."""
    w = (m.weight[None] * style[:, :, None, None, None]).reshape(-1, 1, *m.weight.shape[2:])
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w, groups=len(x) * x.shape[1])
    return y.reshape(len(x), -1, *y.shape[2:])


def line(m: Any, x: Tensor, style: Tensor) -> Tensor:
    w = (m.weight[None] * style[:, None, :, None]).flatten(0, 1)
    return F.conv1d(x.reshape(1, -1, 20), w, groups=len(x), padding=1).reshape(len(x), -1, 20)


def enlarged(m: Any, x: Tensor, style: Tensor) -> Tensor:
    w = (m.weight[None] * style[:, :, None, None, None]).flatten(0, 1)
    flat = x.reshape(1, -1, *x.shape[2:])
    y = F.conv_transpose2d(flat, w, stride=2, padding=1, output_padding=1, groups=len(x))
    return y.reshape(len(x), -1, *y.shape[2:])


def enlarged_by_groups(m: Any, x: Tensor, style: Tensor) -> Tensor:
    w = (m.weight[None] * style[:, :, None, None]).flatten(0, 1)
    y = F.conv_transpose1d(x.reshape(1, -1, 20), w, m.shift(style).flatten(), 3, groups=2 * len(x))
    return y.reshape(len(x), -1, y.shape[2])


CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "styled": (styled, (6, 4, 3, 2)),
    "shifted": (shifted, (6, 4, 3, 3)),
    "correlated": (correlated, (4, 1, 2, 3)),
    "line": (line, (6, 4, 3)),
    "enlarged": (enlarged, (4, 5, 3, 3)),
    "enlarged by groups": (enlarged_by_groups, (4, 3, 2)),
}


def images(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, 4, 5, 4, generator=generator).double(), torch.arange(size) % 3


@pytest.mark.parametrize("name", CASES)
def test_right(name: str) -> None:
    """For other batches, too, and second derivatives, as both operands have them."""
    torch.manual_seed(0)
    (x, y), quantities = images(4), [tn.Grad(), tn.BatchGrad(), tn.DiagGGN(), tn.HessianDiag()]
    of, kernel = CASES[name]
    model = Modulated(of, *kernel).double()
    model(x)
    program = tn.compile(model, CE, (x[:2], y[:2]), quantities)
    for size in (1, 4):
        result, own = program(x[:size], y[:size]), (model, CE, x[:size], y[:size])
        wanted = {"grad": oracle.grad(*own), "batch_grad": oracle.batch_grad(*own)}
        wanted |= {"diag_ggn": diag_ggn(*own), "hessian_diag": hessian_diag(*own)} if size == 4 else {}
        for key, expected in wanted.items():
            for parameter, value in expected.items():
                torch.testing.assert_close(result[key][parameter], value)


def normed(m: Any, x: Tensor, weights: bool = True) -> Tensor:
    y = m.c(x)
    size, channels = y.shape[:2]
    own = (m.g.repeat(size), (m.g * m.g).repeat(size)) if weights else (None, None)
    y = F.batch_norm(y.reshape(1, -1, *y.shape[2:]), None, None, *own, True)
    return y.view(size, channels, -1).tanh().mean(2)


def adapted(m: Any, x: Tensor) -> Tensor:
    """As adaptive instance norms are published: a scale and a shift of each sample."""
    y = m.c(x)
    size, channels = y.shape[:2]
    scale, shift = m.style(x.mean((2, 3))).chunk(2, 1)
    running = m.mean.repeat(size), m.var.repeat(size)
    flat = F.batch_norm(
        y.contiguous().view(1, size * channels, *y.shape[2:]), *running, scale.reshape(-1), shift.reshape(-1), True, 0.1
    )
    return flat.view(size, channels, *y.shape[2:]).tanh().mean((2, 3))


def evaluated(m: Any, x: Tensor) -> Tensor:
    """By statistics that are given: no instance norm."""
    y = m.c(x)
    given = (m.mean + 0.5).repeat(len(y)), (2 * m.var).repeat(len(y))
    return F.batch_norm(y.reshape(1, -1, *y.shape[2:]), *given).view(len(y), 3, -1).tanh().mean(2)


def plain(m: Any, x: Tensor) -> Tensor:
    return normed(m, x, weights=False)


@pytest.mark.parametrize("forward", [normed, plain, adapted, evaluated])
def test_a_batch_norm_of_each_sample(forward: Callable[..., Tensor]) -> None:
    """Its samples are channels: that is an instance norm, if it takes statistics."""
    torch.manual_seed(0)
    model = Function(forward, c=nn.Conv2d(4, 3, 2), style=nn.Linear(4, 6))
    model.g = nn.Parameter(torch.randn(3))
    model.register_buffer("mean", torch.zeros(3))
    model.register_buffer("var", torch.ones(3))
    (x, y), own = images(4), (model.double(), CE, *images(4))
    program = tn.compile(model, CE, (x[:2], y[:2]), [tn.Grad(), tn.BatchGrad(), tn.HessianDiag()])
    result = program(x, y)
    wanted = {"grad": oracle.grad(*own), "batch_grad": oracle.batch_grad(*own), "hessian_diag": hessian_diag(*own)}
    for key, expected in wanted.items():
        for parameter, value in expected.items():
            torch.testing.assert_close(result[key][parameter], value)


def kernels(x: Tensor, *size: int) -> Tensor:
    """[N·2, 2, *size] of [N, 4, 5, 4]."""
    numbers = torch.arange(1.0, 1 + 4 * prod(size), dtype=x.dtype)
    return (x.mean((1, 2, 3))[:, None] * numbers).reshape(-1, 2, *size)


def in_another_order(m: Any, x: Tensor) -> Tensor:
    """Samples next to those of another channel."""
    flat = m.c(x)[:, :2].transpose(0, 1).reshape(1, -1, 4, 3)
    return F.conv2d(flat, kernels(x, 1, 1), groups=len(x)).reshape(len(x), -1)[:, :3]


def uneven(m: Any, x: Tensor) -> Tensor:
    """One position more behind than in front."""
    flat = m.c(x)[:, :2].reshape(1, -1, 4, 3)
    return F.conv2d(flat, kernels(x, 1, 2), padding="same", groups=len(x)).reshape(len(x), -1)[:, :3]


def twice(m: Any, x: Tensor) -> Tensor:
    flat = m.c(x)[:, :2].reshape(1, -1, 4, 3)
    both = torch.cat([flat, flat.sin()])
    return F.conv2d(both, kernels(x, 1, 1), groups=len(x)).sum(0).reshape(len(x), -1)[:, :3]


def normed_twice(m: Any, x: Tensor) -> Tensor:
    """Of both parts together."""
    flat = m.c(x).reshape(1, -1, 4, 3)
    both = F.batch_norm(torch.cat([flat, flat.sin()]), None, None, training=True)
    return both.sum(0).reshape(len(x), -1)[:, :3]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (in_another_order, "conv2d.* in different orders, 2·N and N·2"),
        (uneven, "conv2d.* finds the batch on axis 1"),
        (twice, "conv2d.* finds the batch on axis 1"),
        (normed_twice, "batch_norm.* is in train mode, so it mixes samples"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_not_of_one_sample(forward: Callable[..., Tensor], message: str) -> None:
    model = Function(forward, c=nn.Conv2d(4, 3, 2)).double()
    with pytest.raises(UnsupportedError, match=f"(?s){message}"):
        tn.compile(model, CE, images(4), [tn.BatchGrad()])


def test_samples_as_positions() -> None:
    """A kernel that sees several of them is refused."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.conv1d(m.a(x)[None], m.b.weight[0, 0].expand(len(x), len(x), 1))[0]

    refused(Function(forward, **layers()), "two batch axes")
