"""What a boolean mask picks is read, changed and written in its place; how many entries that are is in the data."""

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

ROWS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
COLUMNS = torch.tensor([True, False, True])
ASSIGNED: list[tuple[str, str]] = [
    ("number", "h[h > 0] = 0.5"),
    ("tensor", "h[h > 0] = torch.tensor(0.5, dtype=h.dtype)"),
    ("one", "h[h > 0] = torch.tensor([0.5], dtype=h.dtype)"),
    ("samples", "h[x[:, 0] > 0] = -1"),
    ("row", "h[x[:, 0] > 0] = rows"),
    ("row of one", "h[x[:, 0] > 0] = rows[None]"),
    ("parameter", "h[x[:, 0] > 0] = m.b.bias"),
    ("opposite", "h[~(h > 0)] = 0"),
    ("both", "h[(h > 0) & (x < 1)] = 0"),
    ("any", "h[(x > 1).any(1)] = -1"),
    ("no numbers", "h[torch.isnan(h)] = 0"),
    ("columns", "h[:, columns] = 0"),
    ("columns by a row", "h[:, columns] = rows[:1]"),
    ("a view", "h[:, 0][x[:, 0] > 0] = 0"),
    ("mixed", "h[x[:, 0] > 0, 1] = 0"),
    ("by name", "h.index_put_((h > 0,), rows[0])"),
    ("added", "h.index_put_((h > 0,), rows[1], accumulate=True)"),
    ("added rows", "h.index_put_((x[:, 0] > 0,), rows, accumulate=True)"),
    ("fill", "h.masked_fill_(h > 0, 0)"),
    ("more axes", "h = h[:, :, None] * x[:, None]; h[x > 0] = rows; h[h > 1] = 0; h = h.sum(2)"),
    ("last axes", "h = h[:, :, None] * x[:, None]; h[:, :, columns] = 7; h = h.sum(2)"),
    ("twice", "h[h > 1] = 1; h[h < -1] = -1"),
]
CHANGED: list[tuple[str, str]] = [
    ("times", "h[h > 0] *= 2"),
    ("plus", "h[h > 0] += 1.5"),
    ("over", "h[x[:, 0] > 0] /= 3"),
    ("by a parameter", "h[x[:, 0] > 0] *= m.b.bias"),
    ("square", "h[h > 0] = h[h > 0] ** 2"),
    ("log", "h[h > 0] = h[h > 0].log()"),
    ("root", "h[h > 0] = (2 * h[h > 0]).sqrt() + 1"),
    ("of another", "k = 2 * h; h[h > 0] = k[h > 0].exp() - k[h > 0]"),
    ("where", "h[h > 0] = torch.where(h[h > 0] > 1, h[h > 0] * 3, h[h > 0])"),
]


def written(code: str) -> Function:
    compiled = compile(code, __file__, "exec")

    def forward(m: Any, x: Tensor) -> Any:
        names = {"h": m.a(x).clone(), "x": x, "m": m, "torch": torch, "rows": ROWS, "columns": COLUMNS}
        exec(compiled, names)
        return m.b(names["h"])

    return Function(forward, **layers())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name,code", [*ASSIGNED, *CHANGED], ids=[name for name, _ in [*ASSIGNED, *CHANGED]])
def test_right(name: str, code: str) -> None:
    check(written(code))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("code", ["h[h > 0] = 0", "h[h > 0] *= 2", "h[h > 0] = h[h > 0].log()"])
def test_curvature(code: str) -> None:
    model, (x, y) = written(code).double(), batch()
    result = tn.compile(model, LOSS, (x, y), [tn.DiagGGN()])(x, y)["diag_ggn"]
    for name, value in diag_ggn(model, nn.MSELoss(), x, y).items():
        torch.testing.assert_close(result[name], value)


LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda f, y: (f - y)[y > 0].square().sum(),
    lambda f, y: (f - y)[y[:, 0] > -9].square().mean(),
    lambda f, y: (f - y).square().masked_select(y > 0).sum(),
    lambda f, y: ((f - y).square() * (y > 0)).sum() / (y > 0).sum(),
    lambda f, y: (f - y)[y > 0].abs().mean(),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_what_is_picked(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, (x, y) = Function(lambda m, x: m.b(m.a(x).tanh()), **layers()).double(), batch()
    want = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    result = tn.compile(model, loss, (x, y), [tn.Grad()])(x, y)["grad"]
    torch.testing.assert_close(tuple(result.values()), want)


def classes(*shape: int) -> tuple[Tensor, Tensor]:
    """x [*shape, 3], and classes of which some are none."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, 3, generator=generator).double(), torch.randint(-1, 3, shape, generator=generator)


WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def picked(loss: Callable[..., Any], **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of what one mask picks, as people write it for nodes, tokens and labels that are not there."""

    def masked(f: Tensor, y: Tensor) -> Tensor:
        mask = y >= 0
        return loss(f[mask], y[mask], **options)  # type: ignore[no-any-return]

    return masked


def twice_masked(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f[y >= 0], y[y >= 0])


def entries(f: Tensor, y: Tensor) -> Tensor:
    mask = (y >= 0)[..., None].expand(f.shape)
    return F.mse_loss(f[mask], y[..., None].expand(f.shape).to(f)[mask])


everything = torch.ops.aten.slice.Tensor

TARGETS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "nodes": (picked(F.cross_entropy), (6,)),
    "two masks": (twice_masked, (6,)),
    "tokens": (picked(F.cross_entropy), (6, 4)),
    "sum": (picked(F.cross_entropy, reduction="sum"), (6, 4)),
    "each": (lambda f, y: picked(F.cross_entropy, reduction="none")(f, y).mean(), (6, 4)),
    "weight": (picked(F.cross_entropy, weight=WEIGHT), (6,)),
    "ignored": (picked(F.cross_entropy, ignore_index=1), (6,)),
    "smooth": (picked(F.cross_entropy, label_smoothing=0.1), (6, 4)),
    "squares": (entries, (6,)),
    "huber": (picked(lambda u, v: F.huber_loss(u[:, 0], v.to(u))), (6,)),
    "all of an axis": (picked(lambda u, v: F.cross_entropy(everything(everything(u), 1), v)), (6, 4)),
    "binary": (picked(lambda u, v: F.binary_cross_entropy_with_logits(u[:, 0], v.clamp(max=1).to(u))), (6,)),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", TARGETS)
def test_losses_of_outputs_and_targets(name: str) -> None:
    """The gradient of two batches, and the diagonal of the GGN by the loss's own Hessian."""
    loss, shape = TARGETS[name]
    model, (x, y) = Function(lambda m, x: m.b(m.a(x).tanh()), **layers()).double(), classes(*shape)
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.DiagGGN()])
    for rows in (slice(None), slice(1, 5)):
        want = torch.autograd.grad(loss(model(x[rows]), y[rows]), list(model.parameters()))
        torch.testing.assert_close(tuple(program(x[rows], y[rows])["grad"].values()), want)
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, y), model(x)).reshape(2 * [x.numel()])
    for p, value in zip(model.parameters(), program(x, y)["diag_ggn"].values(), strict=True):
        rows_of = [torch.autograd.grad(each, p, retain_graph=True)[0].flatten() for each in model(x).flatten()]
        J = torch.stack(rows_of)
        torch.testing.assert_close(value.flatten(), (J.T @ hessian @ J).diagonal())


REFUSED: list[tuple[str, str]] = [
    ("h = h * h[h > 0].median()", "as many entries as the boolean mask gt"),
    ("h = h * torch.cat([h[h > 0], h[h > 0]]).sum()", "as many entries as the boolean mask gt"),
    ("h = h * h[h > 0].sort()[0].sum()", "as many entries as the boolean mask gt"),
    ("h[h > -99] = x[x > -99]", r"what the mask gt\w* picks to where gt"),
    (
        "h[h > 0] = torch.arange(int((h > 0).sum()), dtype=h.dtype)",
        r"depends on the data.*\n  .*test_masks\.py, line \d+",
    ),
    ("h = h * len(h[h > 0])", r"depends? on the data.*\n  .*test_masks\.py, line \d+"),
    ("h = h * h[h > 0].shape[0]", r"depends? on the data.*\n  .*test_masks\.py, line \d+"),
    ("h = h * h[h > 0].sum()", "mixes samples"),
]
WITH_TARGETS: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
    (lambda f, y: F.mse_loss(f[y > 0], y[y > 0]), r"one mask for all that it picks \(mask = y > 0; f\[mask\]"),
    (lambda f, y: F.mse_loss(*(h[y > 0].cumsum(0) for h in (f, y))), "as many entries as the boolean mask"),
]


@pytest.mark.parametrize("loss,message", WITH_TARGETS)
def test_refused_losses(loss: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    refused(Function(lambda m, x: m.a(x), **layers()), message, loss=loss)


@pytest.mark.parametrize("code,message", REFUSED)
def test_refused(code: str, message: str) -> None:
    refused(written(code), message)
