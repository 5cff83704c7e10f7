"""Modules may be called what the emitted function calls its own values, arguments and functions."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.invariants.source import FIXED
from tnbackprop.compiler.plan.plan import Plan
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.translate.names import RESERVED


class Named(nn.Module):
    """Its second layer has this name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last, self.name = nn.Linear(3, 3), nn.Linear(3, 4), name
        setattr(self, name, nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        second: nn.Module = getattr(self, self.name)
        result: Tensor = self.last(torch.tanh(second(torch.tanh(self.first(x)))))
        return result


@pytest.mark.parametrize(
    "name",
    ["memory", "progress", "like", "tensors", "results", "added", "slice_0", "column_0", "root_0", "total_0_0",
     "weight_0", "slot_0_0", "noise_1", "draw_1", "both_1", "t5", "t28", "u3"],
)  # fmt: skip
def test_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as under another name, with loops, drawn columns and large values."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=4))
    monkeypatch.setattr(Plan, "is_large", lambda plan, value: True)
    x, y, found = torch.randn(4, 3), torch.randint(4, (4,)), []
    for each in (name, "second"):
        torch.manual_seed(0)
        quantities = [tn.BatchGrad(), tn.DiagGGN(), tn.SqrtGGN(), tn.SqrtGGNMC(), tn.KFLR()]
        result = tn.compile(Named(each), nn.CrossEntropyLoss(), (x, y), quantities)(x, y, seed=0)
        found.append([result[q.name][f"{each}.weight"] for q in quantities[:4]])
    assert all(map(torch.equal, *found))


def test_functions_of_the_source_are_reserved() -> None:
    names = {node.name for text in FIXED for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert len(names) >= 8 and names <= RESERVED
