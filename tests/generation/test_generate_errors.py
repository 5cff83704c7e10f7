"""What tn.generate refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn


class Unknown(nn.Module):
    """An operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return torch.special.bessel_j0(input * self.weight)


class Transposed(nn.Module):
    """An output with the batch behind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return (input * self.weight).t()


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one * self.weight * other


X = torch.randn(4, 3)
LINEAR = nn.Linear(3, 2)
REFUSED: tuple[tuple[str, type[Exception], str, Any, Any, dict[str, Any]], ...] = (
    ("quantity", tn.InputError, r"unknown quantity 'kflrr': did you mean 'kflr'\?", LINEAR, "grad,kflrr", {}),
    ("no quantity", tn.InputError, "unknown quantity 3: give .*batch_grad", LINEAR, [3], {}),
    ("twice", tn.InputError, "two quantities are called 'grad'", LINEAR, "grad,grad", {}),
    ("target", tn.InputError, r"unknown target 'torhc': did you mean 'torch'\?", LINEAR, "grad", {"target": "torhc"}),
    ("no loss", tn.InputError, "target 'model' needs loss=", LINEAR, "grad", {"target": "model"}),
    ("loss", tn.InputError, "'torch' takes no loss", LINEAR, "grad", {"target": "torch", "loss": nn.MSELoss()}),
    ("same function", tn.InputError, "two functions would be called 'a_b_weight'", LINEAR,
     [tn.Grad("a_b"), tn.Grad("a-b")], {}),
    ("no layer", tn.InputError, "cannot generate from int", 3, "grad", {}),
    ("no model", tn.InputError, "Target.MODEL is a whole model", "output[n] = x[n]", "grad", {"loss": nn.MSELoss()}),
    ("no pair", tn.InputError, r"batch \(x, y\)", LINEAR, "grad", {"loss": nn.MSELoss()}),
    ("no rule", tn.UnsupportedError, r"special_bessel_j0.* has no rule.*\n.*rules=tn.RULES", Unknown(), "grad", {}),
    ("batch behind", tn.UnsupportedError, "needs the batch alone on axis 0", Transposed(), "grad", {}),
    ("joined", tn.UnsupportedError, "kflr joins weight and bias.*BackPACK stores.*\n.*Bias.OWN", LINEAR,
     [tn.KFLR(bias=tn.Bias.JOINED)], {"target": "backpack"}),
    ("autograd", tn.UnsupportedError, "kflr is not available for autograd", LINEAR, "kflr", {"target": "autograd"}),
    ("backpack", tn.UnsupportedError, "batch_dot is not available for BackPACK.*\n.*BatchGrad", LINEAR, "batch_dot",
     {"target": "backpack"}),
    ("empirical", tn.UnsupportedError, "kfac is not available for BackPACK", LINEAR,
     [tn.KFAC(fisher=tn.Fisher.EMPIRICAL)], {"target": "backpack"}),
    ("submodule", tn.UnsupportedError, "'0.weight' belongs to a submodule", nn.Sequential(LINEAR), "batch_grad",
     {"target": "backpack"}),
    ("order of factors", tn.UnsupportedError, "kflr of 'weight': its factors do not follow the parameter's axes",
     nn.ConvTranspose2d(2, 3, 2), "kflr", {"target": "backpack", "example": torch.randn(2, 2, 3, 3)}),
    ("two inputs", tn.UnsupportedError, "the inputs one, other: .* one input", Two(), "batch_grad",
     {"target": "backpack", "example": (X, X)}),
    ("random", tn.UnsupportedError, "is random.*model.eval", nn.Sequential(LINEAR, nn.Dropout()), "grad",
     {"loss": nn.MSELoss(), "example": (X, torch.randn(4, 2))}),
    ("random layer", tn.UnsupportedError, "is random.*model.eval", nn.Sequential(LINEAR, nn.Dropout()), "grad", {}),
    ("no operation", tn.UnsupportedError, "its input as it is: there is nothing", nn.Flatten(), "grad", {}),
    ("no quantities", tn.InputError, "no quantities: give .*batch_grad", LINEAR, [], {}),
    ("shapes", tn.InputError, "no shape for weight", "output[n, o] = weight[o, i] * input[n, i]", "grad",
     {"example": {"input": (4, 3)}}),
    ("no shapes", tn.InputError, '"input": \\(8, 3\\)', "output[n, i] = 2 * input[n, i]", "grad", {}),
    ("no formula", tn.InputError, "a rule without a formula", tn.Rule(jacobian={"input": "1"}), "grad", {}),
)  # fmt: skip


@pytest.mark.parametrize(("error", "match", "what", "quantities", "options"), [row[1:] for row in REFUSED],
                         ids=[row[0] for row in REFUSED])  # fmt: skip
def test_refused(error: type[Exception], match: str, what: Any, quantities: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        tn.generate(what, quantities, **({"example": X} | options))


def test_saving(tmp_path: Path) -> None:
    made = tn.generate(LINEAR, "grad", example=X)
    path = made.save(tmp_path / "layer.py")
    assert path.read_text(encoding="utf-8") == made.source
    path.write_text("mine")
    with pytest.raises(tn.InputError, match=r"layer.py exists.*force=True"):
        made.save(path)
    assert path.read_text() == "mine"
    made.save(path, force=True)
    assert path.read_text(encoding="utf-8") == made.source
    for unwritable in (tmp_path / "none" / "layer.py", tmp_path):
        with pytest.raises(tn.InputError, match=r"cannot be written.*folder that exists"):
            made.save(unwritable, force=True)
