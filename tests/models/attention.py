"""Rows of the zoo: transformers, of text and of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .zoo import CE, Net, Row, ids, normal, seq, several, tokenwise

WORDS, WIDTH, LENGTH = 7, 4, 4


class Attention(nn.Module):
    """Self-attention, or of x to a memory; one projection each, heads of width 2."""

    def __init__(self, causal: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if memory is None else memory).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q(x), k, v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).flatten(2))


def feed_forward(width: int = WIDTH) -> nn.Sequential:
    return seq(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))


class Block(nn.Module):
    """Pre-norm; with a memory, cross-attention between."""

    def __init__(self, causal: bool = False, cross: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3 if cross else 2)])
        self.attention, self.mlp = Attention(causal, width), feed_forward(width)
        self.cross = Attention(width=width) if cross else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), memory)
        return x + self.mlp(self.norms[1](x))


class PostNorm(Block):
    """The first transformer's order (Vaswani et al. 2017)."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + self.mlp(x))


def bert() -> nn.Module:
    """Tokens, segments and positions; masked words by a head that shares no table."""

    def forward(m: Net, tokens: Tensor, segments: Tensor) -> Tensor:
        h = m.norm(m.words(tokens) + m.segments(segments) + m.positions)
        return m.head(m.block(h))

    tables = {"words": nn.Embedding(WORDS, WIDTH, padding_idx=0), "segments": nn.Embedding(2, WIDTH)}
    head = seq(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))
    return Net(
        forward, **tables, positions=torch.randn(LENGTH, WIDTH), norm=nn.LayerNorm(WIDTH), block=PostNorm(), head=head
    )


def classifier_with_mask() -> nn.Module:
    """Padding is masked out by the sample; the pooled first token is classified."""

    def forward(m: Net, tokens: Tensor, mask: Tensor) -> Tensor:
        h = m.words(tokens)
        q, k, v = m.qkv(m.norm(h)).chunk(3, 2)
        scores = (q @ k.mT / 2).masked_fill(mask[:, None] == 0, torch.finfo(q.dtype).min)
        return m.out(torch.tanh(m.pool((h + scores.softmax(2) @ v)[:, 0])))

    parts = {"words": nn.Embedding(WORDS, WIDTH), "norm": nn.LayerNorm(WIDTH), "qkv": nn.Linear(WIDTH, 3 * WIDTH)}
    return Net(forward, **parts, pool=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, 3))


class GPT(nn.Module):
    """The head is the table of words, if tied (Radford et al. 2019)."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = seq(Block(causal=True), Block(causal=True)), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(h)))


class T5(nn.Module):
    """Encoder, decoder, a bias for each distance, the table of words in three places (Raffel et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.distance = nn.Embedding(WORDS, WIDTH), nn.Embedding(2 * LENGTH - 1, 2)
        self.q, self.kv, self.out = (
            nn.Linear(WIDTH, WIDTH, False),
            nn.Linear(WIDTH, 2 * WIDTH, False),
            nn.Linear(WIDTH, WIDTH),
        )
        self.norm, self.decoder = nn.RMSNorm(WIDTH), Block(causal=True, cross=True)

    def encoder(self, x: Tensor) -> Tensor:
        h, steps = self.norm(x), torch.arange(LENGTH)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(h), *self.kv(h).chunk(2, -1)))
        bias = self.distance(steps[:, None] - steps + LENGTH - 1).permute(2, 0, 1)
        return x + self.out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = self.decoder(self.words(target), self.encoder(self.words(source)))
        return F.linear(h * WIDTH**-0.5, self.words.weight)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding of [N, H, T, D] (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / 100 ** (torch.arange(half, dtype=x.dtype) / half)
    angles = torch.cat([angles, angles], 1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


class Llama(nn.Module):
    """RMS norms, rotary embedding, two query heads on one key, SwiGLU (Touvron et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.q, self.out = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, 4, bias=False), nn.Linear(WIDTH, 4, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 6, bias=False), nn.Linear(WIDTH, 6, bias=False)
        self.down = nn.Linear(6, WIDTH, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH) for _ in range(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        h = self.norms[0](x)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (self.q(h), self.k(h), self.v(h)))
        k, v = (t.repeat_interleave(2, 1) for t in (rotated(k), v))
        x = x + self.out(F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return self.head(self.norms[2](x + self.down(F.silu(self.gate(h)) * self.up(h))))


class ViT(nn.Module):
    """Patches, a class token, positions (Dosovitskiy et al. 2021); DeiT has a token and a head more."""

    def __init__(self, distilled: bool = False) -> None:
        super().__init__()
        extra = 2 if distilled else 1
        self.patches, self.tokens = nn.Conv2d(2, WIDTH, 2, 2), nn.Parameter(torch.randn(1, extra, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 4 + extra, WIDTH))
        self.block, self.norm = Block(), nn.LayerNorm(WIDTH)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 3) for _ in range(extra)])

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.tokens.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        h = self.norm(self.block(h))
        each = [head(h[:, k]) for k, head in enumerate(self.heads)]
        return sum(each[1:], each[0]) / len(each)


class Swin(nn.Module):
    """Attention in windows of 2 by 2, shifted by one, with a bias in each; patches are merged (Liu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention, self.shifted = nn.Conv2d(2, WIDTH, 1), Attention(), Attention()
        self.norm, self.merge, self.out = nn.LayerNorm(WIDTH), nn.Linear(4 * WIDTH, 6, bias=False), nn.Linear(6, 3)

    def windows(self, x: Tensor, attention: nn.Module) -> Tensor:
        n = x.shape[0]
        h = x.view(n, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(n * 4, 4, WIDTH)
        return attention(h).view(n, 2, 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        x = x + self.windows(self.norm(x), self.attention)
        x = x + self.windows(x.roll((-1, -1), (1, 2)), self.shifted).roll((1, 1), (1, 2))
        corners = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.out(F.gelu(self.merge(corners)).mean((1, 2)))


def mixer() -> nn.Module:
    """Tolstikhin et al. 2021."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.patches(x).flatten(2).mT
        h = h + m.tokens(m.norm(h).mT).mT
        return m.head((h + m.channels(h)).mean(1))

    mlps = {"tokens": feed_forward(4), "channels": feed_forward()}
    return Net(forward, patches=nn.Conv2d(2, WIDTH, 2, 2), norm=nn.LayerNorm(WIDTH), **mlps, head=nn.Linear(WIDTH, 3))


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True, norm_first=True)
    return seq(
        nn.Embedding(WORDS, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 3)
    )


def perceiver() -> nn.Module:
    """Learned queries read the input (Jaegle et al. 2021)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        queries = m.queries.expand(x.shape[0], -1, -1)
        h = queries + m.read(queries, m.inside(x))
        return m.out(m.block(h).mean(1))

    parts = {"inside": nn.Linear(3, WIDTH), "read": Attention(), "block": Block(), "out": nn.Linear(WIDTH, 3)}
    return Net(forward, queries=torch.randn(2, WIDTH), **parts)


def clip() -> nn.Module:
    """An image and a text, one score each."""

    def forward(m: Net, image: Tensor, text: Tensor) -> Tensor:
        a, b = F.normalize(m.image(image), dim=1), F.normalize(m.text(text).mean(1), dim=1)
        return (a * b).sum(1) * m.scale.exp()

    image = seq(nn.Conv2d(2, 3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, WIDTH))
    return Net(forward, image=image, text=seq(nn.Embedding(WORDS, WIDTH), Block()), scale=torch.tensor(0.5))


TEXT, IMAGE = ids(WORDS, LENGTH), normal(2, 4, 4)
ROWS = (
    Row("BERT", bert, several(TEXT, ids(2, LENGTH)), TEXT, tokenwise),
    Row(
        "BERT classifier, padding mask",
        classifier_with_mask,
        several(TEXT, lambda n: (torch.arange(LENGTH) < torch.tensor([[4], [2], [3]])[:n]).long()),
        ids(3),
        CE,
    ),
    Row("GPT", lambda: GPT(False), TEXT, TEXT, tokenwise),
    Row("GPT, tied", lambda: GPT(True), TEXT, TEXT, tokenwise),
    Row("T5", T5, several(TEXT, TEXT), TEXT, tokenwise),
    Row("Llama", Llama, TEXT, TEXT, tokenwise),
    Row("nn.TransformerEncoder", encoder_layer, TEXT, ids(3, LENGTH), tokenwise),
    Row("Perceiver", perceiver, normal(5, 3), ids(3), CE),
    Row("ViT", ViT, IMAGE, ids(3), CE),
    Row("DeiT, distilled", lambda: ViT(distilled=True), IMAGE, ids(3), CE),
    Row("Swin", Swin, IMAGE, ids(3), CE),
    Row("MLP-Mixer", mixer, IMAGE, ids(3), CE),
    Row("CLIP score", clip, several(IMAGE, TEXT), normal()),
)
