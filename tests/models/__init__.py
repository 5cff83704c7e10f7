"""Small models for the table of cases: what plain `nn.Sequential` cannot say. The zoo of whole models is in `rows`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Apply(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WithParameters(nn.Module):
    """A function of the input and of parameters of the given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.parameter = nn.ParameterList([torch.zeros(shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameter)


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    """The outputs of several modules, combined."""

    def __init__(self, combine: Callable[..., Tensor], *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(*(body(x) for body in self.bodies))


class Product(nn.Module):
    """A bilinear form of two linear layers of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.form = nn.Linear(3, 3), nn.Linear(3, 2), nn.Bilinear(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.left(x), self.right(x))


class Reused(nn.Module):
    """One layer called twice, with a function between."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class TiedAutoencoder(nn.Module):
    """Encoder and decoder share one matrix, used plain and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class TiedNames(nn.Module):
    """Two modules hold the same parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


class Positions(nn.Module):
    """A table added to every sample, before a layer on [N, T, D]."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(tokens, width))
        self.mix = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(x + self.table))


class ClassToken(nn.Module):
    """A learned token in front of the others; the answer is read there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.mix = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.mix(tokens.mean(1) + tokens[:, 0])


class Unused(nn.Module):
    """One layer is there but not called, another one only times zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.muted = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0.0 * self.muted(x)


class TimeFirst(nn.Module):
    """[N, T, D] -> [T, N, D] -> linear -> back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class MergedTokens(nn.Module):
    """[N, T, D] -> [N*T, D] through two layers; the output keeps the merged axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.reshape(-1, x.shape[-1]))))


class MergedInside(nn.Module):
    """The merged axis [N*T] is taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        hidden = torch.tanh(self.first(x.reshape(n * t, d))).reshape(n, t, 4)
        return self.second(hidden.sum(1))


class Attention(nn.Module):
    """One head of softmax attention, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1) / x.shape[-1] ** 0.5
        return torch.softmax(scores, dim=-1) @ self.v(x)


class TiedEmbedding(nn.Module):
    """Tokens to logits: one table is looked up, by the token and by its neighbour, and maps back to tokens."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2, padding_idx=padding)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.table(x) + self.table(x.roll(1, 1)))
        return F.linear(hidden.mean(1), self.table.weight)


class MultiHead(nn.Module):
    """Self-attention by nn.MultiheadAttention, under a mask with a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False, attn_mask=self.bias)[0]
        return output


class First(nn.Module):
    """The first output of a layer with several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


class InPlace(nn.Module):
    """Operations that write to their argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 1.0
        hidden.mul_(0.5)
        return self.second(F.relu(hidden, inplace=True))


class FlatTargets(nn.Module):
    """A loss on merged axes: y [N, T] is flattened like the model's output [N*T, C]."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.reduction = loss.reduction

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.loss(output, y.reshape(-1))


class Written(nn.Module):
    """A loss written out by hand."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], reduction: str = "mean") -> None:
        super().__init__()
        self.function, self.reduction = function, reduction

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.function(output, y)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """The model with the named parameters frozen."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return model
