"""Rows of the zoo: tables, sets, graphs, fields, densities, and layers with tricks."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .zoo import BCE, CE, Net, Row, binary, ids, normal, seq, several, uniform


def mlp(*widths: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return seq(*layers[:-1])


def autoencoder() -> nn.Module:
    return seq(mlp(6, 4, 2), nn.Tanh(), mlp(2, 4, 6))


def vae() -> nn.Module:
    """Mean and log-variance, and the reparametrised code with the noise as an input."""

    def forward(m: Net, x: Tensor, noise: Tensor) -> Tensor:
        mean, log_var = m.encoder(x).chunk(2, 1)
        return torch.cat([m.decoder(mean + noise * torch.exp(0.5 * log_var)), mean, log_var], 1)

    return Net(forward, encoder=mlp(6, 5, 4), decoder=mlp(2, 5, 6))


def elbo(output: Tensor, x: Tensor) -> Tensor:
    image, mean, log_var = output.split([6, 2, 2], 1)
    kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1)
    return ((image - x).square().sum(1) + kl).mean()


class Coupling(nn.Module):
    """An affine coupling layer (Dinh et al. 2017); returns the values and the log-determinant."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.flip, self.net = flip, mlp(2, 5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(1).chunk(2, 1) if self.flip else x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale)
        return torch.cat([a, b * scale.exp() + shift], 1), scale.sum(1, keepdim=True)


def flow() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x, one = m.first(x)
        x, two = m.second(x)
        return torch.cat([x, one + two], 1)

    return Net(forward, first=Coupling(False), second=Coupling(True))


def flow_loss(output: Tensor, y: Tensor) -> Tensor:
    return (0.5 * output[:, :-1].square().sum(1) - output[:, -1]).mean()


def mixture_loss(output: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of a mixture of three normal densities (Bishop 1994)."""
    logits, mean, log_scale = output.chunk(3, 1)
    log_prob = -0.5 * ((y - mean) / log_scale.exp()).square() - log_scale
    return -torch.logsumexp(torch.log_softmax(logits, 1) + log_prob, 1).mean()


def denoiser() -> nn.Module:
    """Sinusoidal embedding of the time; its features scale and shift the hidden layer."""

    def forward(m: Net, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(100.0) * torch.arange(3, dtype=x.dtype) / 3)
        scale, shift = m.time(torch.cat([angles.sin(), angles.cos()], 1)).chunk(2, 1)
        return m.out(F.silu(m.norm(m.inside(x)) * (1 + scale) + shift))

    return Net(
        forward, time=mlp(6, 5, 8, act=nn.SiLU), inside=nn.Linear(4, 4), norm=nn.LayerNorm(4), out=nn.Linear(4, 4)
    )


def nerf() -> nn.Module:
    """Fourier features of a point, density and colour (Mildenhall et al. 2020)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        angles = (x[..., None] * 2.0 ** torch.arange(2, dtype=x.dtype)).flatten(1)
        h = F.relu(m.first(torch.cat([x, angles.sin(), angles.cos()], 1)))
        density, colour = m.density(h), m.colour(h)
        return torch.cat([F.softplus(density), torch.sigmoid(colour)], 1)

    return Net(forward, first=nn.Linear(15, 6), density=nn.Linear(6, 1), colour=nn.Linear(6, 3))


def siren() -> nn.Module:
    return Net(
        lambda m, x: m.c(torch.sin(3 * m.b(torch.sin(30 * m.a(x))))),
        a=nn.Linear(2, 5),
        b=nn.Linear(5, 5),
        c=nn.Linear(5, 3),
    )


def pinn() -> nn.Module:
    """The residual of u' = -u, with u' written by the chain rule."""

    def forward(m: Net, t: Tensor) -> Tensor:
        h = torch.tanh(m.a(t))
        slope = ((1 - h.square()) * m.a.weight[:, 0]) @ m.b.weight.T
        return slope + m.b(h)

    return Net(forward, a=nn.Linear(1, 6), b=nn.Linear(6, 1))


def dlrm() -> nn.Module:
    """Dense features, looked-up ones, and their pairwise products (Naumov et al. 2019)."""

    def forward(m: Net, dense: Tensor, sparse: Tensor) -> Tensor:
        parts = torch.stack([m.bottom(dense), m.first(sparse[:, 0]), m.second(sparse[:, 1])], 1)
        pairs = (parts @ parts.mT)[:, [0, 0, 1], [1, 2, 2]]
        return m.top(torch.cat([parts[:, 0], pairs], 1))

    return Net(forward, bottom=mlp(4, 5, 3), first=nn.Embedding(5, 3), second=nn.Embedding(5, 3), top=mlp(6, 4, 1))


def deep_fm() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        v = m.factors(x)
        pairs = 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1, keepdim=True)
        return m.linear(x).sum(1) + pairs + m.deep(v.flatten(1))

    return Net(forward, factors=nn.Embedding(8, 3), linear=nn.Embedding(8, 1), deep=mlp(9, 4, 1, act=nn.ReLU))


def bags() -> nn.Module:
    return seq(nn.EmbeddingBag(7, 4, mode="mean"), mlp(4, 5, 3))


def two_towers() -> nn.Module:
    def forward(m: Net, user: Tensor, item: Tensor) -> Tensor:
        a, b = F.normalize(m.user(m.users(user)), dim=1), F.normalize(m.item(item), dim=1)
        return (a * b).sum(1, keepdim=True) * m.temperature.exp()

    return Net(forward, users=nn.Embedding(5, 4), user=mlp(4, 4, 3), item=mlp(4, 5, 3), temperature=torch.zeros(1))


def siamese() -> nn.Module:
    """One net for three inputs; the loss is on the distances."""

    def forward(m: Net, x: Tensor) -> Tensor:
        anchor, same, other = m.net(x).unbind(1)
        return torch.stack([(anchor - same).norm(dim=1), (anchor - other).norm(dim=1)], 1)

    return Net(forward, net=mlp(4, 5, 3))


def triplet(distances: Tensor, y: Tensor) -> Tensor:
    return F.softplus(distances[:, 0] - distances[:, 1] + 1).mean()


def deep_sets() -> nn.Module:
    return Net(lambda m, x: m.rho(m.phi(x).sum(1)), phi=mlp(3, 5, 4), rho=mlp(4, 4, 2))


def point_net() -> nn.Module:
    """A transform of the points that is learned, shared layers, a maximum over the points (Qi et al. 2017)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        transform = m.transform(x).mean(1).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        return m.head(m.points(x @ transform).amax(1))

    return Net(forward, transform=mlp(3, 4, 9), points=mlp(3, 5, 6), head=mlp(6, 4, 3))


def graph_convolution() -> nn.Module:
    """Kipf & Welling 2017, with a dense adjacency that comes with the sample."""

    def forward(m: Net, x: Tensor, adjacency: Tensor) -> Tensor:
        A = adjacency + torch.eye(4, dtype=x.dtype)
        scale = A.sum(2).rsqrt()
        A = scale[:, :, None] * A * scale[:, None, :]
        return (A @ m.b(F.relu(A @ m.a(x)))).mean(1)

    return Net(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 3))


def graph_attention() -> nn.Module:
    def forward(m: Net, x: Tensor, adjacency: Tensor) -> Tensor:
        h = m.a(x)
        scores = F.leaky_relu(m.left(h) + m.right(h).mT, 0.2).masked_fill(adjacency == 0, -1e9)
        return m.out(F.elu(scores.softmax(2) @ h).mean(1))

    return Net(forward, a=nn.Linear(3, 4), left=nn.Linear(4, 1), right=nn.Linear(4, 1), out=nn.Linear(4, 3))


def message_passing() -> nn.Module:
    """Messages over a fixed list of edges, added at their targets."""
    source, target = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])

    def forward(m: Net, x: Tensor) -> Tensor:
        messages = m.message(torch.cat([x[:, source], x[:, target]], 2))
        return m.out(torch.cat([x, torch.zeros_like(x).index_add(1, target, messages)], 2)).mean(1)

    return Net(forward, message=mlp(6, 5, 3), out=mlp(6, 4, 2))


class LoRA(nn.Module):
    """A frozen layer and a trained one of low rank (Hu et al. 2021)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * (x @ self.A.T @ self.B.T)


def adapters() -> nn.Module:
    """Trained bottlenecks between frozen layers (Houlsby et al. 2019)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.gelu(m.a(x))
        h = h + m.adapter(h)
        return m.b(h)

    frozen = {name: nn.Linear(*widths).requires_grad_(False) for name, widths in {"a": (4, 6), "b": (6, 3)}.items()}
    return Net(forward, **frozen, adapter=mlp(6, 2, 6, act=nn.GELU))


def weight_norm() -> nn.Module:
    return seq(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(5, 3)))


def spectral_norm() -> nn.Module:
    return seq(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.LeakyReLU(), nn.Linear(5, 1))


def hypernetwork() -> nn.Module:
    """A net makes the weight of a layer, for each sample (Ha et al. 2017)."""

    def forward(m: Net, x: Tensor, code: Tensor) -> Tensor:
        weight = m.hyper(code).view(-1, 3, 4)
        return m.out(torch.tanh(torch.einsum("noi,ni->no", weight, x)))

    return Net(forward, hyper=mlp(2, 5, 12), out=nn.Linear(3, 2))


def highway() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        gate = torch.sigmoid(m.gate(x))
        return m.out(gate * torch.relu(m.body(x)) + (1 - gate) * x)

    return Net(forward, gate=nn.Linear(4, 4), body=nn.Linear(4, 4), out=nn.Linear(4, 2))


def experts() -> nn.Module:
    """All experts, weighted by a gate."""

    def forward(m: Net, x: Tensor) -> Tensor:
        each = torch.einsum("ni,eio->neo", x, m.experts)
        return (m.gate(x).softmax(1)[:, :, None] * F.gelu(each)).sum(1)

    return Net(forward, gate=nn.Linear(4, 3), experts=torch.randn(3, 4, 2))


def neural_ode() -> nn.Module:
    """Four steps of Euler with one net."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 0.25 * m.field(x)
        return m.out(x)

    return Net(forward, field=mlp(3, 5, 3), out=nn.Linear(3, 2))


def radial_basis() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        distances = (x[:, None] - m.centres).square().sum(2)
        return m.out(torch.exp(-distances * F.softplus(m.width)))

    return Net(forward, centres=torch.randn(5, 3), width=torch.zeros(5), out=nn.Linear(5, 2))


def maxout() -> nn.Module:
    return Net(
        lambda m, x: m.out(m.pieces(x).unflatten(1, (4, 3)).amax(2)), pieces=nn.Linear(4, 12), out=nn.Linear(4, 2)
    )


def residual_mlp() -> nn.Module:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = x + m.a(m.norm(x))
        return m.out(x + m.b(x))

    b = seq(nn.BatchNorm1d(4), nn.SELU(), nn.Linear(4, 4))
    return Net(forward, norm=nn.LayerNorm(4), a=mlp(4, 6, 4, act=nn.Mish), b=b, out=nn.Linear(4, 2))


ROWS = (
    Row("linear regression", lambda: nn.Linear(4, 1), normal(4), normal(1)),
    Row("logistic regression", lambda: nn.Linear(4, 1), normal(4), binary(1), BCE),
    Row("MLP", lambda: mlp(4, 6, 6, 3, act=nn.ReLU), normal(4), ids(3), CE),
    Row("MLP, residual, norms", residual_mlp, normal(4), normal(2)),
    Row("MLP, Poisson", lambda: mlp(4, 5, 1), normal(4), uniform(1), nn.PoissonNLLLoss()),
    Row("MLP, Huber", lambda: mlp(4, 5, 2), normal(4), normal(2), nn.SmoothL1Loss()),
    Row("maxout", maxout, normal(4), normal(2)),
    Row("highway net", highway, normal(4), normal(2)),
    Row("radial basis functions", radial_basis, normal(3), normal(2)),
    Row("autoencoder", autoencoder, normal(6), normal(6)),
    Row("VAE", vae, several(normal(6), normal(2)), normal(6), elbo),
    Row("normalizing flow", flow, normal(4), normal(1), flow_loss),
    Row("mixture density net", lambda: mlp(3, 5, 9), normal(3), normal(1), mixture_loss, convex=False),
    Row("diffusion denoiser", denoiser, several(normal(4), uniform()), normal(4)),
    Row("neural ODE, Euler", neural_ode, normal(3), normal(2)),
    Row("NeRF", nerf, normal(3), uniform(4)),
    Row("SIREN", siren, normal(2), uniform(3)),
    Row("PINN residual", pinn, normal(1), lambda n: torch.zeros(n, 1, dtype=torch.float64)),
    Row("DLRM", dlrm, several(normal(4), ids(5, 2)), binary(1), BCE),
    Row("DeepFM", deep_fm, ids(8, 3), binary(1), BCE),
    Row("embedding bags", bags, ids(7, 4), ids(3), CE),
    Row("two towers", two_towers, several(ids(5), normal(4)), binary(1), BCE),
    Row("triplet, shared net", siamese, normal(3, 4), normal(1), triplet),
    Row("DeepSets", deep_sets, normal(4, 3), normal(2)),
    Row("PointNet", point_net, normal(5, 3), ids(3), CE),
    Row("graph convolution", graph_convolution, several(normal(4, 3), binary(4, 4)), ids(3), CE),
    Row("graph attention", graph_attention, several(normal(4, 3), binary(4, 4)), ids(3), CE),
    Row("message passing", message_passing, normal(4, 3), normal(2)),
    Row("LoRA", lambda: seq(LoRA(4, 5), nn.Tanh(), LoRA(5, 3)), normal(4), ids(3), CE),
    Row("adapters", adapters, normal(4), ids(3), CE),
    Row("weight norm", weight_norm, normal(4), normal(3)),
    Row("spectral norm", spectral_norm, normal(4), binary(1), BCE),
    Row("hypernetwork", hypernetwork, several(normal(4), normal(2)), normal(2)),
    Row("mixture of experts, dense", experts, normal(4), normal(2)),
)
