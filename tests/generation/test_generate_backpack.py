"""Generated module extensions inside BackPACK, for layers that it does not know, against this library's numbers.

BackPACK is no requirement of the tests: these count as slow, and `make test-slow` installs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from .test_generate import loaded, passes

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Factorised(nn.Module):
    """A linear layer [2·3] -> [4] whose weight is a sum of three outer products (CP)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(size, 3) / 2) for size in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nij,ir,jr,kr->nk", x.reshape(-1, 2, 3), self.a, self.b, self.c)


LAYERS = {"layer_norm": lambda: nn.LayerNorm(6), "factorised": Factorised}
FIRST = (
    tn.BatchGrad(),
    tn.BatchL2(),
    tn.SecondMoment(scale=tn.Scale.BACKPACK),
    tn.Variance(scale=tn.Scale.BACKPACK),
)
EXACT = (tn.SqrtGGN(), tn.DiagGGN(), tn.DiagGGN("diag_ggn_batch", per_sample=True), tn.KFLR())
DRAWN = (tn.SqrtGGNMC(), tn.DiagGGNMC(), tn.DiagGGNMC("diag_ggn_mc_batch", per_sample=True), tn.KFAC())


def problem(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The layer behind and before linear ones."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    width = 6 if name == "layer_norm" else 4
    model = nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(width, 3)).double()
    return model, torch.randn(7, 5).double(), torch.arange(7) % 3


def extended(name: str, quantities: tuple[tn.Quantity, ...]) -> tuple[dict[str, Any], nn.Module, Tensor, Tensor]:
    model, x, y = problem(name)
    made = tn.generate(model[1], quantities, tn.Target.BACKPACK, example=torch.randn(4, 6).double())
    return loaded(made.source), model, x, y


@pytest.mark.parametrize("name", LAYERS)
def test_inside_backpack(name: str) -> None:
    """All its exact extensions, of the layer and of the linear one before it, to which columns are pulled back."""
    backpack: Any = importlib.import_module("backpack")
    file, model, x, y = extended(name, (*FIRST, *EXACT))
    quantities = (*FIRST, *(q for q in EXACT if not isinstance(q, tn.SqrtGGN)))
    want = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [*quantities, tn.SqrtGGN()])(x, y)
    backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    for extension, (_, quantity, field) in file["EXTENSIONS"].items():
        model.zero_grad()
        with backpack.backpack(file["install"](extension(), type(model[1]))):
            loss(model(x), y).backward()
        for parameter, value in model.named_parameters():
            got, expected = getattr(value, field), want[quantity][parameter]
            if quantity == "sqrt_ggn":  # its root has other columns, with the same sum of outer products
                got, expected = (t.flatten(2).transpose(0, 1) for t in (got, expected))
                got, expected = got.mT @ got, expected.mT @ expected
            elif quantity == "kflr":
                got, expected = product(got), expected.to_dense()
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert set(file["EXTENSIONS"]) == {
        getattr(backpack.extensions, key)
        for key in ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "SqrtGGNExact", "DiagGGNExact",
                    "BatchDiagGGNExact", "KFLR")
    }  # fmt: skip


def product(factors: list[Tensor]) -> Tensor:
    block, *others = factors
    for factor in others:
        block = torch.kron(block, factor)
    return block


@pytest.mark.parametrize("name", LAYERS)
def test_drawn_columns(name: str) -> None:
    """With very many draws the estimates come close to what they estimate."""
    backpack: Any = importlib.import_module("backpack")
    file, model, x, y = extended(name, DRAWN)
    want = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.DiagGGN(), tn.KFLR()])(x, y)
    backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    for key, exact in (("DiagGGNMC", "diag_ggn"), ("KFAC", "kflr")):
        extension = getattr(backpack.extensions, key)
        torch.manual_seed(0)
        with backpack.backpack(file["install"](extension(mc_samples=20000), type(model[1]))):
            loss(model(x), y).backward()
        for parameter, value in model[1].named_parameters():
            got, expected = getattr(value, file["EXTENSIONS"][extension][2]), want[exact][f"1.{parameter}"]
            if exact == "kflr":
                got, expected = product(got), expected.to_dense()
            assert (got - expected).norm() < 0.05 * expected.norm(), (key, parameter)


@pytest.mark.parametrize("name", LAYERS)
def test_checks_itself(name: str, tmp_path: Path) -> None:
    model, _, _ = problem(name)
    made = tn.generate(model[1], [*FIRST, *EXACT, *DRAWN], "backpack", example=torch.randn(4, 6).double())
    passes(made.source, tmp_path)


def test_refused_inside_backpack() -> None:
    """What was not generated, and subsampling, which BackPACK's interface does not do for a module."""
    backpack: Any = importlib.import_module("backpack")
    file, model, x, y = extended("layer_norm", (tn.BatchGrad(),))
    with pytest.raises(NotImplementedError, match="has no KFLR: it was generated for BatchGrad"):
        file["install"](backpack.extensions.KFLR(), nn.LayerNorm)
    backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    some = file["install"](backpack.extensions.BatchGrad(subsampling=[0, 2]), nn.LayerNorm)
    with pytest.raises(NotImplementedError, match="do not subsample"), backpack.backpack(some):
        loss(model(x), y).backward()
