"""Embeddings: Kronecker factors are those of a linear layer on one-hot inputs, and no one-hot is ever built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.linalg import Kind

from ..models import Apply
from ..problems import seq
from ..second_order import TOLERANCE, error, make

VOCABULARY, WIDTH = 5, 3
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "kflr": ("KFLR", {}),
    "kfra": ("KFRA", {}),
    "sampled": ("KFAC", {"mc_samples": 2}),
    "empirical": ("KFAC", {"fisher": "EMPIRICAL"}),
}


def twins(table: nn.Module, twice: bool) -> tuple[nn.Module, nn.Module]:
    """The same network with a look-up and with a matrix on one-hot inputs; `twice`: two tables of one parameter."""
    torch.manual_seed(0)
    head = (Apply(torch.tanh), Apply(lambda t: t.mean(1)), nn.Linear(WIDTH, 3))
    matrix = nn.Linear(VOCABULARY, WIDTH, bias=False)
    matrix.weight = nn.Parameter(table.weight.detach().T.clone())
    again = (lambda layer: lambda t: layer(t) * layer(t.roll(1, 1))) if twice else (lambda layer: layer)
    models = [seq(Uses(layer, again(layer)), *head).double() for layer in (table, matrix)]
    return models[0], models[1]


class Uses(nn.Module):
    """A function of the input that calls a layer."""

    def __init__(self, layer: nn.Module, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randint(VOCABULARY - 1, (4, 3))  # the last token never occurs
    return x, F.one_hot(x, VOCABULARY).double(), torch.randint(3, (4,))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("sharing", ["EXPAND", "REDUCE"])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_one_hot_inputs(kind: str, sharing: str, twice: bool) -> None:
    """A is the diagonal of the tokens' frequencies where positions are tied, B that of the linear layer."""
    name, options = KINDS[kind]
    x, one_hot, y = batch()
    table, matrix = twins(nn.Embedding(VOCABULARY, WIDTH), twice)
    quantity = make(name, sharing=sharing, strict=True, **options)
    if twice and sharing == "REDUCE":
        with pytest.raises(tn.UnsupportedError, match="the reduce approximation of several uses is not defined"):
            tn.compile(table, nn.CrossEntropyLoss(), (x, y), [quantity])
        return
    found = []
    for model, inputs in ((table, x), (matrix, one_hot)):
        program = tn.compile(model, nn.CrossEntropyLoss(), (inputs, y), [quantity])
        found.append(program(inputs, y, seed=0)[quantity.name]["0.layer.weight"])
    (A, B), (want_B, want_A) = (factors.factors for factors in found)
    assert error(B, want_B) <= TOLERANCE
    if sharing == "EXPAND":
        assert found[0].kinds == (Kind.DIAGONAL, Kind.FULL)
        assert error(A, torch.bincount(x.flatten(), minlength=VOCABULARY).double() / x.numel()) <= TOLERANCE
        assert error(A.diag(), want_A) <= TOLERANCE
    else:
        assert found[0].kinds == (Kind.FULL, Kind.FULL)
        assert error(A, want_A) <= TOLERANCE
    assert error(found[0].to_dense(), torch.kron(A.diag() if A.ndim == 1 else A, B)) <= TOLERANCE


def test_padding_has_no_factor() -> None:
    """The row that is not trained is not an input."""
    x, _, y = batch()
    table, _ = twins(nn.Embedding(VOCABULARY, WIDTH, padding_idx=1), twice=False)
    found = tn.compute(table, nn.CrossEntropyLoss(), (x, y), [tn.KFLR(), tn.DiagGGN()])
    counts = torch.bincount(x.flatten(), minlength=VOCABULARY).double() / x.numel()
    counts[1] = 0
    assert error(found["kflr"]["0.layer.weight"].factors[0], counts) <= TOLERANCE
    assert not found["diag_ggn"]["0.layer.weight"][[1, VOCABULARY - 1]].any()


BUILT_BY_ROWS = (
    tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance(), tn.DiagGGN(), tn.KFLR(),
    tn.KFAC(), tn.SqrtGGN(), tn.GGNTrace(), tn.HessianDiag(), tn.NTK(),
)  # fmt: skip


@pytest.mark.parametrize("quantity", BUILT_BY_ROWS, ids=lambda quantity: quantity.name)
def test_no_one_hot_is_built(quantity: tn.Quantity) -> None:
    """Nothing has an axis for the vocabulary beside one for the positions."""
    x, _, y = batch()
    table, _ = twins(nn.Embedding(VOCABULARY, WIDTH), twice=False)
    program = tn.compile(table, nn.CrossEntropyLoss(), (x, y), [quantity])
    assert f"== torch.arange({VOCABULARY}" not in program.source
    assert "index_add_" in program.source or ".unsqueeze(2) == " in program.source or "x.reshape" in program.source


def test_what_is_refused() -> None:
    x, _, y = batch()
    loss = nn.CrossEntropyLoss()
    by_frequency, _ = twins(nn.Embedding(VOCABULARY, WIDTH, scale_grad_by_freq=True), twice=False)
    with pytest.raises(tn.UnsupportedError, match=r"(?s)embedding.*scale_grad_by_freq.*Leave the option out"):
        tn.compile(by_frequency, loss, (x, y), [tn.Grad()])
    renormed, _ = twins(nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0), twice=False)
    with pytest.raises(tn.UnsupportedError, match=r"max_norm writes to its weight.*renormalize between steps"):
        tn.compile(renormed, loss, (x, y), [tn.Grad()])


def test_sparse_gradients_are_dense_here() -> None:
    x, _, y = batch()
    plain, _ = twins(nn.Embedding(VOCABULARY, WIDTH), twice=False)
    sparse, _ = twins(nn.Embedding(VOCABULARY, WIDTH, sparse=True), twice=False)
    sparse.load_state_dict(plain.state_dict())
    results = [tn.compute(model, nn.CrossEntropyLoss(), (x, y), [tn.Grad()])["grad"] for model in (plain, sparse)]
    assert torch.equal(results[0]["0.layer.weight"], results[1]["0.layer.weight"])
