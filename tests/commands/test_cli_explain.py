"""explain on a user's file, as text, Markdown and HTML: everything is said, and in pictures too."""

from __future__ import annotations

import html
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tnbackprop.commands.cli import main

from .test_cli_files import NET, PROGRAM, run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "net.py"
    path.write_text(NET, encoding="utf-8")
    path.with_name("compiled.py").write_text(PROGRAM, encoding="utf-8")
    return path


class Balanced(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "path", "rect", "circle", "polygon"):
            self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle", "polygon"):
            assert self.open.pop() == tag


@pytest.mark.thinned(3)
@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_explain(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    """Per layer: formula, Jacobian, diagram, assumption, path, polynomials with conditions; what is kept; the peak."""
    output = tmp_path / "out"
    options = ("--quantity", "kfac,batch_l2", "--loss", "cross_entropy", "--format", format, "-o", output)
    status, out, err = run(capsys, "explain", f"{file}:Net", *options)
    assert (status, out, err) == (0, f"{output}\n", "")
    text = output.read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]*>", " ", text).replace("&#x27;", "'").replace("&lt;", "<") if format == "html" else text
    for wanted in (
        "0: Conv2d", "1: ReLU", "3: Linear", "loss",
        "layer_3[n,o] = Σ_{i} p_3_weight[o,i] layer_2[n,i] + p_3_bias[o]",
        "∂layer_3[n,o]/∂p_3_weight[o',i'] = layer_2[n,i'] δ[o,o']",
        "batch_l2[n] = Σ_{o,i} G[n,o,i]²", "Assumption of kfac: the factors are independent over the samples; h, w",
        "takes fewer FLOPs than", "predicted faster", "grouped convolution", "Kept from the forward", "Totals (N = 4)",
    ):  # fmt: skip
        assert wanted in plain, wanted
    assert re.search(r"Memory: peak [\d.]+ kB without parameters", plain)
    if format == "html":
        parser = Balanced()
        parser.feed(text)
        assert parser.open == [] and parser.seen.count("svg") >= 8
        assert parser.seen.count("figcaption") == parser.seen.count("svg")
    if format == "markdown":
        tables = [line for line in text.splitlines() if line.startswith("| operation")]
        assert len(tables) >= 4 and "## 0: Conv2d" in text


def test_explain_on_a_terminal(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With rich, where that is installed; brackets are text, not markup."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "250")
    status, out, _ = run(capsys, "explain", f"{file.with_name('compiled.py')}:program")
    assert status == 0
    assert "batch_l2 of 3.weight [3, 32]" in out and "[N, 32]" in out and "┃" not in out


def test_explain_to_the_terminal_is_the_same_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", f"{file.with_name('compiled.py')}:program")
    assert status == 0
    assert "batch_l2 at N = 4" in out and "Gram" in out


def test_explain_without_greek_letters(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot show Σ shows a question mark, not a traceback."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["explain", f"{file.with_name('compiled.py')}:program"]) == 0
    sys.stdout.flush()
    assert b"batch_l2[n] = ?_{o,i} G[n,o,i]?" in written.getvalue()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("format", ["text", "markdown", "html"])
def test_before_and_after(file: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    """The calls, what is propagated, Jᵀ g as it is and simplified, each quantity and what it becomes."""
    quantities = "kfac,diag_ggn,hessian_diag,batch_l2"
    options = ("--quantity", quantities, "--loss", "cross_entropy", "--format", format)
    status, out, _ = run(capsys, "explain", f"{file}:Net", *options)
    assert status == 0
    plain = html.unescape(re.sub(r"<[^>]*>", " ", out)) if format == "html" else out
    for wanted in (
        r"0 .*aten\.conv2d\.default .*layer_0 .*\[N, 2, 4, 4\] .*x, p_0_weight, p_0_bias",
        r"s0_… .*the root at layer_3, 1 sampled",
        r"kfac of 3.weight \[3, 32\]\s+(~+\s+)?For the root at layer_3, 1 sampled\.",
        r"g_layer_2\[n,i'\] = Σ_\{o\} p_3_weight\[o,i'\] g_layer_3\[n,o\]",
        r"Jᵀg\[n,o',i'\] = Σ_\{o\} layer_2\[n,i'\] δ\[o,o'\] g_layer_3\[n,o\]\nG\[n,o,i\] = layer_2",
        r"→ Σ_\{\w,\w\} layer_2\[n,i\]² g_layer_3\[n,o\]²  \(Gram",
        r"Assumption of kfac: one factor, without what is between different positions: h, w tied \(expand\)",
        r"Assumption of kfac: none: one factor, the block itself",
        r"hessian_diag: computed already, for another result",
    ):  # fmt: skip
        assert re.search(wanted, re.sub(r"\n +", "\n", plain)), wanted
    assert "zoo" not in plain
    for caption in ("kfac of 0.weight: the block, and its factors", "batch_l2 of 3.weight, multiplied out"):
        assert (caption in plain) == (format == "html")


def test_steps_are_told_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All steps of the plan, each in one layer."""
    out = run(capsys, "explain", f"{file}:Net", "--quantity", "doubled", "--loss", "mse")[1]
    kernels = "mm|elementwise|reduce|view|copy|convolution|native|grouped"
    names = re.findall(rf"^  .+?  (t\d+|layer_\d|loss\w*) +(?:{kernels})", out, re.MULTILINE)
    assert len(names) == len(set(names)) > 8
    assert "doubled of 3.weight" in out
