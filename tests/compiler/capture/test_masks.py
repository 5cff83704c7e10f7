"""What a boolean mask picks is read, changed and written in its place; how many entries that are is in the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
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


@pytest.mark.parametrize("name,code", [*ASSIGNED, *CHANGED], ids=[name for name, _ in [*ASSIGNED, *CHANGED]])
def test_right(name: str, code: str) -> None:
    check(written(code))


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


@pytest.mark.parametrize("code,message", REFUSED)
def test_refused(code: str, message: str) -> None:
    refused(written(code), message)
