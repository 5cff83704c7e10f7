"""Constants and copies that are made from the batch size, heads inside the batch axis, losses added up in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnbackprop as tn

from ...capturing import Function
from ...oracle_second import diag_ggn
from ...rehearsing import LOSS, batch, check, layers, refused


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    return layers(w=nn.Linear(3, 6), p=nn.Parameter(torch.randn(2, 3)), q=nn.Parameter(torch.randn(1, 3)))


def attention(bias: Callable[[int], Tensor]) -> Callable[..., Any]:
    """Two heads of one number for three tokens, heads inside the batch axis: [2 N, 3, 1]."""

    def forward(m: Any, x: Tensor) -> Any:
        n = x.shape[0]
        q, k = (m.w(x).view(n, 3, 2) * scale for scale in (1, 2))
        q, k = (h.transpose(1, 2).reshape(n * 2, 3, 1) for h in (q, k))
        weights = torch.baddbmm(bias(n), q, k.transpose(1, 2), beta=0 if bias is empty else 1).softmax(-1)
        return torch.bmm(weights, q).view(n, 2, 3).transpose(1, 2).reshape(n, 6)[:, :3]

    return forward


def empty(n: int) -> Tensor:
    return torch.empty(n * 2, 3, 3, dtype=torch.float64)


def slopes(n: int) -> Tensor:
    own = torch.tensor([1.0, 0.5], dtype=torch.float64)[:, None] * torch.arange(3)
    return own.expand(n, 2, 3).reshape(n * 2, 1, 3)


FORWARDS: dict[str, Callable[..., Any]] = {
    "zeros": lambda m, x: m.a(x) + torch.zeros(x.shape[0], 3, dtype=x.dtype),
    "ones of two": lambda m, x: (m.w(x).view(-1, 3) + torch.ones(2 * x.shape[0], 3, dtype=x.dtype)).view(-1, 6)[:, :3],
    "full in a row": lambda m, x: (
        torch.cat([m.a(x), m.b(x)]) * torch.full((2 * x.shape[0], 3), 3.0, dtype=x.dtype)
    )[x.shape[0] :],
    "both orders": lambda m, x: (
        lambda one: (m.w(x).view(-1, 3) + one).view(-1, 6)[:, :3] + (torch.cat([m.a(x), m.b(x)]) + one).chunk(2)[1]
    )(torch.ones(2 * x.shape[0], 3, dtype=x.dtype)),
    "arange": lambda m, x: m.a(x)[torch.arange(x.shape[0])],
    "repeat": lambda m, x: m.a(x) + m.q.repeat(x.shape[0], 1),
    "repeat of two": lambda m, x: (m.w(x).view(-1, 3) * m.p.repeat(x.shape[0], 1)).view(-1, 6)[:, :3],
    "repeat with others": lambda m, x: (m.w(x) * m.q.repeat(x.shape[0], 2))[:, :3],
    "a new axis": lambda m, x: (m.a(x)[:, None] * m.p.repeat(x.shape[0], 1, 1)).sum(1),
    "tile": lambda m, x: (m.w(x).view(-1, 3) * m.p.tile(x.shape[0], 1)).view(-1, 6)[:, 3:],
    "repeat_interleave": lambda m, x: (
        torch.cat([m.a(x), m.b(x)]) * m.p.repeat_interleave(x.shape[0], 0)
    ).view(2, -1, 3).sum(0),
    "expand": lambda m, x: torch.cat([m.q.expand(x.shape[0], -1, -1), m.a(x)[:, None]], 1).sum(1),
    "expand to two": lambda m, x: (
        m.w(x).view(-1, 3) * m.p[:1].tanh().expand(2 * x.shape[0], 3)
    ).gather(1, torch.tensor([[2, 0]]).expand(2 * x.shape[0], 2)).view(-1, 4)[:, :3],
    "repeated input": lambda m, x: m.a(x.repeat(3, 1)).view(3, x.shape[0], 3).tanh().mean(0),
    "repeated samples": lambda m, x: m.a(x.repeat_interleave(3, 0)).view(-1, 3, 3).tanh().mean(1),
    "repeated positions": lambda m, x: m.a(
        m.w(x).view(-1, 3).repeat_interleave(2, 0)
    ).tanh().view(-1, 2, 2, 3).sum((1, 2)),
    "positions in a row": lambda m, x: m.a(m.w(x).view(-1, 3).repeat(2, 1)).tanh().view(2, -1, 2, 3).sum((0, 2)),
    "chunk": lambda m, x: m.a(x.repeat(2, 1)).tanh().chunk(2)[0] * m.b(x),
    "split and cat": lambda m, x: torch.cat(torch.cat(m.w(x).split(3, 1)).tanh().split(x.shape[0]), 1)[:, 1:4],
    "attention, empty": attention(empty),
    "attention, zeros": attention(lambda n: torch.zeros(n * 2, 3, 3, dtype=torch.float64)),
    "attention, slopes": attention(slopes),
}  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_right(forward: Callable[..., Any]) -> None:
    check(Function(forward, **parts()))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["ones of two", "repeat of two", "chunk"])
def test_one_sample(name: str) -> None:
    check(Function(FORWARDS[name], **parts()), 1)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["ones of two", "repeat of two", "split and cat", "attention, empty"])
def test_curvature(name: str) -> None:
    model, (x, y) = Function(FORWARDS[name], **parts()).double(), batch()
    result = tn.compile(model, LOSS, (x, y), [tn.DiagGGN()])(x, y)["diag_ggn"]
    for key, value in diag_ggn(model, nn.MSELoss(), x, y).items():
        torch.testing.assert_close(result[key], value)


def labels(y: Tensor) -> Tensor:
    return (y[:, 0] > 0).long()


def weighted(output: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(output, labels(y), reduction="none")
    each *= 1 + labels(y)
    return each.mean()


def sliced(output: Tensor, y: Tensor) -> Tensor:
    each = F.nll_loss(output.log_softmax(1), labels(y), reduction="none")
    each[...] += 1
    return each.mean()


def from_none(output: Tensor, y: Tensor) -> Tensor:
    total: Any = None
    for k in range(3):
        term = (output[:, k] - y[:, k]).square().mean()
        if total is None:
            total = term
        else:
            total += term
    return total


def from_zero(output: Tensor, y: Tensor, start: Any = 0) -> Tensor:
    for k in range(3):
        start += (output[:, k] - y[:, k]).square().mean()
    return start


def from_zeros(output: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(output.shape[0], dtype=output.dtype)
    for k in range(3):
        total += (output[:, k] - y[:, k]).square()
    return total.mean()


CONSTANT = torch.arange(6.0, dtype=torch.float64).view(2, 3)
LOSSES: list[Callable[..., Tensor]] = [
    weighted,
    sliced,
    from_none,
    from_zero,
    from_zeros,
    lambda f, y: from_zero(f, y, torch.zeros((), dtype=f.dtype)),
    lambda f, y: F.cross_entropy(f.reshape(-1, 3), torch.zeros(f.shape[0], dtype=torch.long)),
    lambda f, y: F.cross_entropy(torch.cat([f, 2 * f]), torch.cat([labels(y), labels(-y)])),
    lambda f, y: F.cross_entropy(torch.stack([f, 2 * f], 1).view(-1, 3), labels(y).repeat_interleave(2)),
    lambda f, y: F.cross_entropy(torch.stack([f, 2 * f], 1).view(-1, 3), torch.ones(2 * f.shape[0], dtype=torch.long)),
    lambda f, y: F.cross_entropy(torch.stack([f, 2 * f], 1).view(-1, 3), y.new_zeros(2 * len(f), dtype=torch.long)),
    lambda f, y: F.cross_entropy(torch.cat([f, 2 * f]), f.new_full((2 * len(f),), 2, dtype=torch.long)),
    lambda f, y: F.cross_entropy(torch.stack([f, 2 * f], 1).view(-1, 3), torch.tensor([1]).tile(2 * len(f))),
    lambda f, y: F.cross_entropy(torch.stack([f, f], 1).view(-1, 3), torch.tensor([1]).repeat_interleave(2 * len(f))),
    lambda f, y: F.mse_loss(torch.stack([f, 2 * f], 1).view(-1, 3), CONSTANT[:1].repeat(2 * len(f), 1)),
    lambda f, y: F.binary_cross_entropy_with_logits(
        torch.cat([f[:, 0], f[:, 1]]), torch.cat([torch.ones(f.shape[0]), torch.zeros(f.shape[0])]).double()
    ),
]


@pytest.mark.thinned(8)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("written", [False, True])
def test_losses(loss: Callable[..., Tensor], written: bool) -> None:
    """Where forward writes to a view the graph is traced a second time."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        if written:
            h[:, 0] *= 2
        return h

    model, (x, y) = Function(forward, **layers()), batch()
    result = check(model, loss=loss, more=[tn.DiagGGN()])["diag_ggn"]
    for key, value in diag_ggn(model, loss, x, y).items():  # type: ignore[arg-type]
        torch.testing.assert_close(result[key], value)


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x: m.w(x).view(-1, 3) + torch.cat([m.a(x), m.b(x)]), r"different orders, 2·N and N·2"),
    (lambda m, x: m.a(x) * m.p.repeat(x.shape[0], 1)[: x.shape[0]], "along the batch axis"),
]


@pytest.mark.parametrize("forward,message", REFUSED)
def test_refused(forward: Callable[..., Any], message: str) -> None:
    refused(Function(lambda m, x: forward(m, x)[: x.shape[0]], **parts()), message)


def test_labels_of_other_samples() -> None:
    """Rows of (sample, part) against labels of (part, sample)."""

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output.reshape(-1, 3), torch.cat([labels(y), labels(y)]))

    model = Function(lambda m, x: m.w(x), **parts()).double()
    with pytest.raises(tn.UnsupportedError, match=r"in the loss takes axes of one size.*2·N and N·2"):
        tn.compile(model, loss, batch(), [tn.Grad()])
