"""The typed program as text: what is done part by part is shown as such, with its steps and what it leaves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.sweep.derived import PerSample
from tnbackprop.runtime import Program


def program(*quantities: tn.Quantity) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 9))
    return tn.compile(model, nn.CrossEntropyLoss(), (torch.randn(4, 5), torch.randint(9, (4,))), list(quantities))


def table(program: Program) -> list[str]:
    """The lines of the program, without the passes."""
    return program.explain("program").split("\n\n")[0].splitlines()[2:]


@pytest.mark.parametrize(("rows", "width"), [(4, 1), (8, 2)])
def test_rounds_of_columns(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with what it takes; its steps further in, by what they are for; sums and concatenations behind it."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    monkeypatch.setattr(search, "_widths", lambda rates, batch: (max(1, rates.rows // batch),))
    found = program(tn.DiagGGN(), tn.SqrtGGN())
    (rounds,) = found.compiled.plan.loops
    lines = table(found)
    (head,) = (k for k, line in enumerate(lines) if line.startswith("  rounds "))
    assert lines[head].endswith(f" 8 columns, {width} at a time: column_0 of root_0")
    end = next(k for k, line in enumerate(lines) if line == "left by rounds")
    names = [found.compiled.texts[step][0] for step in rounds.body.steps]
    inner = [line.split()[0] for line in lines[head + 1 : end] if re.match(r"    \w", line)]
    assert inner == names and names
    assert "  diag_ggn of 2.weight" in lines[head:end] and "cotangent of layer_0" not in "".join(lines[end:])
    left = [re.split(r"  +", line.strip())[-1] for line in lines[end + 1 :]]
    names += [found.compiled.writer.names(variable) for variable, _ in rounds.rows]
    made = [re.fullmatch(r"(the sum of )?(\w+) (over|of) all rounds(, one after the other)?", text) for text in left]
    assert len(left) == 8 and all(each and each[2] in names for each in made)
    assert sum(bool(each and each[1]) for each in made) == sum(bool(each and each[4]) for each in made) == 4


def test_a_sum_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier sweep gave is what the sum starts from."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=4))
    shown = "\n".join(table(program(tn.HessianDiag(per_sample=True))))
    assert re.search(r"  total_1_\d .* total_0_\d \+ the sum of \w+ over all rounds", shown), shown


def test_what_is_linear_is_behind_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done once, and is no step of the loop."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=4))
    lines = table(program(tn.HessianDiag()))
    start = lines.index("left by rounds")
    behind = next(line for line in lines[start:] if "torch.mm(" in line)
    summed = re.search(r"torch\.mm\((\w+)\.t", behind)
    assert re.match(r"  \w", behind) and summed
    assert any(re.match(rf"  {summed[1]} .* the sum of \w+ over all rounds", line) for line in lines[start:])


def test_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of a sample, once, with its steps further in and what it gives."""

    def fastest(width: int, others: Sequence[int], least: PerSample, attempt: Any) -> Any:
        return attempt(1024, PerSample(2, 4))

    monkeypatch.setattr(search, "_fastest", fastest)
    found = program(tn.DiagGGN())
    lines = table(found)
    (head,) = (k for k, line in enumerate(lines) if line.startswith("  slice_0 "))
    body = found.compiled.writer.bodies[0]
    given = [found.compiled.texts[value][0] for value in body.values]
    assert lines[head].endswith(f"a function of some samples, that gives {', '.join(given)}")
    inner = [line.split()[0] for line in lines if re.match(r"    \w", line)]
    assert inner == [found.compiled.texts[step][0] for step in body.steps]
    assert set(given) <= set(inner)


def test_a_shape_that_nothing_says() -> None:
    """What only the code of a rule reads has a question mark, and no shape of a scalar."""
    lines = table(program(tn.DiagGGN()))
    shapes = {line.split()[0]: line.split("  ")[1:] for line in lines if line.startswith("  ")}
    assert "?" in [each.strip() for each in shapes["loss_tail"]]
    assert "[]" in [each.strip() for each in shapes["loss"]]
