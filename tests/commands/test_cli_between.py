"""The command line with quantities that read operands, come in phases, or are totals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tnbackprop as tn
from tnbackprop.commands.cli import main

NET = """
import torch
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
example_input = (4, 3)
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(NET, encoding="utf-8")
    return f"{path}:net"


def test_explain(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is handed in, and what is computed between phases, have a heading each."""
    assert main(["explain", target, "--loss", "mse", "--quantity", "clipped_grad,directional_grad"]) == 0
    out = capsys.readouterr().out
    assert "Handed in at the call\n---" in out and "operands['direction'] of 0.weight, [4, 3]" in out
    assert "Between phases\n---" in out and "then, for clipped_grad:" in out


def test_verify(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", target, "--loss", "mse", "--quantity", "clipped_grad,batch_dot_total"]) == 0
    out = capsys.readouterr().out
    assert "clipped_grad" in out and "batch_dot_total" in out


def test_draw(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A total needs no parameter; any other quantity does."""
    path = tmp_path / "total.svg"
    assert main(["draw", target, "--loss", "mse", "--quantity", "batch_dot_total", "-o", str(path)]) == 0
    svg = path.read_text(encoding="utf-8")
    assert "batch_dot_total, the sum over parameters" in svg and "2.bias[n, m]" in svg
    words = ["draw", target, "--loss", "mse", "-o", str(tmp_path / "one.svg"), "--quantity"]
    assert main([*words, "directional_grad", "--parameter", "0.weight"]) == 0
    assert ">direction<" in (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert main([*words, "clipped_grad", "--force"]) == 2
    assert "--quantity and --parameter belong together" in capsys.readouterr().err


def test_generate(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.py"
    words = ["generate", target, "--loss", "mse", "-o", str(path), "--quantity"]
    assert main([*words, "clipped_grad,ggn_trace_total,weighted_grad", "--model"]) == 0
    text = path.read_text(encoding="utf-8")
    assert "ggn_trace_total" in text and "def compute(model, x, y=None, operands=None, generator=None):" in text
    assert main([*words, "clipped_grad", "--force"]) == 2
    assert "clipped_grad is not available for a layer on its own" in capsys.readouterr().err
    assert main([*words, "nothing_total", "--force"]) == 2
    assert "no quantity 'nothing_total'" in capsys.readouterr().err


def test_keys_of_totals() -> None:
    """The same keys in `generate`; the list of known ones has nothing else."""
    batch = torch.randn(4, 3), torch.randn(4, 2)
    made = tn.generate(torch.nn.Linear(3, 2), "batch_dot_total", example=batch, loss=torch.nn.MSELoss())
    assert "Total(quantity=BatchDot())" in made.source
    with pytest.raises(tn.InputError, match=r"unknown quantity 3: give axis_moments, batch_dot, .*") as error:
        tn.generate(torch.nn.Linear(3, 2), [3], example=batch[0])  # type: ignore[list-item]
    assert "<" not in str(error.value)
