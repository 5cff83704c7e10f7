"""Random programs: parameters read in several shapes, shared, sliced, scattered, cast; losses from torch ops."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hostile import NAMES

WIDTHS = (1, 2, 3, 4)


class Program(nn.Module):
    """Lines of Python in order, in `h` (the value), `p` (parameters), `L` (layers) and `kept` (earlier values)."""

    def __init__(
        self, lines: list[str], shapes: list[tuple[int, ...]], names: list[str], layers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.lines, self.own = lines, names
        for name, shape in zip(names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.6))
        self.layers = nn.ModuleList(layers)
        self.code = [compile(line, "<random program>", "eval") for line in lines]

    def forward(self, x: Tensor) -> Tensor:
        h, kept = x, [x]
        for code in self.code:
            scope = {"torch": torch, "F": F, "h": h, "x": x, "kept": kept, "L": self.layers}
            scope["p"] = [self._parameters[name] for name in self.own]
            h = eval(code, scope)
            kept.append(h)
        return h

    def extra_repr(self) -> str:
        shown = [f"p[{k}] {name!r} {list(self._parameters[name].shape)}" for k, name in enumerate(self.own)]
        return "\n".join([*shown, *self.lines])


MATRIX = (  # a parameter w [a, b], a·b = k·d read as [k, d] or as [d]
    "{w}", "{w}.flip(0)", "{w}.flip(1)", "{w}.flip(0, 1)", "{w}.roll(1, 0)", "{w}.roll((1, 2), (0, 1))",
    "{w}.t().reshape({a}, {b})", "{w}.flatten().flip(0).view({a}, {b})", "{w}.flatten().roll(1).view({a}, {b})",
    "{w} - {w}.mean()", "{w} / (1 + {w}.norm())", "{w} / {w}.flatten().square().sum().add(1)", "{w} * {w}.sum(0)",
    "{w} * {w}.flatten()[0]", "{w} + {w}.flatten()[-1:].tanh()", "torch.tril({w})", "torch.triu({w}, 1)",
    "{w} * {w}.detach()", "torch.cat([{w}[1:], {w}[:1]])", "torch.cat([{w}[:, 1:], {w}[:, :1]], 1)",
    "{w}[torch.tensor({rows})]", "{w}[:, torch.tensor({cols})]", "torch.gather({w}, 0, torch.tensor({index}))",
    "{w}.scatter_add(0, torch.tensor({index}), {w})", "{w}.index_add(0, torch.tensor({rows}), {w})",
    "torch.zeros_like({w}).index_add(0, torch.tensor({rows}), {w})", "{w}.view({b}, {a}).t().contiguous()",
    "torch.stack([{w}, {w}.flip(0)]).sum(0)", "F.pad({w}[:, 1:], (1, 0))", "F.pad({w}[1:], (0, 0, 0, 1))",
    "{w}.unfold(1, 1, 1).squeeze(-1)", "torch.where({w} > 0, {w}, {w}.exp())", "{w}.softmax(1)", "{w}.softmax(0)",
    "{w}.cumsum(0)", "{w}.cumsum(1)", "{w}.flatten().cumsum(0).view({a}, {b})", "{w}.float().double()",
    "{w}.clamp(-0.5, 0.5)", "{w} * {w}.t().reshape({a}, {b}).sigmoid()", "{w}.select(0, 0).expand({a}, {b}) + {w}",
    "{w}.diagonal().sum() * {w}", "{w}.unsqueeze(0).repeat(2, 1, 1).mean(0)", "{w}.repeat_interleave(2, 0)[::2]",
    "{w}.view(-1, 1).view({a}, {b})", "{w}.amax(1, keepdim=True) + {w}", "{w} @ {w}.t() @ {w}",
    "torch.einsum('ab,cb->ca', {w}, {w}) @ {w}", "{w}.narrow(0, 0, 1) + {w}", "{w}.logsumexp(1, keepdim=True) - {w}",
    "F.layer_norm({w}, ({b},))", "{w}.permute(1, 0).flatten().view({a}, {b})",
)  # fmt: skip
USES = (  # of a matrix m [a, b] on h [N, a]
    "h @ ({m})", "F.linear(h, ({m}).t())", "torch.einsum('na,ab->nb', h, {m})", "(h.unsqueeze(2) * ({m})).sum(1)",
    "torch.matmul(h.unsqueeze(1), {m}).squeeze(1)", "torch.addmm(h.new_zeros({b}), h, {m})", "h @ ({m}) + ({m}).sum(0)",
    "h @ ({m}) * ({m})[0]", "(h @ ({m}))[:, :1] + ({m}).flatten()[:{b}]",
    "F.conv1d(h.unsqueeze(2), ({m}).t().unsqueeze(2)).squeeze(2)", "torch.cat([h, h], 1) @ torch.cat([{m}, {m}], 0)",
    "F.bilinear(h, h, ({m}).t().unsqueeze(1).expand({b}, {a}, {a}))",
)  # fmt: skip
POINTWISE = (
    "h.tanh()", "h.sigmoid()", "F.gelu(h)", "F.softplus(h)", "h * h.sigmoid()", "h.sin() + 0.1 * h",
    "F.leaky_relu(h, 0.2)", "F.elu(h)", "h.softmax(1)", "h - h.mean(1, keepdim=True)", "F.layer_norm(h, h.shape[1:])",
    "h / (1 + h.square().sum(1, keepdim=True))", "h.float().double() + h", "h.flip(1)", "h.roll(1, 1)",
    "torch.cat([h[:, 1:], h[:, :1]], 1)", "h.cumsum(1)", "h.logsumexp(1, keepdim=True) + h", "h.clone()",
    "h.detach() * h", "h.scatter_add(1, torch.zeros(h.shape, dtype=torch.long), h.tanh())",
    "torch.gather(h, 1, torch.zeros(h.shape, dtype=torch.long)) + h", "h.abs().add(1).log()", "h.exp().clamp(max=3)",
    "h.unsqueeze(1).expand(-1, 2, -1).sum(1)", "torch.where(h > 0, h, h.square())", "F.pad(h[:, 1:], (1, 0)) + h",
    "h.index_select(1, torch.zeros(h.shape[1], dtype=torch.long)) + h", "h.addcmul(h, h.tanh(), value=0.5)",
    "F.normalize(h + 2, dim=1)", "torch.stack([h, h.tanh()], 1).mean(1)", "torch.stack([h, -h], 2).amax(2)",
    "h.std(1, keepdim=True) + h if h.shape[1] > 1 else h.cos()",
)  # fmt: skip
VECTOR = (  # a parameter w [a] on h [N, a]
    "h * {w}", "h + {w}.flip(0)", "h * {w} + {w}.sum()", "torch.addcmul(h, h, {w}.tanh())",
    "F.layer_norm(h, ({a},), {w}, {w}.flip(0))", "h * {w}[:1] + {w}.roll(1)",
    "h * {w}.view(1, {a}) + {w}.view({a}, 1).sum(0)", "h + torch.outer({w}, {w}).diagonal()",
    "h @ torch.outer({w}, {w}.flip(0))", "h @ torch.diag({w}) + {w}", "h * F.pad({w}[1:], (0, 1))",
    "h + {w}[torch.tensor({rows})]", "h * {w}.cumsum(0)", "h * {w}.softmax(0) - {w}", "F.prelu(h, {w}[:1])",
    "h + {w}.float().double()", "h * {w}.new_zeros({a}).scatter_add(0, torch.tensor({rows}), {w})",
    "torch.lerp(h, h.tanh(), {w})",
)  # fmt: skip
JOIN = (
    "h + {k}",
    "h * {k}.tanh()",
    "torch.cat([h, {k}], 1)",
    "h - 0.5 * {k}.detach()",
    "torch.stack([h, {k}], 1).amax(1)",
    "torch.maximum(h, {k})",
    "h.lerp({k}, 0.3)",
)
LOSSES: tuple[str, ...] = (
    "F.mse_loss(f, y)", "F.mse_loss(f, y, reduction='sum')", "(f - y).pow(4).sum(1).mean()",
    "F.binary_cross_entropy_with_logits(f, y.sigmoid())", "F.cross_entropy(f, y.abs().argmax(1))",
    "F.cross_entropy(f, y.softmax(1), label_smoothing=0.1)", "F.smooth_l1_loss(f, y)", "F.huber_loss(f, y, delta=0.7)",
    "(f.exp() - y * f).mean()", "(f.logsumexp(1) - (f * y).sum(1)).mean()",
    "F.kl_div(f.log_softmax(1), y.softmax(1), reduction='batchmean')",
    "(1 - F.cosine_similarity(f + 2, y, dim=1)).mean()", "F.softplus(-f * y).sum(1).mean()",
    "F.nll_loss(f.log_softmax(1), y.abs().argmax(1))", "F.poisson_nll_loss(f, y.abs())",
    "F.gaussian_nll_loss(f, y, y.square() + 1)", "(f - y).square().sum() + f.sum()",
    "-torch.gather(f.log_softmax(1), 1, y.abs().argmax(1, keepdim=True)).mean()",
    "(f.sigmoid() - y).square().sum(1).sqrt().mean()", "F.soft_margin_loss(f, y.sign())",
)  # fmt: skip


class Loss(nn.Module):
    """A line of Python in `f` and `y`."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line, self.code = line, compile(line, "<random loss>", "eval")
        self.reduction = "sum" if "sum'" in line or "sum()" in line else "mean"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return eval(self.code, {"torch": torch, "F": F, "f": f, "y": y})

    def extra_repr(self) -> str:
        return self.line


@dataclass(frozen=True)
class Problem:
    """A model with its loss and data."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor


class _Writer:
    """Writes the lines of one program."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.lines = rng, list[str]()
        self.shapes: list[tuple[int, ...]] = []
        self.layers: list[nn.Module] = []
        self.width = rng.choice((2, 3, 4))
        self.widths = [self.width]

    def write(self, line: str, width: int) -> None:
        self.lines.append(line)
        self.width = width
        self.widths.append(width)

    def parameter(self, shape: tuple[int, ...]) -> str:
        """An old one of this shape, or a new one."""
        old = [k for k, each in enumerate(self.shapes) if each == shape]
        if old and self.rng.random() < 0.5:
            return f"p[{self.rng.choice(old)}]"
        self.shapes.append(shape)
        return f"p[{len(self.shapes) - 1}]"

    def indices(self, count: int, below: int) -> list[int]:
        return [self.rng.randrange(below) for _ in range(count)]

    def read(self, w: str, a: int, b: int) -> str:
        """A matrix, read through up to three functions of it."""
        code = w
        for _ in range(self.rng.randint(0, 2)):
            text = self.rng.choice(MATRIX)
            index = [self.indices(b, a) for _ in range(a)]
            code = text.format(w=f"({code})", a=a, b=b, rows=self.indices(a, a), cols=self.indices(b, b), index=index)
        return code

    def matrix(self) -> None:
        a = self.width
        b = self.rng.choice([a, a, *WIDTHS])
        w = self.parameter((a, b))
        m = self.read(w, a, b)
        if self.rng.random() < 0.5:
            m = f"({m}) {self.rng.choice(('+', '*', '-'))} ({self.read(w, a, b)})"
        self.write(self.rng.choice(USES).format(m=m, a=a, b=b), b)

    def regrouped(self) -> None:
        """One flat parameter, as a matrix and as its rows."""
        a, b = self.width, self.rng.choice(WIDTHS)
        w = self.parameter(self.rng.choice([(a * b,), (b, a), (1, a * b), (a, b, 1)]))
        m = self.read(f"{w}.reshape({a}, {b})", a, b)
        more = self.rng.choice(
            [
                "",
                f" + {w}.sum()",
                f" * {w}.flatten()[:{b}]",
                f" + {w}.reshape({b}, {a}).sum(1)",
                f" + {w}.reshape(-1, {b})[-1]",
            ]
        )
        self.write(f"h @ ({m}){more}", b)

    def vector(self) -> None:
        a = self.width
        w = self.parameter((a,))
        self.write(self.rng.choice(VECTOR).format(w=w, a=a, rows=self.indices(a, a)), a)

    def pointwise(self) -> None:
        self.write(self.rng.choice(POINTWISE), self.width)

    def layer(self) -> None:
        a = self.width
        old = [k for k, each in enumerate(self.layers) if isinstance(each, nn.Linear) and each.in_features == a]
        if old and self.rng.random() < 0.6:
            k = self.rng.choice(old)
        else:
            k = len(self.layers)
            self.layers.append(nn.Linear(a, self.rng.choice([a, *WIDTHS]), bias=self.rng.random() < 0.7))
            tied = [k for k, each in enumerate(self.layers[:-1]) if each.weight.shape == self.layers[-1].weight.shape]
            if tied and self.rng.random() < 0.4:
                self.layers[-1].weight = self.layers[tied[0]].weight
        self.write(f"L[{k}](h)", self.layers[k].out_features)

    def join(self) -> None:
        same = [k for k, width in enumerate(self.widths[:-1]) if width == self.width]
        if not same:
            return self.pointwise()
        text = self.rng.choice(JOIN)
        self.write(text.format(k=f"kept[{self.rng.choice(same)}]"), self.width * (2 if "cat" in text else 1))


def problem(seed: int) -> Problem:
    """The random program of this number, in float64."""
    rng = random.Random(seed)
    writer = _Writer(rng)
    first = writer.width
    kinds = (writer.matrix, writer.matrix, writer.regrouped, writer.vector, writer.pointwise, writer.layer, writer.join)
    for _ in range(rng.randint(2, 5)):
        rng.choice(kinds)()
    if not writer.shapes and not writer.layers:
        writer.matrix()
    torch.manual_seed(seed)
    wanted = [name for name in NAMES if "." not in name and not hasattr(nn.Module(), name)]
    wanted = [name for name in wanted if name not in ("lines", "own", "layers", "code")]
    names = (
        rng.sample(wanted, len(writer.shapes)) if rng.random() < 0.5 else [f"w{k}" for k in range(len(writer.shapes))]
    )
    model = Program(writer.lines, writer.shapes, names, writer.layers).double()
    parameters = list(model.parameters())
    for parameter in parameters[:-1]:
        parameter.requires_grad_(rng.random() < 0.9)
    samples = rng.randint(1, 4)
    x = torch.randn(samples, first, dtype=torch.float64)
    return Problem(model, Loss(rng.choice(LOSSES)), x, torch.randn(samples, writer.width, dtype=torch.float64))
