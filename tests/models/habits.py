"""Rows of the zoo: code as it is written; nets that write in place, look at values, or bend their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .functions import mlp
from .zoo import CE, Net, Row, ids, normal, several, uniform


def preallocated() -> nn.Module:
    """The outputs of a recurrence are written into a tensor of zeros."""

    def forward(m: Net, x: Tensor) -> Tensor:
        outputs = torch.zeros(x.shape[0], x.shape[1], 4, dtype=x.dtype)
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(m.inside(x[:, t]) + m.hidden(h))
            outputs[:, t] = h
        return m.out(outputs)

    return Net(forward, inside=nn.Linear(3, 4), hidden=nn.Linear(4, 4), out=nn.Linear(4, 2))


def scattered() -> nn.Module:
    """Messages over the edges of each graph, added into zeros in place."""

    def forward(m: Net, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        where = source[..., None].expand(-1, -1, 3)
        messages = m.message(x.gather(1, where))
        total = torch.zeros(x.shape[0], 4, 5, dtype=x.dtype)
        total.scatter_add_(1, target[..., None].expand(-1, -1, 5), messages)
        return m.out(F.relu(total)).sum(1)

    return Net(forward, message=nn.Linear(3, 5), out=nn.Linear(5, 2))


def masked_assignment() -> nn.Module:
    """h[h < 0] = 0 in place of a ReLU."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x) * 1.0
        h[h < 0] = 0.0
        return m.b(h)

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def guarded() -> nn.Module:
    """A check of values that stops the forward."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        if torch.isnan(h).any():
            raise ValueError("not a number")
        assert bool((x.abs() < 1e6).all()), "an input is too large"
        return m.b(h)

    return Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


def checkpointed() -> nn.Module:
    """The activations of a part are made again in the backward pass."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(checkpoint(m.body, x, use_reentrant=False))

    return Net(forward, body=mlp(4, 6, 4), out=nn.Linear(4, 3))


class Reversal(torch.autograd.Function):
    """The identity, whose backward turns the sign (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


def adversary() -> nn.Module:
    """Domain adaptation: the second head is fought by the features."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.features(x)
        return torch.cat([m.label(h), m.domain(Reversal.apply(h))], 1)

    return Net(forward, features=mlp(4, 5, 3), label=nn.Linear(3, 2), domain=nn.Linear(3, 1))


class Sign(torch.autograd.Function):
    """The sign, with the backward of a clamp (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


def binarised() -> nn.Module:
    return Net(lambda m, x: m.b(Sign.apply(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def vector_quantised() -> nn.Module:
    """VQ-VAE: the nearest code is read, the gradient goes past it (van den Oord et al. 2017)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        z = m.encoder(x)
        nearest = (z[:, None] - m.codes).square().sum(2).argmin(1)
        q = m.codes[nearest]
        image = m.decoder(z + (q - z).detach())
        return torch.cat([image, q - z.detach(), z - q.detach()], 1)

    return Net(forward, encoder=mlp(5, 4, 3), codes=torch.randn(6, 3), decoder=mlp(3, 4, 5))


def vq_loss(output: Tensor, x: Tensor) -> Tensor:
    image, codes, commitment = output.split([5, 3, 3], 1)
    return (image - x).square().mean() + codes.square().mean() + 0.25 * commitment.square().mean()


def sparse_experts() -> nn.Module:
    """Each token goes to its two best experts; the others' outputs are masked."""

    def forward(m: Net, x: Tensor) -> Tensor:
        scores, chosen = m.router(x).topk(2, dim=-1)
        weight = torch.zeros_like(m.router(x)).scatter(-1, chosen, scores.softmax(-1))
        each = torch.stack([expert(x) for expert in m.experts], -1)
        return m.out((each * weight[..., None, :]).sum(-1))

    experts = nn.ModuleList([mlp(3, 4, 3, act=nn.GELU) for _ in range(4)])
    return Net(forward, router=nn.Linear(3, 4, bias=False), experts=experts, out=nn.Linear(3, 2))


def routed_experts() -> nn.Module:
    """Switch transformer's loop: the tokens of an expert are picked by a mask, and written back (Fedus et al. 2022)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 3)
        gate, chosen = m.router(tokens).softmax(-1).max(-1)
        output = torch.zeros_like(tokens)
        for k, expert in enumerate(m.experts):
            output[chosen == k] = expert(tokens[chosen == k])
        return m.out((output * gate[:, None]).view_as(x)).mean(1)

    experts = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    return Net(forward, router=nn.Linear(3, 3), experts=experts, out=nn.Linear(3, 2))


def policy() -> nn.Module:
    """The log-probability of an action under torch.distributions, and the value (actor and critic)."""

    def forward(m: Net, x: Tensor, action: Tensor) -> Tensor:
        h = m.body(x)
        normal = torch.distributions.Normal(m.mean(h), m.log_std.exp())
        return torch.cat([normal.log_prob(action).sum(1, keepdim=True), m.value(h)], 1)

    return Net(forward, body=mlp(4, 5, 5), mean=nn.Linear(5, 2), value=nn.Linear(5, 1), log_std=torch.zeros(2))


def policy_loss(output: Tensor, y: Tensor) -> Tensor:
    """Advantages y[:, 0] and returns y[:, 1]; linear in the log-probability."""
    return (-y[:, 0] * output[:, 0] + 0.5 * (output[:, 1] - y[:, 1]).square()).mean()


def lengths() -> nn.Module:
    """An LSTM's output at the last word of each text."""

    def forward(m: Net, x: Tensor, length: Tensor) -> Tensor:
        h, _ = m.layer(m.table(x))
        return m.out(h[torch.arange(x.shape[0]), length - 1])

    return Net(forward, table=nn.Embedding(7, 3), layer=nn.LSTM(3, 4, batch_first=True), out=nn.Linear(4, 3))


def time_first() -> nn.Module:
    """[T, N, D] inside, as recurrent layers and attention have it by default."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h, _ = m.layer(x.transpose(0, 1))
        h, _ = m.attention(h, h, h)
        return m.out(h).transpose(0, 1)

    return Net(forward, layer=nn.GRU(3, 4), attention=nn.MultiheadAttention(4, 2), out=nn.Linear(4, 2))


def fixed_length(x: Tensor) -> int:
    return len(x)


def len_of_batch() -> nn.Module:
    """len(x) where x.shape[0] is meant."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(torch.cat([m.token.expand(fixed_length(x), -1, -1), x], 1).mean(1))

    return Net(forward, token=torch.randn(1, 3), out=nn.Linear(3, 2))


def speech() -> nn.Module:
    """Log-probabilities over time, for CTC."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h, _ = m.layer(F.relu(m.conv(x.mT)).mT)
        return m.out(h).log_softmax(2)

    return Net(forward, conv=nn.Conv1d(3, 4, 3), layer=nn.GRU(4, 4, batch_first=True), out=nn.Linear(4, 4))


def ctc(log_probs: Tensor, y: Tensor) -> Tensor:
    """[N, T, C] and two labels each."""
    n, t = log_probs.shape[:2]
    inputs, targets = torch.full((n,), t), torch.full((n,), 2)
    return F.ctc_loss(log_probs.transpose(0, 1), y + 1, inputs, targets, reduction="sum") / n


def double_head() -> nn.Module:
    """A dict of outputs, both of which the loss reads."""
    return Net(
        lambda m, x: (lambda h: {"class": m.label(h), "box": m.box(h).sigmoid()})(m.body(x)),
        body=mlp(4, 5, 5), label=nn.Linear(5, 3), box=nn.Linear(5, 4),
    )  # fmt: skip


def detection(output: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output["class"], y["class"]) + F.smooth_l1_loss(output["box"], y["box"])


def hamiltonian() -> nn.Module:
    """The field of an energy: its gradient by the position is the output (Greydanus et al. 2019)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda z: m.energy(z).sum())(x)
        position, momentum = gradient.chunk(2, 1)
        return torch.cat([momentum, -position], 1)

    return Net(forward, energy=mlp(4, 6, 1))


def soft_argmax() -> nn.Module:
    """Key points as the mean place under a heat map."""

    def forward(m: Net, x: Tensor) -> Tensor:
        heat = m.conv(x).flatten(2).softmax(2).view(-1, 2, 5, 5)
        places = torch.linspace(0, 1, 5, dtype=x.dtype)
        return torch.stack([(heat.sum(2) * places).sum(2), (heat.sum(3) * places).sum(2)], 2)

    return Net(forward, conv=nn.Conv2d(1, 2, 3, padding=1))


def field_renderer() -> nn.Module:
    """Colours along a ray, weighted by what is not yet absorbed."""

    def forward(m: Net, x: Tensor) -> Tensor:
        density, colour = m.field(x).split([1, 3], 2)
        alpha = 1 - torch.exp(-F.softplus(density))
        through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
        return (alpha * through * colour.sigmoid()).sum(1)

    return Net(forward, field=mlp(3, 6, 4))


ROWS = (
    Row("outputs preallocated", preallocated, normal(4, 3), normal(4, 2)),
    Row("graphs, scatter in place", scattered, several(normal(4, 3), ids(4, 5), ids(4, 5)), normal(2)),
    Row("masked assignment", masked_assignment, normal(4), ids(3), CE),
    Row("checks of values", guarded, normal(4), ids(3), CE),
    Row("checkpointed", checkpointed, normal(4), ids(3), CE),
    Row("gradient reversal", adversary, normal(4), normal(3)),
    Row("binarised, straight-through", binarised, normal(4), ids(3), CE),
    Row("VQ-VAE", vector_quantised, normal(5), normal(5), vq_loss),
    Row("mixture of experts, top-k", sparse_experts, normal(2, 3), normal(2, 2)),
    Row("mixture of experts, routed", routed_experts, normal(4, 3), normal(2)),
    Row("actor and critic", policy, several(normal(4), normal(2)), normal(2), policy_loss),
    Row("LSTM, last word by length", lengths, several(ids(7, 5), lambda n: 1 + torch.randint(5, (n,))), ids(3), CE),
    Row("time first", time_first, normal(4, 3), normal(4, 2)),
    Row("len(x)", len_of_batch, normal(4, 3), normal(2)),
    Row("speech, CTC", speech, normal(8, 3), ids(3, 2), ctc, convex=False),
    Row("two outputs in a dict", double_head, normal(4),
        lambda n: {"class": torch.randint(3, (n,)), "box": uniform(4)(n)}, detection, exact=False),
    Row("Hamiltonian net", hamiltonian, normal(4), normal(4)),
    Row("soft argmax", soft_argmax, normal(1, 5, 5), uniform(2, 2)),
    Row("rays, absorbed", field_renderer, normal(5, 3), uniform(3)),
)  # fmt: skip
