"""The benchmarks run: each takes its options, and the small parts of them give numbers."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tnbackprop as tn
from benchmarks.models import PROBLEMS

FILES = (Path(__file__).parents[2] / "benchmarks").glob("*.py")
"""They are imported where they are run: with them come matplotlib and the peers."""
COMMANDS = sorted(path.stem for path in FILES if "argparse" in path.read_text(encoding="utf-8"))


def test_all_are_known() -> None:
    known = [
        "clients", "first_order", "generated", "modern", "plan_choice", "prices", "profile_ops", "second_order",
        "whole_models",
    ]  # fmt: skip
    assert COMMANDS == known


@pytest.mark.parametrize("name", COMMANDS)
def test_takes_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert caught.value.code == 0 and f"benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, problem, row",
    [("first_order", "3c3d-32", "batch_l2"), ("second_order", "3c3d-32", "kfac")],
    ids=["first_order", "second_order"],
)
def test_a_row(module: str, problem: str, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Checked against its definition, timed, and nothing written."""
    only = f"tnbackprop/{row}$"
    options = ["--problem", problem, "--batch", "2", "--only", only, "--rounds", "2", "--no-memory"]
    assert importlib.import_module(f"benchmarks.{module}").main(options) == 0
    printed = capsys.readouterr().out
    assert f"| {row} |" in printed


@pytest.mark.slow
def test_plans_of_one_parameter() -> None:
    """Every plan runs, also one that calls a function, and gives what the others give."""
    plan_choice = importlib.import_module("benchmarks.plan_choice")
    problem = replace(PROBLEMS["3c3d-32"], batch=8)
    row = plan_choice.measure(problem, torch.device("cpu"), "3.weight", tn.Variance(), rounds=1)
    assert row.ratio >= 1 and {row.chosen, row.fastest} <= row.milliseconds.keys() == row.predicted.keys()


def test_trials_are_counted() -> None:
    """Each sees the ops that are there already, which a copy would copy."""
    trial_layers = importlib.import_module("benchmarks.trial_layers")
    assert all(microseconds > 0 for microseconds in trial_layers.per_op(20).values())
    count, seen = trial_layers.trials("3c3d-32", (tn.Variance(),))
    assert count > 50 and seen > 10 * count
