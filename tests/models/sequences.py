"""Rows of the zoo: recurrent nets and convolutions over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .zoo import CE, Net, Row, ids, normal, seq, several, tokenwise

WORDS = 7


def tagger(layer: nn.Module, width: int = 4) -> nn.Module:
    """A label for each word."""
    return Net(
        lambda m, x: m.out(m.layer(m.table(x))[0]), table=nn.Embedding(WORDS, 3), layer=layer, out=nn.Linear(width, 3)
    )


def last_state() -> nn.Module:
    """The class of a sequence, from the last hidden state of both layers."""
    layer = nn.GRU(3, 4, num_layers=2, batch_first=True)
    return Net(lambda m, x: m.out(m.layer(x)[1].transpose(0, 1).flatten(1)), layer=layer, out=nn.Linear(8, 3))


def cells() -> nn.Module:
    """An LSTM cell in a loop of Python."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            h, c = m.cell(step, (h, c))
        return m.out(h)

    return Net(forward, cell=nn.LSTMCell(3, 4), out=nn.Linear(4, 2))


def translator() -> nn.Module:
    """Encoder, decoder, and attention of the one to the other (Luong et al. 2015)."""

    def forward(m: Net, source: Tensor, target: Tensor) -> Tensor:
        memory, state = m.encoder(m.table(source))
        h, _ = m.decoder(m.table(target), state)
        context = (m.score(h) @ memory.mT).softmax(2) @ memory
        return m.out(torch.tanh(m.join(torch.cat([h, context], 2))))

    encoder, decoder = nn.GRU(3, 4, batch_first=True), nn.GRU(3, 4, batch_first=True)
    out, join = nn.Linear(4, WORDS), nn.Linear(8, 4)
    return Net(
        forward,
        table=nn.Embedding(WORDS, 3),
        encoder=encoder,
        decoder=decoder,
        score=nn.Linear(4, 4),
        join=join,
        out=out,
    )


class Causal(nn.Conv1d):
    """A convolution that sees the past alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


def temporal() -> nn.Module:
    """Bai et al. 2018."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.b(F.relu(m.a(x))) + m.shortcut(x))
        return m.out(h[:, :, -1])

    return Net(
        forward, a=Causal(2, 4, 2), b=Causal(4, 4, 2, dilation=2), shortcut=nn.Conv1d(2, 4, 1), out=nn.Linear(4, 3)
    )


def wavenet() -> nn.Module:
    """Gated dilated convolutions, residuals and skips (van den Oord et al. 2016)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h, skips = m.stem(x), 0
        for gate, out in zip(m.gates, m.outs, strict=True):
            a, b = gate(h).chunk(2, 1)
            z = torch.tanh(a) * torch.sigmoid(b)
            h, skips = h + out(z), skips + z
        return m.head(F.relu(skips))

    gates = nn.ModuleList([Causal(3, 6, 2, dilation=d) for d in (1, 2)])
    outs = nn.ModuleList([nn.Conv1d(3, 3, 1) for _ in range(2)])
    return Net(forward, stem=Causal(1, 3, 2), gates=gates, outs=outs, head=nn.Conv1d(3, 4, 1))


def text_cnn() -> nn.Module:
    """Kim 2014."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.table(x).transpose(1, 2)
        return m.out(torch.cat([F.relu(c(h)).amax(2) for c in (m.two, m.three)], 1))

    return Net(
        forward, table=nn.Embedding(WORDS, 3), two=nn.Conv1d(3, 4, 2), three=nn.Conv1d(3, 4, 3), out=nn.Linear(8, 3)
    )


class Mamba(nn.Module):
    """A selective state space, its recurrence as a loop (Gu & Dao 2023)."""

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv = nn.Conv1d(width, width, 2, padding=1, groups=width)
        self.select, self.step = nn.Linear(width, 2 * state), nn.Linear(width, width)
        self.log_A, self.D = nn.Parameter(torch.zeros(width, state)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inside(x).chunk(2, 2)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        B, C = self.select(u).chunk(2, 2)
        step = F.softplus(self.step(u))
        decay = torch.exp(-step[..., None] * self.log_A.exp())
        drive = (step * u)[..., None] * B[:, :, None]
        h, outputs = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            outputs.append((h * C[:, t, None]).sum(2))
        y = torch.stack(outputs, 1) + self.D * u
        return self.outside(y * F.silu(gate))


def mamba() -> nn.Module:
    parts = {"table": nn.Embedding(WORDS, 4), "norm": nn.RMSNorm(4), "mix": Mamba(4, 2), "out": nn.Linear(4, WORDS)}
    return Net(lambda m, x: (lambda h: m.out(h + m.mix(m.norm(h))))(m.table(x)), **parts)


def linear_attention() -> nn.Module:
    """Causal, with positive features and running sums (Katharopoulos et al. 2020)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).chunk(3, 2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = (k[..., None] * v[:, :, None]).cumsum(1)
        above = (q[:, :, None] @ state).squeeze(2)
        return m.out(above / (q * k.cumsum(1)).sum(2, keepdim=True))

    return Net(forward, qkv=nn.Linear(3, 12), out=nn.Linear(4, 2))


def spectral() -> nn.Module:
    """A layer of a Fourier neural operator (Li et al. 2021): real parts and imaginary parts are parameters."""

    def forward(m: Net, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(m.lift(x).mT)[..., :3]
        weight = torch.complex(m.real, m.imaginary)
        mixed = torch.fft.irfft(torch.einsum("nik,iok->nok", modes, weight), n=6)
        return m.out(F.gelu(mixed.mT))

    parts = {"real": torch.randn(3, 3, 3), "imaginary": torch.randn(3, 3, 3)}
    return Net(forward, lift=nn.Linear(1, 3), **parts, out=nn.Linear(3, 1))


SERIES, TEXT, TAGS = normal(4, 3), ids(WORDS, 4), ids(3, 4)
ROWS = (
    Row("RNN tagger", lambda: tagger(nn.RNN(3, 4, batch_first=True)), TEXT, TAGS, tokenwise),
    Row("GRU tagger", lambda: tagger(nn.GRU(3, 4, batch_first=True)), TEXT, TAGS, tokenwise),
    Row(
        "LSTM tagger, both directions",
        lambda: tagger(nn.LSTM(3, 2, batch_first=True, bidirectional=True)),
        TEXT,
        TAGS,
        tokenwise,
    ),
    Row("GRU classifier, two layers", last_state, SERIES, ids(3), CE),
    Row("LSTM cell in a loop", cells, SERIES, normal(2)),
    Row("seq2seq with attention", translator, several(TEXT, ids(WORDS, 3)), ids(WORDS, 3), tokenwise),
    Row("TCN", temporal, normal(2, 6), ids(3), CE),
    Row("WaveNet", wavenet, normal(1, 5), ids(4, 5), CE),
    Row("text CNN", text_cnn, ids(WORDS, 6), ids(3), CE),
    Row("Mamba", mamba, TEXT, TEXT, tokenwise),
    Row("linear attention", linear_attention, SERIES, normal(4, 2)),
    Row("Fourier neural operator", spectral, normal(6, 1), normal(6, 1)),
    Row(
        "stacked Conv1d, flattened",
        lambda: seq(nn.Conv1d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 2)),
        normal(2, 6),
        normal(2),
    ),
)
