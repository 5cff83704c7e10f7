"""Operators that are captured as others: attention, recurrent layers and cells, losses; against `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import tnbackprop as tn
from tnbackprop.table import Composite

from .. import oracle
from ..cases import CASES, Case, seq
from ..models import Apply, First, MultiHead
from ..problems import function
from ..second_order import TOLERANCE, error

aten = torch.ops.aten
INF = float("inf")
GRID = torch.tensor([0.0, 1.0, 3.0, 4.0]).double()


def attention(name: str, apply: Callable[[Tensor], Tensor], x: tuple[int, ...] = (3, 2)) -> Case:
    return function(name, apply, x)


MADE_OF_OTHERS = (
    attention("attention causal, groups", lambda t: F.scaled_dot_product_attention(
        t.unflatten(2, (2, 2)).transpose(1, 2), t[..., None, :2].transpose(1, 2), t[..., None, 2:].transpose(1, 2),
        is_causal=True, enable_gqa=True)),
    attention("attention, heads joined by a view", lambda t: F.scaled_dot_product_attention(
        *(f(t).unflatten(2, (2, 2)).transpose(1, 2) for f in (torch.sin, torch.cos, torch.tanh)), is_causal=True
        ).transpose(1, 2).contiguous().view(t.shape)),
    attention("attention mask", lambda t: F.scaled_dot_product_attention(
        t, t.sin(), t.cos(), attn_mask=torch.ones(3, 3, dtype=torch.bool).tril(), scale=0.3)),
    Case("multi-head attention", lambda: MultiHead(4, 2), (2, 4)),
    Case("transformer layer", lambda: nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True), (2, 2),
         train=True),
    Case("LSTM, two layers", lambda: First(nn.LSTM(2, 2, num_layers=2, batch_first=True)), (2, 2)),
    Case("GRU, both ways", lambda: First(nn.GRU(2, 1, batch_first=True, bidirectional=True)), (3, 2)),
    Case("RNN without bias", lambda: First(nn.RNN(2, 2, bias=False, batch_first=True)), (2, 2)),
    Case("RNN with relu, time first", lambda: seq(
        Apply(lambda t: t.transpose(0, 1)), First(nn.RNN(2, 2, nonlinearity="relu")),
        Apply(lambda t: t.transpose(0, 1))), (2, 2)),
    Case("LSTM cell", lambda: First(nn.LSTMCell(3, 2))),
    Case("GRU cell", lambda: nn.GRUCell(3, 2)),
    Case("RNN cell", lambda: nn.RNNCell(3, 2)),
    Case("weight norm", lambda: weight_norm(nn.Linear(3, 2))),
    Case("weight norm of the whole", lambda: weight_norm(nn.Linear(3, 2), dim=None)),
    function("moves", lambda t: torch.hstack([t.tile(2, 1), t.fliplr().swapaxes(1, 2).swapaxes(1, 2)]), (2, 3), 2),
    function("masks", lambda t: torch.where(t > 0.2, t, 0.5) * torch.max(t, t.sin()) * t.clip(-1, 1)),
    function("sums of matrices", lambda t: torch.stack([torch.linalg.matrix_norm(t, k, keepdim=True)[:, 0, 0]
             for k in (1, -1, INF, -INF)], 1), (3, 2)),
    function("norms of vectors", lambda t: F.normalize(t, p=INF, dim=1)[:, :1] * torch.stack(
        [torch.linalg.vector_norm(t, k, 1) for k in (INF, -INF, -1, 3)], 1)),
    function("slopes on a grid", lambda t: torch.cat(
        torch.gradient(t, spacing=0.5, dim=(1, 2), edge_order=2), 1), (3, 4)),
    function("slopes at coordinates", lambda t: torch.cat([torch.gradient(t, spacing=(GRID,), dim=1, edge_order=k)[0]
             for k in (1, 2)], 1), (4, 2)),
    function("similarities", lambda t: F.cosine_similarity(t, t.roll(1, 1).exp(), 1)
             + F.pairwise_distance(t, t.roll(1, 1).sin())),
    function("products", lambda t: torch.linalg.vecdot(t, t.sin()) * torch.tensordot(t, torch.eye(4)[0].to(t), 1)),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", MADE_OF_OTHERS, ids=str)
def test_derivatives(case: Case) -> None:
    """Individual gradients, and the diagonal of the GGN of a squared error from the Jacobian."""
    problem = case.build()
    model, loss, x, y = problem.model, problem.loss, problem.x, problem.y
    program = tn.compile(model, loss, (x, y), [tn.BatchGrad(), tn.DiagGGN()])
    result = program(x, y)
    assert "torch.func" not in program.source
    for name, want in oracle.batch_grad(model, loss, x, y).items():
        assert error(result["batch_grad"][name], want) <= TOLERANCE, name
    jacobian = torch.func.jacrev(lambda theta: torch.func.functional_call(model, theta, (x,)))(oracle.parameters(model))
    for name, J in jacobian.items():
        want = J.reshape(y.numel(), *result["diag_ggn"][name].shape).square().sum(0) * 2 / y.numel()
        assert error(result["diag_ggn"][name], want) <= TOLERANCE, name


def test_dropout_of_attention_draws_as_torch_does() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(2, 1, 3, dropout=0.3, batch_first=True).double()
    x, y = torch.randn(3, 2, 2).double(), torch.randn(3, 2, 2).double()
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad()])
    torch.manual_seed(1)
    found = program(x, y)
    torch.manual_seed(1)
    output = model(x)
    assert error(found.output, output) <= TOLERANCE
    want = torch.autograd.grad(nn.functional.mse_loss(output, y), list(model.parameters()))
    for got, expected in zip(found["grad"].values(), want, strict=True):
        assert error(got, expected) <= TOLERANCE


def test_a_row_of_ones_own_comes_first() -> None:
    """With another row for the operator it stays one call."""
    case = next(case for case in CASES if case.name == "attention_bias").build()
    target = aten.scaled_dot_product_attention.default
    assert isinstance(tn.RULES[target], Composite)
    rule = tn.Rule("output[*s, l, v] = query[*s, l, v]")
    rules, example = {**tn.RULES, target: rule}, (case.x, case.y)
    program = tn.compile(case.model, case.loss, example, [tn.Grad()], rules=rules, check=False)
    assert [call.target for call in program.compiled.graph.calls].count(target) == 1


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}])
def test_projected_states(options: dict[str, Any]) -> None:
    """proj_size: h_t = W_hr (o tanh c)."""
    torch.manual_seed(0)
    model = First(nn.LSTM(2, 3, proj_size=1, batch_first=True, **options)).double()
    x, y = torch.randn(3, 2, 2).double(), torch.randn(3, 2, 1 + options.get("bidirectional", False)).double()
    result = tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchGrad(), tn.DiagGGN()])(x, y)
    for name, want in oracle.batch_grad(model, nn.MSELoss(), x, y).items():
        assert error(result["batch_grad"][name], want) <= TOLERANCE, name
    jacobian = torch.func.jacrev(lambda theta: torch.func.functional_call(model, theta, (x,)))(oracle.parameters(model))
    for name, J in jacobian.items():
        want = J.reshape(y.numel(), *result["diag_ggn"][name].shape).square().sum(0) * 2 / y.numel()
        assert error(result["diag_ggn"][name], want) <= TOLERANCE, name
