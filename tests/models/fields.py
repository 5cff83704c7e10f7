"""Rows of the zoo: nets of single fields of work: forecasts, games, tables, speech, densities, operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, Block
from .functions import mlp
from .zoo import BCE, CE, Net, Row, binary, ids, normal, seq, several, tokenwise, uniform

# Forecasts and games


def deep_ar() -> nn.Module:
    """Mean and scale of the next value, from an LSTM over the past (Salinas et al. 2020)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        mean, scale = m.out(m.layer(x)[0]).chunk(2, 2)
        return torch.cat([mean, F.softplus(scale)], 2)

    return Net(forward, layer=nn.LSTM(2, 3, batch_first=True), out=nn.Linear(3, 2))


def normal_loss(output: Tensor, y: Tensor) -> Tensor:
    mean, scale = output.chunk(2, 2)
    return (0.5 * ((y - mean) / scale).square() + scale.log()).mean()


def n_beats() -> nn.Module:
    """Each block explains a part of the past and of the future (Oreshkin et al. 2020)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        forecast: Tensor | float = 0.0
        for block in m.blocks:
            past, future = block(x).split([5, 2], 1)
            x, forecast = x - past, forecast + future
        assert isinstance(forecast, Tensor)
        return forecast

    return Net(forward, blocks=nn.ModuleList([mlp(5, 4, 7, act=nn.ReLU) for _ in range(2)]))


def gated_residual() -> nn.Module:
    """Of the temporal fusion transformer (Lim et al. 2021)."""

    def forward(m: Net, x: Tensor, context: Tensor) -> Tensor:
        h = m.b(F.elu(m.a(x) + m.context(context)))
        return m.out(m.norm(x + F.glu(m.gate(h), 1)))

    layers = {"a": nn.Linear(4, 5), "context": nn.Linear(2, 5, bias=False), "b": nn.Linear(5, 4)}
    return Net(forward, **layers, gate=nn.Linear(4, 8), norm=nn.LayerNorm(4), out=nn.Linear(4, 2))


def dueling() -> nn.Module:
    """The value of the action that was taken, from value and advantages (Wang et al. 2016)."""

    def forward(m: Net, x: Tensor, action: Tensor) -> Tensor:
        h = m.body(x)
        advantage = m.advantage(h)
        q = m.value(h) + advantage - advantage.mean(1, keepdim=True)
        return q.gather(1, action[:, None])

    return Net(forward, body=mlp(4, 5, 5), value=nn.Linear(5, 1), advantage=nn.Linear(5, 3))


def recurrent_q() -> nn.Module:
    return Net(lambda m, x: m.q(m.memory(F.relu(m.see(x)))[0][:, -1]), see=nn.Linear(3, 4),
               memory=nn.LSTM(4, 3, batch_first=True), q=nn.Linear(3, 2))  # fmt: skip


# Speech and pictures of text


def crnn() -> nn.Module:
    """Columns of a picture are read by a GRU in both directions (Shi et al. 2017)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.conv(x)).amax(2).transpose(1, 2)
        return m.out(m.layer(h)[0])

    layer = nn.GRU(3, 2, batch_first=True, bidirectional=True)
    return Net(forward, conv=nn.Conv2d(1, 3, 3, padding=1), layer=layer, out=nn.Linear(4, 3))


def conformer() -> nn.Module:
    """Half steps of feed-forward around attention and a convolution (Gulati et al. 2020)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = x + 0.5 * m.first(x)
        x = x + m.attention(m.norm(x))
        h = F.glu(m.inside(x.mT), 1)
        x = x + m.outside(F.silu(m.batch(m.depthwise(h)))).mT
        return m.out(x + 0.5 * m.second(x))

    ends = {"first": mlp(4, 5, 4, act=nn.SiLU), "second": mlp(4, 5, 4, act=nn.SiLU), "out": nn.Linear(4, 3)}
    convolutions = {"inside": nn.Conv1d(4, 8, 1), "depthwise": nn.Conv1d(4, 4, 3, padding=1, groups=4)}
    norms = {"norm": nn.LayerNorm(4), "batch": nn.BatchNorm1d(4), "outside": nn.Conv1d(4, 4, 1)}
    return Net(forward, attention=Attention(), **ends, **convolutions, **norms)


def pyramid() -> nn.Module:
    """Features of two scales are joined from the top down (Lin et al. 2017)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        fine = F.relu(m.fine(x))
        coarse = F.relu(m.coarse(fine))
        low = m.low(coarse)
        high = m.high(fine) + F.interpolate(low, scale_factor=2, mode="nearest")
        return torch.cat([m.head(level).flatten(2) for level in (low, high)], 2).mT

    convs = {"fine": nn.Conv2d(1, 3, 3, padding=1), "coarse": nn.Conv2d(3, 4, 3, 2, 1)}
    return Net(forward, **convs, low=nn.Conv2d(4, 3, 1), high=nn.Conv2d(3, 3, 1), head=nn.Conv2d(3, 2, 3, padding=1))


def focal(logits: Tensor, y: Tensor) -> Tensor:
    """Lin et al. 2017: hard examples count more; not convex."""
    each = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


# Text


def fourier_mixer() -> nn.Module:
    """FNet: tokens are mixed by a Fourier transform (Lee-Thorp et al. 2022)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.table(x)
        h = m.norm(h + torch.fft.fft2(h).real)
        return m.out(h + m.mlp(h))

    return Net(
        forward, table=nn.Embedding(7, 4), norm=nn.LayerNorm(4), mlp=mlp(4, 6, 4, act=nn.GELU), out=nn.Linear(4, 7)
    )


def gated_mlp() -> nn.Module:
    """gMLP: a linear layer over positions gates the features (Liu et al. 2021)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        u, v = F.gelu(m.inside(x)).chunk(2, 2)
        return m.out((u * m.spatial(m.norm(v).mT).mT).mean(1))

    return Net(forward, inside=nn.Linear(3, 8), norm=nn.LayerNorm(4), spatial=nn.Linear(5, 5), out=nn.Linear(4, 3))


def retention() -> nn.Module:
    """Causal attention without softmax, decaying with distance (Sun et al. 2023)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(m.table(x)).chunk(3, 2)
        steps = torch.arange(x.shape[1])
        distance = steps[:, None] - steps
        decay = torch.where(distance >= 0, torch.sigmoid(m.rate) ** distance.clamp(min=0), 0.0)
        return m.out(F.group_norm((q @ k.mT * decay @ v).flatten(0, 1), 2).view_as(v))

    return Net(forward, table=nn.Embedding(7, 4), qkv=nn.Linear(4, 12), rate=torch.tensor(1.0), out=nn.Linear(4, 7))


def skip_gram() -> nn.Module:
    """A word, its neighbour and words at random: one score each (Mikolov et al. 2013)."""

    def forward(m: Net, word: Tensor, others: Tensor) -> Tensor:
        return (m.contexts(others) @ m.words(word)[:, :, None]).squeeze(2)

    return Net(forward, words=nn.Embedding(8, 3), contexts=nn.Embedding(8, 3))


def pointer() -> nn.Module:
    """The answer is a place in the input (Vinyals et al. 2015)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h, state = m.layer(x)
        return m.v(torch.tanh(m.a(h) + m.b(state[-1])[:, None])).squeeze(2)

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False), "v": nn.Linear(4, 1, bias=False)}
    return Net(forward, layer=nn.GRU(3, 4, batch_first=True), **parts)


# Tables and sets


def cross_net() -> nn.Module:
    """x0 * (W x + b) + x (Wang et al. 2021)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = x
        for layer in m.layers:
            h = x * layer(h) + h
        return m.out(h)

    return Net(forward, layers=nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]), out=nn.Linear(4, 1))


def features_as_tokens() -> nn.Module:
    """Each number of a row has a vector of its own (Gorishniy et al. 2021)."""

    def forward(m: Net, numbers: Tensor, kinds: Tensor) -> Tensor:
        tokens = torch.cat([numbers[:, :, None] * m.scale + m.shift, m.kinds(kinds)], 1)
        return m.out(m.block(tokens)[:, 0])

    tables = {"scale": torch.randn(3, 4), "shift": torch.randn(3, 4), "kinds": nn.Embedding(5, 4)}
    return Net(forward, **tables, block=Block(), out=nn.Linear(4, 1))


def soft_tree() -> nn.Module:
    """Three gates, four leaves (Frosst & Hinton 2017)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        right = torch.sigmoid(m.gates(x))
        top, low = torch.stack([1 - right[:, 0], right[:, 0]], 1), torch.stack([1 - right[:, 1:], right[:, 1:]], 2)
        return (top[:, :, None] * low).flatten(1) @ m.leaves

    return Net(forward, gates=nn.Linear(4, 3), leaves=torch.randn(4, 2))


def spline_net() -> nn.Module:
    """KAN: sums of functions of one number, each a sum of bumps (Liu et al. 2024)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for weight, base in ((m.a, m.base_a), (m.b, m.base_b)):
            bumps = torch.exp(-((x[..., None] - torch.linspace(-1, 1, 4, dtype=x.dtype)) ** 2) / 0.5)
            x = torch.einsum("nik,oik->no", bumps, weight) + F.silu(x) @ base.T
        return x

    return Net(
        forward, a=torch.randn(3, 2, 4), base_a=torch.randn(3, 2), b=torch.randn(1, 3, 4), base_b=torch.randn(1, 3)
    )


def instances() -> nn.Module:
    """A bag of instances has one label; attention weighs them (Ilse et al. 2018)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.features(x)
        weight = m.w(torch.tanh(m.v(h)) * torch.sigmoid(m.u(h))).softmax(1)
        return m.out((weight * h).sum(1))

    gates = {"v": nn.Linear(4, 3), "u": nn.Linear(4, 3), "w": nn.Linear(3, 1, bias=False)}
    return Net(forward, features=mlp(3, 4, 4), **gates, out=nn.Linear(4, 1))


# Densities and operators


def masked_autoencoder() -> nn.Module:
    """MADE: masks make every output depend on the inputs before it (Germain et al. 2015)."""
    order, hidden = torch.arange(4), torch.tensor([0, 1, 2, 0, 1])
    first, second = (hidden[:, None] >= order).double(), (order[:, None] > hidden).double()

    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, m.a.weight * first, m.a.bias))
        return F.linear(h, m.b.weight * second, m.b.bias)

    return Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 4))


class MaskedConv(nn.Conv2d):
    """A pixel sees those above it and to the left (van den Oord et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, own: bool) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(3, 3)
        mask[1, 1 + own :], mask[2:] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def glow() -> nn.Module:
    """A linear map over channels that can be turned around, with its log-determinant (Kingma & Dhariwal 2018)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        z = F.conv2d((x + m.shift) * m.log_scale.exp(), m.weight[:, :, None, None])
        volume = 4 * (torch.linalg.slogdet(m.weight)[1] + m.log_scale.sum())
        return torch.cat([z.flatten(1), volume.expand(x.shape[0], 1)], 1)

    return Net(forward, weight=torch.eye(3) + 0.1, shift=torch.zeros(3, 1, 1), log_scale=torch.zeros(3, 1, 1))


def glow_loss(output: Tensor, y: Tensor) -> Tensor:
    return (0.5 * output[:, :-1].square().sum(1) - output[:, -1]).mean()


def sampled_weights() -> nn.Module:
    """Bayes by backprop: mean and scale of each weight, the noise is an input (Blundell et al. 2015)."""

    def forward(m: Net, x: Tensor, noise: Tensor) -> Tensor:
        weight = m.mean + F.softplus(m.scale) * noise
        return torch.einsum("noi,ni->no", weight, x)

    return Net(forward, mean=torch.randn(2, 3), scale=torch.zeros(2, 3))


def gumbel() -> nn.Module:
    """A relaxed choice of one of three codes; the noise is an input (Jang et al. 2017)."""

    def forward(m: Net, x: Tensor, u: Tensor) -> Tensor:
        noise = -torch.log(-torch.log(0.1 + 0.8 * u))
        return m.decoder(((m.encoder(x) + noise) / 0.7).softmax(1) @ m.codes)

    return Net(forward, encoder=mlp(5, 4, 3), codes=torch.randn(3, 2), decoder=mlp(2, 4, 5))


def operator_net() -> nn.Module:
    """DeepONet: a function at sensors, and where it is asked (Lu et al. 2021)."""
    return Net(lambda m, u, y: torch.einsum("nk,nqk->nq", m.branch(u), m.trunk(y)) + m.bias,
               branch=mlp(5, 4, 3), trunk=mlp(1, 4, 3), bias=torch.zeros(1))  # fmt: skip


def capsules() -> nn.Module:
    """Two rounds of routing by agreement (Sabour et al. 2017)."""

    def squash(v: Tensor) -> Tensor:
        square = v.square().sum(-1, keepdim=True)
        return square / (1 + square) * v / torch.sqrt(square + 1e-8)

    def forward(m: Net, x: Tensor) -> Tensor:
        votes = torch.einsum("nid,iojd->nioj", squash(m.first(x).view(-1, 4, 2)), m.weight)
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(2):
            v = squash((logits.softmax(2)[..., None] * votes).sum(1))
            logits = logits + (votes * v[:, None]).sum(-1)
        return v.norm(dim=2)

    return Net(forward, first=nn.Linear(5, 8), weight=torch.randn(4, 3, 3, 2))


def equilibrium() -> nn.Module:
    """A fixed point, by a fixed number of steps (Bai et al. 2019)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(6):
            z = torch.tanh(0.5 * m.inside(z) + m.inject(x))
        return m.out(z)

    return Net(forward, inside=nn.Linear(3, 3, bias=False), inject=nn.Linear(3, 3), out=nn.Linear(3, 2))


def equivariant() -> nn.Module:
    """Messages from squared distances move the points (Satorras et al. 2021)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        difference = x[:, :, None] - x[:, None]
        weight = m.edge(difference.square().sum(-1, keepdim=True))
        return x + (difference * weight).mean(2)

    return Net(forward, edge=mlp(1, 5, 1, act=nn.SiLU))


BOX = binary(1)
ROWS = (
    Row("DeepAR", deep_ar, normal(4, 2), normal(4, 1), normal_loss, convex=False),
    Row("N-BEATS", n_beats, normal(5), normal(2)),
    Row("gated residual, context", gated_residual, several(normal(4), normal(2)), normal(2)),
    Row("dueling Q", dueling, several(normal(4), ids(3)), normal(1)),
    Row("recurrent Q", recurrent_q, normal(4, 3), normal(2)),
    Row("CRNN", crnn, normal(1, 4, 5), ids(3, 5), tokenwise),
    Row("Conformer", conformer, normal(5, 4), ids(3, 5), tokenwise),
    Row("feature pyramid, focal loss", pyramid, normal(1, 4, 4), binary(20, 2), focal, convex=False),
    Row("FNet", fourier_mixer, ids(7, 4), ids(7, 4), tokenwise),
    Row("gMLP", gated_mlp, normal(5, 3), ids(3), CE),
    Row("retention", retention, ids(7, 4), ids(7, 4), tokenwise),
    Row("skip-gram", skip_gram, several(ids(8), ids(8, 4)), binary(4), BCE),
    Row("pointer net", pointer, normal(4, 3), ids(4), CE),
    Row("deep & cross", cross_net, normal(4), BOX, BCE),
    Row("FT-Transformer", features_as_tokens, several(normal(3), ids(5, 2)), BOX, BCE),
    Row("soft decision tree", soft_tree, normal(4), normal(2)),
    Row("KAN", spline_net, normal(2), normal(1)),
    Row("multiple instances", instances, normal(4, 3), BOX, BCE),
    Row("MADE", masked_autoencoder, binary(4), binary(4), BCE),
    Row("PixelCNN", lambda: seq(MaskedConv(1, 3, False), nn.ReLU(), MaskedConv(3, 1, True)), binary(1, 4, 4),
        binary(1, 4, 4), BCE),
    Row("Glow step", glow, normal(3, 2, 2), normal(1), glow_loss),
    Row("Bayes by backprop", sampled_weights, several(normal(3), normal(2, 3)), normal(2)),
    Row("Gumbel softmax", gumbel, several(normal(5), uniform(3)), normal(5)),
    Row("DeepONet", operator_net, several(normal(5), uniform(4, 1)), normal(4)),
    Row("capsules", capsules, normal(5), uniform(3)),
    Row("deep equilibrium, unrolled", equilibrium, normal(3), normal(2)),
    Row("E(n)-equivariant", equivariant, normal(4, 3), normal(4, 3)),
)  # fmt: skip
