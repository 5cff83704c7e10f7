"""Operators made of others are taken apart while the model is exported; what is left then, by a trace of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler.capture import exported

from ... import oracle
from ...models import Apply, First
from ...second_order import assert_equal


class Called(nn.Module):
    """A linear layer, and a function of what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def heads(t: Tensor) -> Tensor:
    return t.view(-1, 2, 3, 4)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "by place": lambda t: F.scaled_dot_product_attention(heads(t), heads(t).sin(), heads(t).cos()),
    "by name": lambda t: F.scaled_dot_product_attention(
        query=heads(t), value=heads(t).sin(), key=heads(t).cos(), scale=0.3, is_causal=True
    ),
    "default in between": lambda t: torch.logit(input=t.sigmoid(), eps=1e-3) + torch.logit(t.sigmoid()),
    "method": lambda t: t.sigmoid().logit().diag_embed(dim1=1, dim2=-1),
    "one overload of a name": lambda t: torch.cross(t[..., :3], t[..., 1:], dim=-1),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_taken_apart_while_exported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("the graph is traced again")

    monkeypatch.setattr(exported, "decomposed", refused)
    _compare(Called(FUNCTIONS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("function", [lambda t: t.tile(1, 1, 2), lambda t: torch.linalg.vecdot(t, t.sin())])
def test_others_by_a_trace(function: Callable[[Tensor], Tensor]) -> None:
    """Those that PyTorch takes apart itself."""
    _compare(Called(function))


def test_inside_of_torchs_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """`multi_head_attention_forward` calls attention where no mode sees it; afterwards torch is as it was."""
    monkeypatch.setattr(exported, "decomposed", None)
    before = dict(vars(F))
    model, x = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(2, 3, 4)
    tn.compile(model, nn.MSELoss(), (x, x), [tn.Grad()])
    assert vars(F) == before


def test_layers_keep_their_places() -> None:
    """What is made of a recurrent layer stands in that module."""
    model, x = nn.Sequential(First(nn.LSTM(4, 4, batch_first=True)), Apply(torch.tanh)), torch.randn(2, 6, 4)
    graph = tn.compile(model, nn.MSELoss(), (x, x), [tn.Grad()]).compiled.graph
    assert {call.path for call in graph.calls if "tnbackprop" in str(call.target)} == {"0.layer"}


def _compare(model: nn.Module) -> None:
    model, x = model.double(), torch.randn(2, 6, 4).double()
    y = torch.randn_like(model(x))
    found = tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchGrad()])(x, y)["batch_grad"]
    assert_equal(found, oracle.batch_grad(model, nn.MSELoss(), x, y), "individual gradient")
