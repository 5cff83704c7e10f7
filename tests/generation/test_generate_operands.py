"""Files with quantities that read operands, come in phases, are totals, or are of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn

from .test_generate import close, loaded
from .test_generate_checks import NET, ONE, X, Y, agrees

CLIPPED = [tn.ClippedGrad(each.value, 0.7, each) for each in tn.Clipping]
DEFINED = [
    *CLIPPED, tn.NaturalGradientSMW(), tn.DirectionalGrad(), tn.WeightedGrad(), tn.DirectionalCurvature(),
    tn.Total(tn.BatchDot()), tn.Total(tn.BatchL2(scale=tn.Scale.UNSCALED), {"first": "0.*", "rest": "*"}),
    tn.Total(tn.GGNTrace()), tn.Total(tn.DirectionalRoot()), tn.InputGrad(), tn.AxisMoments(),
    tn.AxisMoments("individual", individual=True, largest=3), tn.DirectionalRoot("along", root=tn.Labels()),
    tn.DiagGGN("labels", root=tn.Labels()), tn.SqrtGGN("rows", root=tn.Labels()),
]  # fmt: skip
RECORDED = [
    tn.RotatedSecondMoment(), tn.Sketch(size=2), tn.ProjectedFactors(), tn.ClippedGrad("own", mode=torch.reciprocal)
]  # fmt: skip


@dataclass(frozen=True)
class Influence(tn.Quantity):
    """Sum of the individual gradients, each with its pull along d, normalised over all parameters."""

    name: str = "influence"

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return (tn.DirectionalGrad("pull"),)

    def between(self, totals: Any) -> Any:
        return {"c": totals["pull"].tanh() * torch.tensor([0.5, 1.5]).sum()}

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return ((J.T @ g) * g.operand("c")).sum("n")


def expected(program: tn.Program, x: Any, y: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Operands, and what the program gives with them; factors as tuples."""
    operands = program.some_operands(x, y)
    result = program(x, y, operands=operands)
    shown = {key: {n: v.factors if isinstance(v, tn.KroneckerFactors) else v for n, v in result[key].items()}
             for key in program.quantities}  # fmt: skip
    return operands, shown


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_agrees_with_definitions_and_with_the_program(reduction: str) -> None:
    """All that has a definition in first derivatives is compared with it, and is what the program gives."""
    loss = nn.CrossEntropyLoss(reduction=reduction)
    made = tn.generate(NET, DEFINED, example=(X, Y), loss=loss)
    lines = agrees(made, *(f"{q.name} of " for q in DEFINED), "batch_l2_total of first", "input_grad of x")
    assert not [line for line in lines if "recorded" in line]
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), X.double()
    operands, want = expected(tn.compile(model, loss, (x, Y), DEFINED), x, Y)
    _, _, got = loaded(made.source)["compute"](model, x, Y, operands)
    assert {key: set(by) for key, by in got.items()} == {key: set(by) for key, by in want.items()}
    for key, by in want.items():
        for name, value in by.items():
            close(got[key][name], value)


def test_recorded() -> None:
    """What has none, and quantities of the user's own; the header says what is handed in, and is always the same."""
    made = tn.generate(NET, [*RECORDED, Influence()], example=(X, Y), loss=nn.CrossEntropyLoss())
    lines = agrees(made)
    for q in (*RECORDED, Influence()):
        assert any(line.startswith(f"ok    {q.name} of 0.weight, as recorded") for line in lines)
    about = " ".join(loaded(made.source)["__doc__"].split())
    assert "`compute(model, x, y, operands)`" in about
    assert "pull, {parameter: tensor}" not in about and "direction, {parameter: tensor} of their shapes" in about
    assert "sketch_0, {0.weight: [4, 2], 0.bias: [4, 2], 2.weight: [3, 2], 2.bias: [3, 2]}" in about
    assert "ClippedGrad(name='own', mode=reciprocal)" in about
    assert "for influence: c [N] from pull [N]" in about


def test_a_wrong_number_is_found() -> None:
    """Of a clipping that is none."""
    made = tn.generate(NET, [tn.ClippedGrad(max_norm=0.2)], example=(X, Y), loss=nn.CrossEntropyLoss())
    file = loaded(made.source.replace("torch.ops.aten.clamp.default(", "torch.ops.aten.clamp.default(2 * "))
    lines: list[str] = []
    file["print"] = lines.append
    assert file["check"]() == 1
    assert all(line.startswith("WRONG clipped_grad of ") for line in lines[:4])


def test_wrong_operands() -> None:
    example = torch.rand(4, 1) + 0.5, torch.rand(4, 1)
    made = tn.generate(ONE, [tn.DirectionalGrad(), tn.WeightedGrad()], example=example, loss=nn.MSELoss())
    compute = loaded(made.source)["compute"]
    d, w = {name: torch.ones_like(p) for name, p in ONE.named_parameters()}, torch.ones(4)
    _, _, results = compute(ONE, *example, {"direction": d, "weights": w})
    assert set(results) == {"directional_grad", "weighted_grad"}
    wrong: list[tuple[Any, str]] = [
        (None, r"operands: give a dictionary with the keys \['weights', 'direction'\], not NoneType"),
        ({"direction": d}, r"operands: .* not \['direction'\]"),
        ({"direction": w, "weights": w}, "operand 'direction': give a dictionary with the keys .*, not Tensor"),
        ({"direction": d, "weights": 2.0}, "operand 'weights' is float, not a tensor"),
        ({"direction": d, "weights": w[:3]}, r"'weights' has shape \[3\]; it is \[4\] for 4 samples"),
        ({"direction": d, "weights": w.double()}, "'weights' is torch.float64 on cpu; give torch.float32 on cpu"),
        ({"direction": d | {"0.bias": w[:1]}, "weights": w}, r"'direction' of '0.bias' has shape \[1\]; it is \[4\]"),
    ]
    for operands, message in wrong:
        with pytest.raises(ValueError, match=message):
            compute(ONE, *example, operands)


@pytest.mark.parametrize(
    ("quantity", "why"),
    [
        (tn.ClippedGrad(), "clipped_grad is not available .*: it is made of sums over all parameters"),
        (tn.Total(), "batch_l2_total is not available .*: it is made of sums over all parameters"),
        (tn.DirectionalGrad(), "directional_grad .*: operand 'direction' of parameter 'weight' is handed in at the"),
        (tn.InputGrad(), "input_grad .*: the file's vjp"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_a_layer_on_its_own(quantity: tn.Quantity, why: str) -> None:
    with pytest.raises(tn.UnsupportedError, match=rf"{why}.*\n  Generate a model's file: tn.generate"):
        tn.generate(nn.Linear(3, 2), [quantity], example=torch.randn(4, 3))
