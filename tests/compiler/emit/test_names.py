"""Modules may be called what the emitted function calls its own values, arguments and functions."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.emit.source import OWN
from tnbackprop.compiler.lower.table import HELPERS
from tnbackprop.compiler.plan.plan import Plan
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program.expr import Call, Value
from tnbackprop.compiler.program.functions import Function

from ...programs import writer


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


@pytest.mark.thinned(8)
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


@pytest.mark.parametrize("function", HELPERS, ids=str)
def test_a_value_is_not_called_as_a_function_of_the_source(function: Function) -> None:
    """Whatever it would like to be called; neither as the sum over samples, nor as an argument of the program."""
    inputs = tuple(Value(name, None, (2, 2), hint=name) for name in (function.name, "added", *sorted(OWN)))
    text = writer([Value("made", Call(function, inputs), (2, 2), hint=function.name, inputs=inputs)])
    names = {text.names(value) for value in (*inputs, *text.steps)}
    assert len(names) == len(inputs) + 1 and not names & {function.name, "added", *OWN}
    (defined,) = (ast.parse(source).body[-1] for source in text.known.values())
    assert isinstance(defined, ast.FunctionDef) and defined.name == function.name
