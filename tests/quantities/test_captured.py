"""What is not captured again: nothing that could give another graph."""

from __future__ import annotations

from collections.abc import Callable

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


@pytest.mark.parametrize("change", [frozen, value, attribute, mode, loss, target])
def test_a_change_is_seen(change: Callable[[Problem], None], monkeypatch: pytest.MonkeyPatch) -> None:
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    for hits in (0, 1):
        before = source(mlp().build())
        assert captures.hits == hits
    changed = mlp().build()
    change(changed)
    after = source(changed)
    assert captures.hits == 1
    monkeypatch.setattr(compiler, "capture", capture)
    assert source(changed) == after and source(mlp().build()) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_the_same_source(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was kept gives what one that is captured anew does."""
    captures = Captures(capture)
    monkeypatch.setattr(compiler, "capture", captures)
    sources = [source(case.build()) for _ in range(2)]
    monkeypatch.setattr(compiler, "capture", capture)
    assert sources == [source(case.build())] * 2
