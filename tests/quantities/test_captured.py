"""What is not captured again: nothing that could give another graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop import compiler
from tnbackprop.compiler.capture.export import capture

from ..captured import Captures
from ..cases import CASES, Case, Problem
from ..second_order import mlp


def source(problem: Problem) -> str:
    arguments = problem.model, problem.loss, (problem.x, problem.y)
    return tn.compile(*arguments, [tn.Grad(), tn.DiagGGN()], check=False).source


def frozen(problem: Problem) -> None:
    problem.model[0].weight.requires_grad_(False)


def value(problem: Problem) -> None:
    with torch.no_grad():
        problem.model[0].weight[0, 0] += 1


def attribute(problem: Problem) -> None:
    problem.model[1] = nn.ReLU()


def mode(problem: Problem) -> None:
    problem.model.eval() if problem.model.training else problem.model.train()


def loss(problem: Problem) -> None:
    problem.loss.reduction = "sum"


def target(problem: Problem) -> None:
    problem.y[0] = (problem.y[0] + 1) % 3


def samples(problem: Problem) -> None:
    problem.x.resize_(2, *problem.x.shape[1:])
    problem.y.resize_(2)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("change", [frozen, value, attribute, mode, loss, target, samples])
def test_a_change_is_seen(change: Callable[[Problem], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for numbers, which no graph has."""
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    for hits in (0, 1):
        before = source(mlp().build())
        assert captures.hits == hits
    changed = mlp().build()
    change(changed)
    after = source(changed)
    assert captures.hits == (2 if change in (value, target) else 1)
    monkeypatch.setattr(compiler, "capture", capture)
    assert source(changed) == after and source(mlp().build()) == before


def test_a_dtype_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    for target in (y, y.double()):
        tn.compile(model, nn.MSELoss(), (x, target), [tn.Grad()], check=False)
        assert captures.hits == 0


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_a_mode_is_seen(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That a mode has no effect is for a test to see."""
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    problem = mlp().build()
    before = source(problem)
    with mode():
        assert source(problem) == before and captures.hits == 0
    assert source(problem) == before and captures.hits == 1


def test_a_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own by what it says, and what it closes over."""
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    problem = mlp().build()

    def compiled(factor: float) -> None:
        rules = tn.RULES | {torch.ops.aten.tanh.default: lambda call: f"output[*s] = {factor} * input[*s]"}
        tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.Grad()], rules=rules, check=False)

    for factor, hits in ((2, 0), (2, 1), (3, 1)):
        compiled(factor)
        assert captures.hits == hits


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_the_same_source(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was kept gives what one that is captured anew does."""
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    sources = [source(case.build()) for _ in range(2)]
    monkeypatch.setattr(compiler, "capture", capture)
    assert sources == [source(case.build())] * 2
