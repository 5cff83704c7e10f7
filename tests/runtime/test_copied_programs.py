"""Copies of a program: of the same model, of a copy of it; none is pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tnbackprop as tn

from .. import oracle


class Holder(nn.Module):
    """A model that keeps its program, as an attribute of the model that it is compiled from."""

    program: tn.Program

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0, 1])
LOSS = nn.CrossEntropyLoss()


def holder() -> Holder:
    torch.manual_seed(0)
    model = Holder()
    model.program = tn.compile(model, LOSS, (X, Y), [tn.BatchGrad()])
    return model


def check(program: tn.Program) -> None:
    got = program(X, Y)["batch_grad"]
    for name, want in oracle.batch_grad(program.model, LOSS, X, Y).items():
        torch.testing.assert_close(got[name], want)


def test_copied() -> None:
    program = holder().program
    other = copy.copy(program)
    assert other is not program and other.model is program.model
    assert repr(other) == repr(program)
    check(other)


@pytest.mark.parametrize("with_the_model", [False, True])
def test_deeply_copied(with_the_model: bool) -> None:
    """The copy reads the parameters of the copied model, and the program those of its own."""
    model = holder()
    other = copy.deepcopy(model).program if with_the_model else copy.deepcopy(model.program)
    assert other.model is not model and other.model.program is other
    assert other.source == model.program.source
    with torch.no_grad():
        other.model.layers[0].weight.mul_(2)
    assert not torch.equal(other.model.layers[0].weight, model.layers[0].weight)
    for program in (other, model.program):
        check(program)


def test_not_pickled() -> None:
    with pytest.raises(TypeError, match=r"(?s)a program is not pickled.*Compile again.*tn\.generate"):
        pickle.dumps(holder().program)
