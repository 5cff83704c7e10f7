"""Losses written out in several lines: a diagonal Hessian, or that of a softmax, has a formula; others are decomposed.

The oracle is the dense Hessian of the loss by the output, from autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

N, C = 5, 4
Loss = Callable[[Any, Any], Tensor]
VECTOR = torch.arange(4.0, dtype=torch.float64)


def real() -> Tensor:
    return torch.randn(N, C).double()


def binary() -> Tensor:
    return (torch.randn(N, C) > 0).double()


def positive() -> Tensor:
    return real().abs()


def halves(f: Tensor, y: Tensor) -> Tensor:
    """Reconstruction, and the divergence from a standard normal one of a mean and a logarithm of a variance."""
    rest = f[:, 2:3].square() + f[:, 3:].exp() - f[:, 3:] - 1
    return ((f[:, :2] - y[:, :2]).square().sum(-1) + 0.5 * rest.sum(-1)).mean()


DIAGONAL: dict[str, tuple[Loss, Callable[[], Tensor]]] = {
    "squares": (lambda f, y: 0.5 * (f - y).square().sum(-1).mean(), real),
    "weighted squares": (lambda f, y: (VECTOR * (f - y) ** 2).mean(), real),
    "weights by sample": (lambda f, y: ((f - y) ** 2 * y[:, :1] ** 2).mean(), real),
    "by einsum": (lambda f, y: torch.einsum("nc,nc->n", f - y, f - y).mean(), real),
    "Poisson": (nn.PoissonNLLLoss(), positive),
    "multi-label": (nn.MultiLabelSoftMarginLoss(), binary),
    "soft binary": (lambda f, y: -(y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f)).mean(), binary),
    "log cosh": (lambda f, y: torch.log(torch.cosh(f - y)).mean(), real),
    "Charbonnier": (lambda f, y: torch.sqrt((f - y) ** 2 + 1e-3).sum() / len(f), real),
    "Huber": (lambda f, y: torch.where((f - y).abs() < 1, (f - y) ** 2 / 2, (f - y).abs() - 0.5).mean(), real),
    "expectile": (lambda f, y: (torch.where(f > y, 0.1, 0.9) * (f - y) ** 2).mean(), real),
    "pinball": (lambda f, y: torch.maximum(0.9 * (y - f), -0.1 * (y - f)).mean(), real),
    "hinge": (lambda f, y: F.relu(f - y).pow(3).mean(), real),
    "masked": (lambda f, y: ((f - y) ** 2 * (y > 0)).sum() / len(f), real),
    "masked mean": (lambda f, y: ((f - y) ** 2 * (y > 0)).sum() / (y > 0).sum(), real),
    "masked by the output": (lambda f, y: ((f - y) ** 2 * (f > 0)).sum() / len(f), real),
    "detached": (lambda f, y: (f.detach() * f + f.exp()).sum() / len(f), real),
    "detached weights": (lambda f, y: ((f - 1) ** 2 * f.detach().exp()).sum() / len(f), real),
    "three of torch": (
        lambda f, y: F.huber_loss(f, y) + F.mse_loss(f, y) + F.binary_cross_entropy_with_logits(f, (y > 0).double()),
        real,
    ),
    "with a penalty": (lambda f, y: F.mse_loss(f, y) + 1e-3 * f.square().mean(), real),
    "nested four times": (lambda f, y: nested(f, y, 4), real),
    "nested": (lambda f, y: (F.softplus(torch.tanh(f) * 2 - y) ** 2).mean(), real),
    "quotient": (lambda f, y: (y / (1 + f.exp())).mean(), positive),
    "focal": (
        lambda f, y: ((1 - f.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(f, y, reduction="none")).mean(),
        binary,
    ),
    "slices": (halves, real),
    "chunks": (
        lambda f, y: sum((a - b).cosh().sum(-1) for a, b in zip(f.chunk(2, 1), y.chunk(2, 1), strict=True)).mean(),
        real,
    ),
    "one of them": (lambda f, y: ((f[:, 0] - y[:, 0]) ** 2).mean(), real),
    "some twice": (lambda f, y: (f[:, [0, 2, 2]] - 1).pow(4).mean(), real),
    "gathered": (lambda f, y: (f.gather(1, y[:, :2].abs().long().clamp(max=3)) - 1).pow(4).mean(), real),
    "turned": (lambda f, y: ((f - y) ** 2 + (f.flip(1) - y) ** 2).mean(), real),
    "rolled": (lambda f, y: (f.roll(1, 1) - y).square().mean(), real),
    "padded": (lambda f, y: (F.pad(f, (1, 1)) - 1).exp().mean(), real),
    "transposed": (lambda f, y: (f.T - y.T).pow(4).mean(), real),
    "flattened": (lambda f, y: (f.reshape(-1) - y.reshape(-1)).square().mean(), real),
    "split": (lambda f, y: (f.view(-1, 2, 2) - y.view(-1, 2, 2)).pow(4).sum((1, 2)).mean(), real),
    "with every target": (lambda f, y: (f[:, :, None] - y[:, None, :]).pow(4).mean(), real),
}
def smoothed(f: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels."""
    logs = F.log_softmax(f, 1)
    return -(0.9 * logs.gather(1, classes(y)).squeeze(1) + 0.1 * logs.mean(1)).mean()


def nested(f: Tensor, y: Tensor, times: int) -> Tensor:
    for _ in range(times):
        f = torch.tanh(f) * 1.1 + 0.1 * y
    return f.square().mean()


def multiplied(f: Tensor, y: Tensor, times: int) -> Tensor:
    made = torch.ones_like(f)
    for k in range(times):
        made = made * (1 + torch.sigmoid(f + k) + y * f)
    return made.mean()


def classes(y: Tensor) -> Tensor:
    return y.abs().long().clamp(max=3)[:, :1]


def pairs(y: Tensor) -> Tensor:
    """Two labels of two classes."""
    return (y[:, :2] > 0).long()


CROSS = partial(F.cross_entropy, reduction="none")
SOFTMAX: dict[str, tuple[Loss, Callable[[], Tensor]]] = {
    "a quarter": (lambda f, y: F.cross_entropy(f, classes(y)[:, 0]) / 4, real),
    "minus": (lambda f, y: -F.cross_entropy(f, classes(y)[:, 0], reduction="sum") / len(f), real),
    "weighted samples": (lambda f, y: (CROSS(f, classes(y)[:, 0]) * y[:, 0]).mean(), positive),
    "signed samples": (lambda f, y: (CROSS(f, classes(y)[:, 0]) * y[:, 0]).mean(), real),
    "masked samples": (lambda f, y: (CROSS(f, classes(y)[:, 0]) * (y[:, 0] > 0)).sum() / (y[:, 0] > 0).sum(), real),
    "a sum by weights": (lambda f, y: F.cross_entropy(f, classes(y)[:, 0], reduction="sum") / y.square().sum(), real),
    "all options": (
        lambda f, y: 3 * F.cross_entropy(f, classes(y)[:, 0], VECTOR + 1, ignore_index=2, label_smoothing=0.1),
        real,
    ),
    "soft labels": (lambda f, y: (CROSS(f, y.softmax(1)) * y[:, 0]).mean(), positive),
    "weighted positions": (lambda f, y: (CROSS(f.view(-1, 2, 2), pairs(y)) * y[:, 2:]).mean(), positive),
    "signed positions": (lambda f, y: (CROSS(f.view(-1, 2, 2), pairs(y)) * y[:, 2:]).mean(), real),
    "positions flattened": (
        lambda f, y: (CROSS(f.view(-1, 2, 2).flatten(0, 1), pairs(y).flatten()) * y[:, 2:].flatten()).mean(),
        real,
    ),
    "logarithms flattened": (
        lambda f, y: (F.log_softmax(f.view(-1, 2, 2).flatten(0, 1), 1) * y.reshape(-1, 2)).mean(),
        real,
    ),
    "divergence": (lambda f, y: F.kl_div(F.log_softmax(f, 1), y.softmax(1), reduction="batchmean"), real),
    "distilled": (lambda f, y: 4 * F.kl_div(F.log_softmax(f / 2, 1), (y / 2).softmax(1), reduction="batchmean"), real),
    "probabilities": (lambda f, y: -(y.softmax(-1) * F.log_softmax(f, -1)).sum(-1).mean(), real),
    "labels": (lambda f, y: -F.log_softmax(f, 1).gather(1, classes(y)).mean(), real),
    "smoothed": (smoothed, real),
    "rewards": (lambda f, y: -(F.log_softmax(f, 1)[:, 1] * y[:, 0]).mean(), positive),
    "rewards and penalties": (lambda f, y: -(F.log_softmax(f, 1)[:, 1] * y[:, 0]).mean(), real),
    "positions": (lambda f, y: -(F.log_softmax(f.view(-1, 2, 2), 1) * y.view(-1, 2, 2)).sum((1, 2)).mean(), positive),
    "positions first": (
        lambda f, y: -(F.log_softmax(f.view(-1, 2, 2), 2) * y.view(-1, 2, 2)).sum((1, 2)).mean(),
        positive,
    ),
}
def assigned(f: Tensor, y: Tensor, step: int) -> Tensor:
    out = f.clone()
    out[:, 1::step] -= 0.1 * f[:, :1] * y[:, 1::step]
    return out.logsumexp(1).mean()


OTHERS: dict[str, tuple[Loss, Callable[[], Tensor]]] = {
    "a norm": (lambda f, y: torch.linalg.vector_norm(f - y, dim=1).pow(4).mean(), real),
    "mean and variance": (lambda f, y: (f[:, 2:].exp() * (f[:, :2] - y[:, :2]) ** 2 - f[:, 2:]).sum(-1).mean(), real),
    "turned and multiplied": (lambda f, y: (f * f.flip(1)).mean() + f.square().mean(), real),
    "neighbours": (lambda f, y: ((f[:, 1:] - f[:, :-1]) ** 2).sum(-1).mean() + (f - y).square().mean(), real),
    "halves multiplied": (lambda f, y: (f[:, :2] * f[:, 2:]).mean() + f.square().mean(), real),
    "averages": (lambda f, y: F.avg_pool1d(f[:, None], 2)[:, 0].square().mean(), real),
    "a sum": (lambda f, y: (f.mean(1) - y[:, 0]).square().mean(), real),
    "a matrix": (lambda f, y: ((f - y) @ VECTOR).square().mean(), real),
    "with each other": (lambda f, y: (f[:, :, None] - f[:, None, :]).pow(4).mean(), real),
    "entropy": (lambda f, y: (F.log_softmax(f, 1) * (F.log_softmax(f, 1).exp() - y)).sum(1).mean(), positive),
    "nested sixteen times": (lambda f, y: nested(f, y, 16), real),
    "ten factors": (lambda f, y: multiplied(f, y, 10), real),
    "thirty bumps": (lambda f, y: sum(torch.exp(-((f - k * y) ** 2) / 9) for k in range(30)).mean(), real),
    "assigned to an open end": (lambda f, y: assigned(f, y, 1), real),
    "assigned to every other": (lambda f, y: assigned(f, y, 2), real),
    "softmax and squares": (lambda f, y: F.mse_loss(f, y) - F.log_softmax(f, 1)[:, 0].mean(), real),
}
EVERY = {**DIAGONAL, **SOFTMAX, **OTHERS}


def problem(name: str) -> tuple[nn.Module, Loss, Tensor, Tensor]:
    torch.manual_seed(0)
    loss, target = EVERY[name]
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, C)).double()
    return model, loss, torch.randn(N, 3).double(), target()


def compiled(name: str, *quantities: tn.Quantity) -> tn.Program:
    model, loss, x, y = problem(name)
    return tn.compile(model, loss, (x, y), list(quantities), indefinite=tn.Indefinite.CLIP)


def blocks(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model, its output, and the Hessian of each sample, without negative curvature."""
    model, loss, x, y = problem(name)
    output = model(x)
    whole = torch.autograd.functional.hessian(lambda f: loss(f, y), output.detach())
    values, vectors = torch.linalg.eigh(torch.stack([whole[n, :, n, :] for n in range(N)]))
    return model, output, vectors @ (values.clamp(min=0)[..., None] * vectors.mT)


@pytest.mark.parametrize("name", EVERY)
def test_the_diagonal_of_the_ggn(name: str) -> None:
    """And whether an eigendecomposition is taken."""
    program = compiled(name, tn.DiagGGN())
    assert ("torch.linalg.eigh" in program.source) == (name in OTHERS)
    _, _, x, y = problem(name)
    model, output, H = blocks(name)
    parameters = dict(model.named_parameters())
    J = {key: torch.zeros(N, C, *p.shape).double() for key, p in parameters.items()}
    for n in range(N):
        for c in range(C):
            rows = torch.autograd.grad(output[n, c], list(parameters.values()), retain_graph=True)
            for key, row in zip(parameters, rows, strict=True):
                J[key][n, c] = row
    for key, found in program(x, y)["diag_ggn"].items():
        want = torch.einsum("nc...,ncd,nd...->...", J[key], H, J[key])
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_the_diagonal_of_the_hessian(name: str) -> None:
    """Signed: negative curvature counts."""
    model, loss, x, y = problem(name)
    result = compiled(name, tn.HessianDiag())(x, y)["hessian_diag"]
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    for key, p in parameters.items():
        value = lambda v, key=key: loss(torch.func.functional_call(model, {**parameters, key: v}, (x,)), y)  # noqa: E731
        want = torch.autograd.functional.hessian(value, p).reshape(p.numel(), -1).diagonal().reshape(p.shape)
        torch.testing.assert_close(result[key], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["squares", "slices", "masked mean", "split", *SOFTMAX])
def test_what_is_drawn_is_the_diagonal_on_average(name: str) -> None:
    _, _, x, y = problem(name)
    result = compiled(name, tn.DiagGGN(), tn.DiagGGNMC(mc_samples=3000))(x, y, seed=0)
    for key, want in result["diag_ggn"].items():
        torch.testing.assert_close(result["diag_ggn_mc"][key], want, rtol=0.15, atol=0.05 * float(want.max()))


MERGED = ["squares", "slices", "masked", "weights by sample", "split", "distilled", "a quarter", "weighted positions"]


@pytest.mark.parametrize("name", MERGED)
def test_of_batches_merged(name: str) -> None:
    _, _, x, y = problem(name)
    program = compiled(name, tn.DiagGGN(), tn.HessianDiag(), tn.HesScale(), tn.KFLR())
    whole, merged = program(x, y), tn.over(program, [(x[:2], y[:2]), (x[2:], y[2:])])
    for key in ("diag_ggn", "hessian_diag", "hesscale"):
        for parameter, want in whole[key].items():
            torch.testing.assert_close(merged[key][parameter], want)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


class Cubes(nn.Module):
    """A loss with a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = Cube()

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (self.cube(f) - y).square().mean()


def test_a_rule_is_put_in_its_place() -> None:
    model, _, x, y = problem("squares")
    rules = tn.RULES | {Cube: tn.Rule("output[*s] = x[*s]**3")}
    program = tn.compile(model, Cubes(), (x, y), [tn.HessianDiag()], rules=rules)
    wanted = tn.compile(model, lambda f, y: (f**3 - y).square().mean(), (x, y), [tn.HessianDiag()])
    for key, want in wanted(x, y)["hessian_diag"].items():
        torch.testing.assert_close(program(x, y)["hessian_diag"][key], want)


def test_a_declared_derivative_is_not_that_of_the_formula() -> None:
    model, _, x, y = problem("squares")
    rules = tn.RULES | {Cube: tn.Rule("output[*s] = x[*s]**3", jacobian={"x": "2 * x[*s]"})}
    with pytest.raises(tn.UnsupportedError, match=r"Hessian of Cube in module 'loss.cube'.*does not follow"):
        tn.compile(model, Cubes(), (x, y), [tn.DiagGGN()], rules=rules)


class Autoencoder(nn.Module):
    """Images, means and logarithms of variances."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(12, 4), nn.Linear(2, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.encoder(x.flatten(1)).chunk(2, 1)
        return self.decoder(mean).view(-1, 3, 2, 2), mean, spread


def lower_bound(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    image, mean, spread = outputs
    divergence = 0.5 * (mean.square() + spread.exp() - spread - 1).sum(1)
    return (F.binary_cross_entropy_with_logits(image, x, reduction="none").sum((1, 2, 3)) + divergence).mean()


def test_several_outputs_with_axes_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Autoencoder().double(), torch.rand(4, 3, 2, 2).double()
    program = tn.compile(model, lower_bound, (x, x), [tn.DiagGGN()])
    assert "torch.linalg.eigh" not in program.source
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def joined(theta: dict[str, Tensor]) -> Tensor:
        return torch.cat([each.flatten(1) for each in torch.func.functional_call(model, theta, (x,))], 1)

    def loss(f: Tensor) -> Tensor:
        return lower_bound((f[:, :12].view(-1, 3, 2, 2), f[:, 12:14], f[:, 14:]), x)

    H = torch.autograd.functional.hessian(loss, joined(parameters))
    J = torch.func.jacrev(joined)(parameters)
    for key, found in program(x, x)["diag_ggn"].items():
        want = torch.einsum("nc...,ncmd,md...->...", J[key], H, J[key])
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_many_classes_at_many_positions() -> None:
    """Draws take a number for each position, and no Hessian is made."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(3000, 8), nn.Linear(8, 3000)), torch.randint(3000, (4, 16))
    loss = lambda f, y: -F.log_softmax(f, -1).gather(-1, y.unsqueeze(-1)).mean()  # noqa: E731
    known = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
    ours, theirs = (
        tn.compile(model, each, (tokens, tokens), [tn.DiagGGNMC(mc_samples=2), tn.KFAC()])(tokens, tokens, seed=0)
        for each in (loss, known)
    )
    for key, want in theirs["diag_ggn_mc"].items():
        torch.testing.assert_close(ours["diag_ggn_mc"][key], want)


class OwnLoss(nn.Module):
    """A model that gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, C)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def test_a_factor_of_the_loss_that_a_model_gives() -> None:
    """As gradients that are accumulated have it."""
    torch.manual_seed(0)
    model, x, y = OwnLoss().double(), torch.randn(N, 3).double(), torch.arange(N) % C
    asked = [tn.DiagGGN(), tn.HessianDiag(), tn.KFLR(), tn.DiagGGNMC()]
    one, other = (
        tn.compute(model, loss, ((x, y), None), asked, seed=0) for loss in (lambda f, y: f, lambda f, y: f / 4)
    )
    for key in ("diag_ggn", "hessian_diag", "diag_ggn_mc"):
        for name, value in one[key].items():
            torch.testing.assert_close(other[key][name], value / 4)


@pytest.mark.parametrize("name", ["weighted samples", "all options", "weighted positions", "a quarter"])
def test_verified(name: str) -> None:
    _, _, x, y = problem(name)
    asked = tn.DiagGGN(), tn.DiagGGNMC(), tn.HessianDiag(), tn.KFAC()
    assert not tn.verify(compiled(name, *asked), x, y).left_out


def test_many_words_with_weights() -> None:
    """A head with a large vocabulary, and positions that do not count: no Hessian of words is made."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(3000, 8), nn.Linear(8, 3000)), torch.randint(3000, (4, 16))
    some, mask = tokens.masked_fill(tokens % 3 == 0, -100), tokens % 3 != 0
    known = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
    loss = lambda f, y: (CROSS(f.transpose(1, 2), y[0]) * y[1]).sum() / y[1].sum()  # noqa: E731
    asked = [tn.DiagGGNMC(mc_samples=2), tn.KFAC()]
    want = tn.compile(model, known, (tokens, some), asked)(tokens, some, seed=0)
    found = tn.compile(model, loss, (tokens, (tokens, mask)), asked)(tokens, (tokens, mask), seed=0)
    for key, value in want["diag_ggn_mc"].items():
        torch.testing.assert_close(found["diag_ggn_mc"][key], value, rtol=1e-4, atol=1e-7)


def test_many_outputs() -> None:
    """3 072 for each sample: their Hessians, and what decomposes them, would take a gigabyte and minutes."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 3, 3, padding=1), torch.rand(8, 3, 32, 32)
    loss = lambda f, y: (f - y).square().sum((1, 2, 3)).mean()  # noqa: E731
    program = tn.compile(model, loss, (x, x), [tn.KFAC(), tn.DiagGGNMC()])
    assert "torch.linalg.eigh" not in program.source
    assert set(program(x, x, seed=0)["kfac"]) == {"weight", "bias"}
