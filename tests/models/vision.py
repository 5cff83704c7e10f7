"""Rows of the zoo: images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .zoo import BCE, CE, Net, Row, binary, ids, normal, seq, uniform


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return seq(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def head(width: int, classes: int = 3) -> nn.Sequential:
    return seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def lenet() -> nn.Module:
    features = seq(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh())
    return seq(features, nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def vgg() -> nn.Module:
    return seq(conv(2, 4), conv(4, 4), nn.MaxPool2d(2), conv(4, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3))


class Basic(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, 3, stride), conv(outputs, outputs)[:2]
        self.shortcut = conv(inputs, outputs, 1, stride)[:2] if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x), inplace=True)


def resnet() -> nn.Module:
    return seq(conv(2, 3), Basic(3, 3), Basic(3, 4, 2), head(4))


def preactivation() -> nn.Module:
    """Norm and activation first, in groups (He et al. 2016; ResNeXt)."""
    body = seq(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2))
    return Net(
        lambda m, x: m.head((lambda h: h + m.body(h))(m.stem(x))), stem=nn.Conv2d(2, 4, 1), body=body, head=head(4)
    )


def densenet() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        for layer in (m.a, m.b, m.c):
            x = torch.cat([x, layer(x)], 1)
        return m.head(m.down(x))

    return Net(
        forward, a=conv(2, 2), b=conv(4, 2), c=conv(6, 2), down=seq(conv(8, 4, 1), nn.AvgPool2d(2)), head=head(4)
    )


def inception() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.one(x), m.three(x), m.five(x), m.pooled(x)], 1))

    pooled = seq(nn.MaxPool2d(3, 1, 1), conv(2, 2, 1))
    return Net(
        forward,
        one=conv(2, 2, 1),
        three=conv(2, 2),
        five=seq(conv(2, 2, 1), conv(2, 2, 5)),
        pooled=pooled,
        head=head(8),
    )


class Excite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


def mobilenet() -> nn.Module:
    """Depthwise separable, with an inverted residual (Sandler et al. 2018)."""
    body = seq(nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU6(), nn.Conv2d(6, 3, 1))
    return Net(
        lambda m, x: m.head((lambda h: h + m.body(h))(m.stem(x))), stem=conv(2, 3, 3, 2), body=body, head=head(3)
    )


def efficientnet() -> nn.Module:
    body = seq(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.SiLU())
    stem, tail = nn.Conv2d(2, 3, 3, 2, 1), seq(Excite(6), nn.Conv2d(6, 3, 1))
    return Net(
        lambda m, x: m.head((lambda h: h + m.tail(m.body(h)))(m.stem(x))), stem=stem, body=body, tail=tail, head=head(3)
    )


class Norm2d(nn.LayerNorm):
    """Layer norm over channels, [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Liu et al. 2022."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), Norm2d(width)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(self.depthwise(x)))))


def convnext() -> nn.Module:
    return seq(nn.Conv2d(2, 4, 2, 2), ConvNext(4), Norm2d(4), head(4))


def shufflenet() -> nn.Module:
    shuffled = nn.Sequential(
        nn.Conv2d(4, 4, 1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    )
    return seq(nn.Conv2d(2, 4, 1), nn.Hardswish(), shuffled, head(4))


def squeezenet() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.relu(m.squeeze(x))
        return m.head(F.relu(torch.cat([m.one(x), m.three(x)], 1)))

    three = nn.Conv2d(2, 2, 3, padding=1)
    return Net(forward, squeeze=nn.Conv2d(3, 2, 1), one=nn.Conv2d(2, 2, 1), three=three, head=head(4))


def unet() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        high = m.high(x)
        low = m.up(m.low(F.max_pool2d(high, 2)))
        return m.out(m.join(torch.cat([high, low], 1)))

    low, up = conv(3, 4), nn.ConvTranspose2d(4, 3, 2, 2)
    return Net(forward, high=conv(1, 3), low=low, up=up, join=conv(6, 3), out=nn.Conv2d(3, 1, 1))


def segmenter() -> nn.Module:
    """Dilated convolutions and bilinear interpolation (DeepLab); a class for every pixel."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = m.head(torch.cat([m.near(h), m.far(h), h.mean((2, 3), keepdim=True).expand_as(h)], 1))
        return F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)

    near, far = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 3, padding=2, dilation=2)
    return Net(forward, stem=conv(2, 3, 3, 2), near=near, far=far, head=nn.Conv2d(7, 3, 1))


def super_resolution() -> nn.Module:
    return seq(nn.Conv2d(1, 4, 3, padding=1), nn.PReLU(4), nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2))


def generator() -> nn.Module:
    """DCGAN's: from a code to an image."""
    up = seq(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh())
    return seq(nn.Unflatten(1, (3, 1, 1)), up)


def discriminator() -> nn.Module:
    return seq(
        nn.Conv2d(1, 3, 4, 2, 1), nn.LeakyReLU(0.2), nn.InstanceNorm2d(3, affine=True), nn.Flatten(), nn.Linear(27, 1)
    )


def conv3d() -> nn.Module:
    return seq(nn.Conv3d(1, 2, 2), nn.ELU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 3))


def spatial_transformer() -> nn.Module:
    """Jaderberg et al. 2015: the model samples its own input on an affine grid."""

    def forward(m: Net, x: Tensor) -> Tensor:
        theta = m.where(x).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return m.net(F.grid_sample(x, grid, align_corners=False))

    return Net(forward, where=seq(nn.Flatten(), nn.Linear(36, 6)), net=seq(nn.Flatten(), nn.Linear(36, 3)))


def local_response() -> nn.Module:
    """AlexNet's norm and dropout."""
    return seq(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.LocalResponseNorm(2), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3))


IMAGE, LABEL = normal(2, 6, 6), ids(3)
ROWS = (
    Row("LeNet", lenet, normal(1, 8, 8), LABEL, CE),
    Row("AlexNet", local_response, IMAGE, LABEL, CE),
    Row("VGG", vgg, normal(2, 8, 8), LABEL, CE),
    Row("ResNet", resnet, IMAGE, LABEL, CE),
    Row("ResNet, pre-activation, groups", preactivation, IMAGE, LABEL, CE),
    Row("DenseNet", densenet, IMAGE, LABEL, CE),
    Row("Inception", inception, IMAGE, LABEL, CE),
    Row("SqueezeNet", squeezenet, normal(3, 5, 5), LABEL, CE),
    Row("ShuffleNet", shufflenet, IMAGE, LABEL, CE),
    Row("MobileNet", mobilenet, IMAGE, LABEL, CE),
    Row("EfficientNet", efficientnet, IMAGE, LABEL, CE),
    Row("ConvNeXt", convnext, IMAGE, LABEL, CE),
    Row("U-Net", unet, normal(1, 4, 4), binary(1, 4, 4), BCE),
    Row("segmentation, dilated", segmenter, IMAGE, ids(3, 6, 6), CE),
    Row("super-resolution", super_resolution, normal(1, 4, 4), normal(1, 8, 8)),
    Row("GAN generator", generator, normal(3), uniform(1, 4, 4)),
    Row("GAN discriminator", discriminator, normal(1, 6, 6), binary(1), BCE),
    Row("3-D convolutions", conv3d, normal(1, 4, 4, 4), LABEL, CE),
    Row("spatial transformer", spatial_transformer, normal(1, 6, 6), LABEL, CE),
)
