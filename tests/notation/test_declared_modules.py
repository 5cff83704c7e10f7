"""Modules that carry their rule."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..declaring import FORMULA, check, network, targets


class Carried(tn.Declared):
    """The rule of an instance."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.gain, self.power = nn.Parameter(torch.ones(3)), power
        self.rule = tn.Rule(f"output[n, i] = gain[i] * input[n, i]**{power}", kinks="none")

    def forward(self, input: Tensor) -> Tensor:
        return self.gain * input**self.power


def test_declared() -> None:
    """Two of one class, each with its own; a copy has the rule as well."""
    model = network(nn.Sequential(Carried(2), Carried(3)))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        program = check(twin)
        assert targets(program).count(tn.Declared) == 2
        assert program.compiled.derived.bound[2][1].kinks == "none"


def test_a_rule_for_one_declared_class() -> None:
    with tn.registered({Carried: FORMULA}):
        assert Carried in targets(check(network(Carried(3))))
