"""The command line where the user's own code raises: its line is told, without a traceback."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tnbackprop.commands.cli import main

NET = """
import torch
import tnbackprop as tn
from dataclasses import dataclass

class Gain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))
    def forward(self, input):
        return self.gain * input

@dataclass(frozen=True)
class Wrong(tn.Quantity):
    name: str = "wrong"
    def extract(self, J, g):
        return 1 / 0

def row(layer):
    return layer.nope

net = torch.nn.Linear(3, 2)
example_input = (2, 3)
"""
LOSS = "def loss(output, y): return output.nope\n"
CASES = {
    "loss": (LOSS, "explain {file}:net", 2, r"net\.py:net, line \d+ raises AttributeError: .*'nope'"),
    "quantity": ("", "explain {file}:net --quantity wrong", 2, r"'wrong' raises ZeroDivi.*\n.*line \d+: return 1 / 0"),
    "row": ("RULES = tn.RULES | {Gain: row}", "explain {file}:Gain", 2, r"the row for Gain in .*\n.*: return layer"),
    "verified row": ("", "verify {file}:row --module Gain", 1, r"the row for Gain raises .*\n.*: return layer\.nope"),
    "interrupted": ("raise KeyboardInterrupt", "explain {file}:net", 130, "^$"),
    "demo": ("", "demo --steps -1 --output {file}", 2, "--steps -1 --rounds 30: give at least 0 steps and 1 round"),
}


@pytest.mark.parametrize("what", CASES)
def test_code_that_raises(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, line, wanted, message = CASES[what]
    path = tmp_path / "net.py"
    path.write_text(NET + own, encoding="utf-8")
    status = main([word.format(file=path) for word in line.split()])
    out, err = capsys.readouterr()
    assert (status, out) == (wanted, "") and re.search(message, err), err
    assert "Traceback" not in err and len(err.splitlines()) <= 4
