"""What people train today, small: transformers, residual and U-shaped nets, a recurrent net, an MLP, experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
Data = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Modern:
    """A model in evaluation mode, its loss and random data for a batch size."""

    name: str
    model: Callable[[], nn.Module]
    loss: Loss
    data: Data
    batch: int


class Block(nn.Module):
    """Attention and two linear layers, norms first."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads, self.causal = nn.LayerNorm(width), nn.LayerNorm(width), heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class ViT(nn.Module):
    """Patches of `patch` × `patch` pixels of an image of `side` × `side`, a class token, a table of positions."""

    def __init__(
        self, blocks: int = 4, width: int = 192, heads: int = 3, classes: int = 10, patch: int = 4, side: int = 32
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """A causal transformer whose head is its table of words."""

    def __init__(self, blocks: int = 4, width: int = 128, heads: int = 4, words: int = 256, length: int = 64) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(self.words(tokens) + positions)))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a head on the mean over positions."""

    def __init__(self, blocks: int = 2, width: int = 64, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, blocks), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Residual(nn.Module):
    """Two convolutions with batch norms, and what goes past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(i, outputs, 3, s, 1, bias=False) for i, s in ((inputs, stride), (outputs, 1)))
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        past = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.past = past if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.past(x) + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


def resnet18() -> nn.Module:
    """For images of 32 × 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Bottleneck(nn.Module):
    """Three convolutions with batch norms, the middle one 3 × 3, and what goes past them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, kernel, step in ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)):
            layers += [nn.Conv2d(i, o, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.inner = nn.Sequential(*layers[:-1])
        past = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.past = past if stride > 1 or inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.past(x) + self.inner(x))


def resnet50() -> nn.Module:
    """For images of 224 × 224."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(count):
            layers.append(Bottleneck(inputs, width, 1 if k else stride))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def gpt2() -> nn.Module:
    """124 million parameters, its head its table of words."""
    return GPT(blocks=12, width=768, heads=12, words=50257, length=128)


def vit_b16() -> nn.Module:
    """86 million parameters, for images of 224 × 224."""
    return ViT(blocks=12, width=768, heads=12, classes=1000, patch=16, side=224)


class UNet(nn.Module):
    """Down twice and up again, with group norms."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(_pair(i, o) for i, o in ((3, width), (width, 2 * width), (2 * width, 4 * width)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in (2 * width, width))
        self.join = nn.ModuleList(_pair(2 * w, w) for w in (2 * width, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for k, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2) if k else x)
            kept.append(x)
        for up, join, past in zip(self.up, self.join, kept[-2::-1], strict=True):
            x = join(torch.cat([past, up(x)], 1))
        return self.head(x)


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (inputs, outputs):
        layers += [nn.Conv2d(i, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU()]
    return nn.Sequential(*layers)


class Recurrent(nn.Module):
    """`nn.LSTM` with a head on the last position."""

    def __init__(self, inputs: int = 64, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(inputs, hidden, batch_first=True), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Experts(nn.Module):
    """Two of four experts for each token, chosen by a router, weights gathered."""

    def __init__(self, width: int = 32, experts: int = 4, chosen: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.inner, self.router = nn.Linear(width, width), nn.Linear(width, experts)
        self.wide = nn.Parameter(0.2 * torch.randn(experts, width, 2 * width))
        self.narrow = nn.Parameter(0.2 * torch.randn(experts, 2 * width, width))
        self.head, self.chosen = nn.Linear(width, classes), chosen

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.inner(x))
        weights, which = self.router(x).softmax(-1).topk(self.chosen, -1)
        hidden = F.gelu(torch.einsum("nti,ntkij->ntkj", x, self.wide[which]))
        mixed = torch.einsum("ntkj,ntkji,ntk->nti", hidden, self.narrow[which], weights)
        return self.head((x + mixed).mean(1))


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for width in (256, 512, 512, 512):
        layers += [nn.Linear(width, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _labels(*shape: int, classes: int = 10) -> Data:
    return lambda batch: (torch.randn(batch, *shape), torch.randint(classes, (batch,)))


def _tokens(words: int, length: int) -> Data:
    return lambda batch: (torch.randint(words, (batch, length)), torch.randint(words, (batch, length)))


def _pixels(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(4, (batch, 32, 32))


def positions_loss(output: Tensor, y: Tensor) -> Tensor:
    """The mean over samples and positions."""
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


MODERN = {
    row.name: row
    for row in (
        Modern("GPT", GPT, positions_loss, _tokens(256, 64), 8),
        Modern("ViT", ViT, F.cross_entropy, _labels(3, 32, 32), 32),
        Modern("encoder", Encoder, F.cross_entropy, _labels(32, 64), 16),
        Modern("ResNet-18", resnet18, F.cross_entropy, _labels(3, 32, 32), 8),
        Modern("U-Net", UNet, F.cross_entropy, _pixels, 8),
        Modern("LSTM", Recurrent, F.cross_entropy, _labels(20, 64), 16),
        Modern("MLP", mlp, F.cross_entropy, _labels(256), 64),
        Modern("experts", Experts, F.cross_entropy, _labels(16, 32), 16),
    )
}

LARGE = {
    row.name: row
    for row in (
        Modern("GPT-2", gpt2, positions_loss, _tokens(50257, 128), 2),
        Modern("ViT-B/16", vit_b16, F.cross_entropy, _labels(3, 224, 224, classes=1000), 2),
        Modern("ResNet-50", resnet50, F.cross_entropy, _labels(3, 224, 224, classes=1000), 4),
    )
}
"""Of real size, with random weights."""
