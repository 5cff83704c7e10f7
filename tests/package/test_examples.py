"""The README's blocks and the examples, executed."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import tnbackprop as tn
from benchmarks import overview

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONG = ("mixture_of_experts.py", "second_order.py", "layers.py")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "tour.py")
"""But for the tour, which has a test of its own."""
ARGUMENTS = {"draw.py": ("{folder}",), "second_order.py": ("--quick", "--output", "{folder}/plot.png")}
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def same_text(printed: str, shown: str) -> None:
    """Equal up to the last digits of numbers with a point."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    numbers, wanted = (list(map(float, NUMBER.findall(text))) for text in (printed, shown))
    assert numbers == pytest.approx(wanted, abs=2e-4)


def test_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The python blocks are one script, which prints what stands below the first."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    left = runpy.run_path(str(script), run_name="__main__")
    same_text(capsys.readouterr().out, blocks("text")[0])
    tn.compile(left["model"], torch.nn.CrossEntropyLoss(), (left["x"], left["y"]), [tn.BatchL2(), tn.KFAC()])


def test_readme_fits_two_screens() -> None:
    """Of a page that is 900 pixels wide; the rest is in the guide."""
    assert len(README.splitlines()) <= 80
    assert max(len(line) for kind in ("python", "text", "sh") for line in "".join(blocks(kind)).splitlines()) <= 100
    assert README.count("](benchmarks/results/") == 1


def test_the_picture_has_the_numbers_of_the_results() -> None:
    assert overview.PICTURE.read_text(encoding="utf-8") == overview.overview()


def test_readme_first_screen() -> None:
    """A promise, ten lines that run, their output."""
    lines = [line for line in blocks("python")[0].splitlines() if line]
    assert len(lines) <= 10
    assert README.index("```text") < README.index("## ")


def test_readme_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in EXAMPLES])
def test_example(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example asserts what it claims; one that writes files is given a folder."""
    arguments = (argument.format(folder=tmp_path) for argument in ARGUMENTS.get(name, ()))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out


def test_tour_shows_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "tour.py"), run_name="__main__")
    printed = capsys.readouterr().out
    stages = (
        "declare", "capture", "bind", "derive", "simplify", "extract", "reference", "plan and lower", "program",
        "pass ", "emit", "check", "run",
    )  # fmt: skip
    titles = re.findall(r"^(\d+) ([a-z ]+)", printed, flags=re.MULTILINE)
    assert titles == [(str(k), stage) for k, stage in enumerate(stages, start=1)]
    assert max(map(len, printed.splitlines())) < 200
    for formula in (
        "layer_0  [N, 2]  aten.linear.default",
        "z[n,o] = Σ_{i} W[o,i] x[n,i] + b[o]",
        "J[n,o,o',i'] = x[n,i'] δ[o,o']",
        "G[n,o,i] = (x[n,i] g_z[n,o])",
        "m[o,i] = Σ_{n} (N) (x[n,i]**2) (g_z[n,o]**2)",
        "t2       [N, 2, 3]  own            x.unsqueeze(1) * t1.unsqueeze(2)",
        "t3 = t2.square().sum(0)" + 44 * " " + "t3 = t2.square_().sum(0)",
        "def program(tensors):",
        "checked on 2 samples against autograd: the output, the loss, second_moment of 2 parameters",
    ):
        assert formula in printed
