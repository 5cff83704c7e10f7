"""Pictures of what quantities read besides the model: operands, phases, totals, and gradients by the inputs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.diagram.core import Diagram
from tnbackprop.drawing import quantity
from tnbackprop.errors import InputError
from tnbackprop.quantities.factors import Factors

from ..drawn import read

QUANTITIES = [
    tn.ClippedGrad(), tn.ClippedGrad("each", mode=tn.Clipping.PER_PARAMETER), tn.WeightedGrad(), tn.DirectionalGrad(),
    tn.Total(tn.BatchDot()), tn.InputGrad(), tn.ProjectedFactors(),
]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> tn.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    batch = torch.randn(4, 5), torch.randint(2, (4,))
    return tn.compile(model, nn.CrossEntropyLoss(), batch, QUANTITIES, check=False)


def tensors(drawn: tn.Drawing) -> set[str]:
    return {node.text for node in read(drawn.svg)[0].values() if node.kind == "tensor"}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("key", "of", "names"),
    [
        ("directional_grad", "0.weight", {"x", "g_layer_0", "direction"}),
        ("weighted_grad", "2.bias", {"g_layer_2", "weights"}),
        ("clipped_grad", "2.bias", {"g_layer_2", "weights"}),
        ("each", "0.bias", {"g_layer_0", "weights"}),
        ("input_grad", "x", {"p_0_weight", "g_layer_0"}),
        ("batch_dot_total", "0.bias", {"g_layer_0"}),
    ],
)
def test_operands_are_called_by_their_key(made: tn.Program, key: str, of: str, names: set[str]) -> None:
    assert tensors(tn.draw(quantity(made, key, of))) == names


def test_operands_of_factors_and_other_names(made: tn.Program) -> None:
    factors = quantity(made, "projected_factors", "2.weight")
    assert isinstance(factors, Factors)
    read_by = re.findall(r">(projection_[01]²?)<", tn.draw(factors).svg)
    assert {each.rstrip("²") for each in read_by} == {"projection_0", "projection_1"}
    drawn = tn.draw(quantity(made, "directional_grad", "0.bias"), names={"direction": "d", "g_layer_0": "g"})
    assert tensors(drawn) == {"g", "d"}


def test_a_key_that_is_the_name_of_something_else() -> None:
    class Named(tn.Quantity):
        def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
            return ((J.T @ g) * J.operand("x")).sum_parameter()

    model = nn.Linear(3, 2)
    made = tn.compile(model, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [Named("named")], check=False)
    assert tensors(tn.draw(quantity(made, "named", "weight"))) == {"x", "g_linear", "operand x"}


def test_totals(made: tn.Program) -> None:
    """Without a parameter, what each adds, in the order of the model."""
    shares = quantity(made, "batch_dot_total")
    assert list(shares) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(isinstance(each, Diagram) for each in shares.values())
    assert "0.weight[n, m]  =" in tn.draw(shares).svg
    with pytest.raises(InputError, match=r"'each' is no total over parameters: name .*\(totals are batch_dot_total\)"):
        quantity(made, "each")


def test_the_flow_has_operands_phases_and_what_reads_them(made: tn.Program) -> None:
    drawn = tn.draw(made, names={"direction": "d"})
    nodes, wires = read(drawn.svg)
    named = {node.text: key for key, node in nodes.items()}
    between = "between, for clipped_grad Σ squared_norms [N] → weights [N]"
    assert nodes[named[between]].kind == "phase"
    each = "between, for each Σ squared_norms [N] → weights [N] of each parameter"
    ends = {(a, b): leg for leg, a, b in wires}
    assert ends[named["loss"], named[between]] == ""
    assert ends[named[between], named["clipped_grad"]] == ends[named[each], named["each"]] == "weights"
    assert (named["loss"], named["clipped_grad"]) not in ends
    assert (named["d of each parameter"], named["directional_grad"]) in ends
    assert (named["weights [N]"], named["weighted_grad"]) in ends
    assert "2 phases" in repr(drawn) and "tn phase" in drawn.tikz and "between, for each" in drawn.dot
