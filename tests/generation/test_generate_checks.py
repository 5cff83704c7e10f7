"""Every generated file's check runs and agrees, whichever quantities it has and whatever the shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.sweep.derived import Extraction

from .test_generate import loaded

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
ONE = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
X, Y = torch.randn(4, 3), torch.arange(4) % 3


class Table(nn.Module):
    """A weight of two axes that the cut does not part: one factor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None, None] * self.weight


class Gain(nn.Module):
    """A parameter without axes, and an output without others than the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x.tanh().squeeze(1)


RULES = tn.RULES | {Table: lambda module: "output[n, i, j] = weight[i, j] * x[n]"}


def agrees(made: tn.Generated, *labels: str) -> list[str]:
    """The check's status is 0; the lines that it has of each label."""
    lines: list[str] = []
    file = loaded(made.source)
    file["print"] = lambda line: lines.append(line)
    assert file["check"]() == 0, lines
    for label in labels:
        assert any(line.startswith(f"ok    {label}") for line in lines), (label, lines)
    return lines


CHOICES = ("jacobians", "ntk", "grad,jacobians", "jacobians,diag_ggn", "kfac,ntk", "bl89", "diag_ggn,bl89")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("quantities", CHOICES)
def test_each_choice_of_quantities(quantities: str) -> None:
    """What a definition reads is in the file, also where no other quantity needs it."""
    labels = [f"{key} of 0.weight" for key in quantities.split(",")]
    lines = agrees(tn.generate(NET, quantities, example=(X, Y), loss=nn.CrossEntropyLoss()), *labels)
    rooted = any(key in quantities for key in ("diag_ggn", "kfac"))
    assert any("Hessian of the loss" in line for line in lines) == rooted
    agrees(tn.generate(NET, quantities, example=X), *labels)


def test_only_what_is_recorded_and_roots() -> None:
    """Factors with positions are recorded: the root of the loss's Hessian is compared all the same."""
    model = nn.Conv2d(1, 2, 2)
    made = tn.generate(model, "kflr", example=(torch.randn(3, 1, 3, 3), torch.randn(3, 2, 2, 2)), loss=nn.MSELoss())
    lines = agrees(made, "Hessian of the loss by the output from columns that are exact")
    assert sum("as recorded" in line for line in lines) == 2


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", ["kflr", "kfac", "kfra"])
def test_axes_of_size_one(quantity: str) -> None:
    batch = torch.randn(4, 1), torch.randn(4, 1)
    names = [f"{quantity} of {layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")]
    agrees(tn.generate(ONE, quantity, example=batch, loss=nn.MSELoss()), *names)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (3, 1), (1, 1)])
def test_one_factor_of_a_parameter_with_two_axes(shape: tuple[int, int]) -> None:
    x, y = torch.randn(4), torch.randn(4, *shape)
    program = tn.compile(Table(*shape), nn.MSELoss(), (x, y), [tn.KFLR()], rules=RULES)
    items = [item for item in program.compiled.derived.items if isinstance(item, Extraction)]
    assert shape != (2, 3) or [len(item.factors["kflr"].legs) for item in items] == [1]
    made = tn.generate(Table(*shape), "kflr,kfac,kfra", example=(x, y), loss=nn.MSELoss(), rules=RULES)
    agrees(made, "kflr of weight, 1 sample", "kfac of weight, 1 sample", "kfra of weight, 1 sample")
    agrees(tn.generate(Table(*shape), "kflr,kfra,hesscale", example=x, rules=RULES), "kflr of weight", "kfra of weight")


def test_a_diagonal_factor() -> None:
    """That of an embedding is kept as its diagonal; a wrong one is noticed."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    made = tn.generate(model, "kflr", example=(torch.arange(4), torch.randn(4, 2)), loss=nn.MSELoss())
    agrees(made, "kflr of 0.weight, 1 sample")
    file = loaded(made.source)
    computed = file["computed"]

    def wrong(*arguments: Any) -> Any:
        found = computed(*arguments)
        A, B = found["kflr", "0.weight"]
        assert A.shape == (5,) and B.shape == (3, 3)
        return found | {("kflr", "0.weight"): (2 * A, B)}

    file["computed"] = wrong
    assert file["check"]() == 1


@pytest.mark.parametrize("of_layer", [False, True])
def test_parameters_and_outputs_without_axes(of_layer: bool) -> None:
    """[N] for an output, [] for a parameter."""
    model = nn.Sequential(nn.Linear(3, 1), Gain())
    quantities = "batch_l2,batch_dot,sqrt_ggn_mc,ggn_trace,ggn_gram,ntk,hessian_diag,hesscale,kfra"
    example = X if of_layer else (X, torch.randn(4))
    made = tn.generate(model, quantities, example=example, loss=None if of_layer else nn.MSELoss())
    agrees(made, *(f"{key} of 1.gain" for key in quantities.split(",")[:-2]))


class Attention(nn.Module):
    """With a chance of dropping that is handed to the operator."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance, self.net = chance, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        f = self.net(x).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(f, f, f, dropout_p=self.chance * self.training).squeeze(1)


EACH = tn.BatchGrad(scale=tn.Scale.UNSCALED)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25), nn.Linear(4, 3)).eval(),
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(3, 4), nn.RReLU(), nn.AlphaDropout(0.25), nn.Linear(4, 3)).eval(),
        Attention(0.25).eval(),
        Attention(0.0),
    ],
    ids=["eval", "chance 0", "others", "attention", "attention of chance 0"],
)
def test_what_drops_nothing_is_not_random(model: nn.Module) -> None:
    loss = nn.CrossEntropyLoss()
    agrees(tn.generate(model, "grad,batch_l2", "model", example=(X, Y), loss=loss), "grad", "batch_l2")
    some = tn.compile(model, loss, (X, Y), [replace(EACH, samples=(1, 2))], check=False)(X, Y)["batch_grad"]
    whole = tn.compute(model, loss, (X, Y), [EACH])["batch_grad"]
    for name, value in some.items():
        torch.testing.assert_close(value, whole[name][1:3])
