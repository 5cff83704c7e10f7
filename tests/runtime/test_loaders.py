"""What loaders give: batches as the program takes them, and as a DataLoader flattens them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tnbackprop as tn

N = 7
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Z = X.flip(0) + 1
LABELS = torch.arange(N) % 2


class Product(nn.Module):
    """Of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a * b)


CASES: dict[str, tuple[nn.Module, Any, Any, tuple[Tensor, ...]]] = {
    "x and y": (nn.Linear(3, 2), X, LABELS, (X, LABELS)),
    "x alone": (nn.Linear(3, 2), X, None, (X,)),
    "two inputs": (Product(), (X, Z), None, (X, Z)),
    "two inputs and y": (Product(), (X, Z), LABELS, (X, Z, LABELS)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_loader_flattens(case: str) -> None:
    model, x, y, tensors = CASES[case]
    loss = nn.CrossEntropyLoss() if y is not None else lambda output, _: output.square().sum(-1).mean()
    program = tn.compile(model.double(), loss, (x, y), [tn.Grad(), tn.BatchGrad()], check=False)
    whole, found = program(x, y), tn.over(program, DataLoader(TensorDataset(*tensors), 3))
    for quantity, kept in whole.items():
        for name, value in kept.items():
            torch.testing.assert_close(found[quantity][name], value, rtol=1e-12, atol=1e-14)


def test_batches_that_fit_in_no_way() -> None:
    model, x, y, _ = CASES["two inputs and y"]
    program = tn.compile(model.double(), nn.CrossEntropyLoss(), (x, y), [tn.Grad()], check=False)
    for batch in ([X, Z, Z, LABELS], [X], []):
        with pytest.raises(tn.InputError, match=r"structure .* as its x, but .* compiled for \(tensor, tensor\)"):
            tn.over(program, [batch])
    with pytest.raises(tn.InputError, match="input 'y' is NoneType"):
        tn.over(program, [[X, Z]])


def test_loaders_that_are_none() -> None:
    program = tn.compile(nn.Linear(3, 2).double(), nn.CrossEntropyLoss(), (X, LABELS), [tn.Grad()], check=False)
    for given, why in (
        ([], "the loader gives no batch"),
        (X, "a Tensor gives no batches: give a DataLoader"),
        ({"x": X}, "a dict gives no batches"),
        (3, "a int gives no batches"),
    ):
        with pytest.raises(tn.InputError, match=why):
            tn.over(program, given)  # type: ignore[arg-type]
    with pytest.raises(tn.InputError, match=r"tn.over: Linear is no program: give what tn.compile returns"):
        tn.over(nn.Linear(3, 2), [(X, LABELS)])  # type: ignore[arg-type]
    with pytest.raises(tn.InputError, match=r"seed=0.5: give a whole number"):
        tn.over(program, [(X, LABELS)], seed=0.5)  # type: ignore[arg-type]


def test_a_model_without_tensors_and_a_seed() -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    program = tn.compile(torch.nn.Tanh(), torch.nn.CrossEntropyLoss(), (x, y), [tn.InputGrad()])
    assert tn.over(program, [(x, y)], seed=0).count == 6


def test_a_generator() -> None:
    """It is as good as a seed, goes on from batch to batch, and is one of the two."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    program = tn.compile(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (x, y), [tn.DiagGGNMC()])
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    own = torch.Generator().manual_seed(3)
    first, second = (tn.over(program, batches, generator=own)["diag_ggn_mc"]["weight"] for _ in range(2))
    assert torch.equal(first, tn.over(program, batches, seed=3)["diag_ggn_mc"]["weight"])
    assert not torch.equal(first, second)
    with pytest.raises(tn.InputError, match=r"tn\.over: seed=3 and a generator"):
        tn.over(program, batches, seed=3, generator=own)
