"""Capture refuses what it cannot represent, and says what, where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnbackprop.compiler.capture.export import capture
from tnbackprop.errors import InputError, UnsupportedError
from tnbackprop.rules import RULES

from ...capturing import Function


def _attend(h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(h, h, h)


REFUSED: list[tuple[str, Callable[..., Any], str]] = [
    ("gram", lambda m, x: m.a(x) @ m.a(x).T, "two batch axes"),
    ("merge", lambda m, x: m.a(x).T.reshape(-1, 3), "mixes samples"),
    ("view", lambda m, x: m.a(x).view(3, -1), "mixes samples"),
    ("shift", lambda m, x: m.a(x)[1:], "cuts the batch"),
    ("flip", lambda m, x: m.a(x).flip(0), "along the batch axis"),
    ("softmax", lambda m, x: m.a(x).softmax(0), "along the batch axis"),
    ("centre", lambda m, x: m.a(x) - m.a(x).mean(0), "mixes samples"),
    ("half", lambda m, x: m.a(torch.cat([x, x]))[: 2 * x.shape[0] : 2], "along the batch axis"),
    ("interleaved", lambda m, x: m.a(x).repeat_interleave(2, 0)[: x.shape[0]], "along the batch axis"),
    ("einsum", lambda m, x: torch.einsum("nd,md->md", m.a(x), x), "2 letters"),
    ("sequence", lambda m, x: _attend(m.a(x)[None, None]), "batch first"),
    ("positions", lambda m, x: F.conv1d(m.a(x).T[None], torch.ones(3, 3, 3), padding=1), "batch first"),
    ("recurrence", lambda m, x: m.lstm(m.a(x)[:, None])[0], "one batch size"),
    ("normalised", lambda m, x: F.normalize(m.a(x), dim=0), "mixes samples"),
    ("permute", lambda m, x: m.a(x)[torch.randperm(x.shape[0])], "picks samples"),
    ("first", lambda m, x: m.a(x)[0], "single samples"),
    ("fixed", lambda m, x: m.a(x).view(4, -1), "one batch size"),
    ("branch", lambda m, x: m.a(x) if x.sum() > 0 else x, "torch.where"),
    ("long", lambda m, x: m.a(x) if x.shape[0] == 4 else x, "one batch size"),
    ("loop", lambda m, x: sum(m.a(row) for row in x), "nor loop over samples or parts of the batch"),
    ("item", lambda m, x: m.a(x) * x.sum().item(), "depend on the data"),
    ("mask", lambda m, x: m.a(x)[x > 0], "depend"),
    ("complex", lambda m, x: torch.fft.fft(m.a(x)), "returns a complex tensor"),
    ("counter", lambda m, x: m.a(x) + m.count.add_(1), "writes to 'count'"),
    (
        "no shapes",
        lambda m, x: torch.fake_quantize_per_tensor_affine(m.a(x), 0.1, 0, -128, 127),
        r"(?s)torch has no shape function of aten.fake_quantize.*Write that otherwise, or give the module a rule",
    ),
    ("batch norm", lambda m, x: m.bn(m.a(x)), r"model.eval\(\)"),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name,forward,message", REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(name: str, forward: Callable[..., Any], message: str) -> None:
    model = Function(forward, a=nn.Linear(3, 3), bn=nn.BatchNorm1d(3), lstm=nn.LSTM(3, 2))
    model.register_buffer("count", torch.zeros(()))
    with pytest.raises(UnsupportedError, match=message):
        capture(model, None, (torch.randn(4, 3), None), {})


X, Y = torch.randn(4, 3), torch.randint(3, (4,))

WRONG: list[tuple[str, Any, Any, Any, str]] = [
    ("model", F.relu, None, (X, Y), "not a torch.nn.Module"),
    ("loss", nn.Linear(3, 3), "mse", (X, Y), "loss is str"),
    ("pair", nn.Linear(3, 3), None, X, "pair"),
    ("sizes", nn.Linear(3, 3), None, (X, Y[:2]), "x has batch size 4 but y has 2"),
    ("empty", nn.Linear(3, 3), None, (X[:0], Y[:0]), "empty"),
    ("option", nn.Linear(3, 3), None, ((X, 3), Y), "x.1. is int"),
    ("vector loss", nn.Linear(3, 3), nn.CrossEntropyLoss(reduction="none"), (X, Y), r"\[N\]"),
    ("tensor loss", nn.Linear(3, 3), lambda o, y: 1.0, (X, Y), "float"),
    ("dtype", nn.Sequential(nn.Linear(3, 3)), None, (X.long(), Y), r"module '0' \(Linear\).*dtype"),
    ("target", nn.Linear(3, 3), nn.CrossEntropyLoss(), (X, Y.float()), "the loss"),
    ("shape", nn.Sequential(nn.Linear(4, 3)), None, (X, Y), r"module '0' \(Linear\)"),
    ("arguments", nn.Linear(3, 3), None, ((X, X), Y), "positional"),
]


@pytest.mark.parametrize("name,model,loss,example,message", WRONG, ids=[row[0] for row in WRONG])
def test_wrong_input(name: str, model: Any, loss: Any, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(model, loss, example, {})


def test_complex_input_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="complex"):
        capture(nn.Linear(3, 3), None, (torch.zeros(2, 3, dtype=torch.complex64), None), {})


def test_a_cache_in_forward() -> None:
    """What the first call computed is a constant of the others."""
    kept = dict[str, Tensor]()

    def forward(m: Any, x: Tensor) -> Tensor:
        if "weight" not in kept:
            kept["weight"] = m.a.weight.tanh()
        return m.b(x @ kept["weight"].T)

    model = Function(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    with pytest.raises(UnsupportedError, match=r"parameter 'a.weight' has a gradient, but not .* \(a cache\)"):
        capture(model, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 3)), RULES)
