"""verify, draw and generate on a user's file, and one clear message for every misuse of these and of explain."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tnbackprop as tn
from tnbackprop.commands.cli import main

NET = """
import torch
from torch import nn
import tnbackprop as tn
from dataclasses import dataclass

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

class Sized(nn.Linear): ...

net = Net()
sized = nn.Linear(3, 2)
example_input = (4, 1, 4, 4)
number = 3

def make():
    return Net()

def broken():
    raise ValueError("no luck")

def table():
    return 3

class Affine(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
    def forward(self, input):
        return input @ self.weight.T + self.bias

class Other(Affine): ...

def affine(layer):
    return "output[*s, o] = weight[o, i] * input[*s, i] + bias[o]"

def no_bias(layer):
    return "output[*s, o] = weight[o, i] * input[*s, i]"

text = "output[*s, o] = weight[o, i] * inptu[*s, i] + bias[o]"
RULES = tn.RULES | {Affine: affine, Other: no_bias}

@dataclass(frozen=True)
class Doubled(tn.Quantity):
    name: str = "doubled"
    def extract(self, J, g):
        return (J.T @ g).sum("n") * 2
"""
PROGRAM = NET + """
program = tn.compile(net, nn.MSELoss(), (torch.randn(4, 1, 4, 4), torch.randn(4, 3)), [tn.BatchL2()])
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "net.py"
    path.write_text(NET, encoding="utf-8")
    path.with_name("compiled.py").write_text(PROGRAM, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# ---------------------------------------------------------------- verify


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("name", "options", "status", "shown"),
    [
        ("Affine", (), 0, "the rule of Affine agrees with torch.func"),
        ("affine", (), 0, "the rule of Affine agrees"),
        ("affine", ("--module", "Other"), 0, "the rule of Other agrees"),
        ("Other", (), 1, "the rule of Other is wrong: formula\n.*\n  likely: the formula never reads 'bias'"),
        ("no_bias", (), 1, "the rule of Other is wrong"),
        ("Net", ("--loss", "cross_entropy"), 0, "the model Net agrees with torch.func"),
        ("net", ("--input", "2,1,4,4"), 0, "the model Net agrees"),
        ("make", (), 0, "the model Net agrees"),
        ("program", (), 0, "the program of Net agrees"),
    ],
)
def test_verify(
    file: Path, capsys: pytest.CaptureFixture[str], name: str, options: tuple[str, ...], status: int, shown: str
) -> None:
    quantity = ("--quantity", "batch_grad") if name != "program" else ()
    file = file if name != "program" else file.with_name("compiled.py")
    found, out, err = run(capsys, "verify", f"{file}:{name}", *quantity, *options)
    assert (found, err) == (status, "")
    assert re.search(shown, out)


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "status"), [("+", 0), ("-", 1)])
def test_verify_follows_the_registry(
    sign: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule that the file enters with `tn.rule` is that of its class."""
    path = tmp_path / "registered.py"
    rule = f"tn.rule(Affine)('output[*s, o] = weight[o, i] * input[*s, i] {sign} bias[o]')"
    path.write_text(NET.partition("RULES =")[0] + rule, encoding="utf-8")
    with tn.registered():
        found, out, _ = run(capsys, "verify", f"{path}:Affine", "--quantity", "grad")
    assert found == status
    assert ("in its dependence on 'bias': wrong sign" in out) == bool(status)


def test_verify_without_a_loss(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What needs none is compared, and nothing else."""
    status, out, _ = run(capsys, "verify", f"{file}:sized", "--input", "3,3", "--loss", "none")
    assert status == 0 and "jacobians" in out and "ntk" in out
    assert "batch_grad" not in out and "kfac" not in out


def test_verify_tells_wrong_text_with_a_caret(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "verify", f"{file}:text", "--module", "Affine")
    assert (status, out) == (1, "")
    assert re.search(r"net\.py:text: unknown tensor 'inptu'\n  output.*\n +\^\ndid you mean 'input'\?", err)


WRONG_TEXT = {
    "a leg on the left only": ("output[*s, k] = weight[o, i] * input[*s, i] + bias[o]", "leg|size|only"),
    "wrong size": ("output[*s, o] = weight[i, o] * input[*s, i] + bias[o]", "leg 'o' has size|fails on input"),
    "unknown tensor": ("output[*s, o] = wieght[o, i] * input[*s, i]", "unknown tensor 'wieght'.*did you mean 'weight'"),
    "missing parameter": ("output[*s, o] = gain[o] * input[*s, o]", "unknown tensor 'gain'"),
    "no tensor product": ("output[*s, o] = weight[o, i] @ input[*s, i]", "not part of the notation"),
    "repeated output leg": ("output[o, o] = weight[o, i] * input[o, i]", "repeated on the left"),
    "non-linear sum": ("output[n, o] = (weight[o, i] * input[n, i] + bias[o]) * bias[o]", "do not all sum over i"),
    "mixed samples": (
        "m[i] = input[n, i] / N\noutput[n, o] = weight[o, i] * (input[n, i] - m[i]) + bias[o]",
        "mixes samples: .* a sum over the batch",
    ),
    "Unicode": ("output[*s, o] = weight[o, i] · input[*s, i]", "the character '·' is not ASCII"),
    "a Unicode leg": ("output[*s, ö] = weight[ö, i] * input[*s, i]", "the character 'ö' is not ASCII"),
    "empty": ("", "empty|neither formula"),
    "not Python": ("output[*s, o] = weight[o, i", "never closed"),
    "no output": ("result[*s, o] = weight[o, i] * input[*s, i]", "must define 'output'"),
    "unknown function": ("output[*s, o] = exq(weight[o, i]) * input[*s, i]", "unknown function 'exq'.*mean 'exp'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_TEXT)
def test_every_mistake_in_a_rule(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message, place and remedy, status 1 (a wrong rule) or 2 (nothing to try it with); never a traceback."""
    text, message = WRONG_TEXT[what]
    path = tmp_path / "mine.py"
    path.write_text(NET.replace("inptu", "input") + f"\nrule = {text!r}\n", encoding="utf-8")
    status, out, err = run(capsys, "verify", f"{path}:rule", "--module", "Affine", "--quantity", "grad")
    assert status in (1, 2) and out == ""
    assert re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err


# ---------------------------------------------------------------- draw


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("suffix", "start"), [(".svg", "<svg"), (".dot", "digraph"), (".tex", r"\begin{tikzpicture}")])
def test_draw(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, start: str) -> None:
    for options in ((), ("--quantity", "batch_l2", "--parameter", "3.weight")):
        path = tmp_path / f"picture{len(options)}{suffix}"
        status, out, _ = run(capsys, "draw", f"{file}:Net", "--output", path, *options)
        assert (status, out) == (0, f"{path}\n")
        text = path.read_text(encoding="utf-8")
        assert start in text or (suffix == ".dot" and "graph" in text)
        assert ("batch_l2 of 3.weight" in text) == bool(options) or suffix != ".svg"


def test_draw_renamed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in {"a": ("--rename", "x=image", "--rename", "y=label"), "b": ("--depth", "1")}.items():
        status, *_ = run(capsys, "draw", f"{file}:Net", "-o", tmp_path / f"{name}.svg", *options)
        assert status == 0
    assert ">image<" in (tmp_path / "a.svg").read_text() and ">label<" in (tmp_path / "a.svg").read_text()
    assert ">x<" in (tmp_path / "b.svg").read_text()


# ---------------------------------------------------------------- misuse


DRAWN = [
    ("draw {file}:Net -o {dir}/a.svg --rename x", r"--rename x: write OLD=NEW", "half a name"),
    ("draw {file}:Net -o {dir}/a.svg --rename nope=b", r"names: no tensor or leg 'nope' in what", "no name"),
    ("draw {file}:Net -o {dir}/a.svg --depth 0", r"depth=0 of a Program: it is a number from 1 on", "no depth"),
    ("draw {file}:Net -o {dir}/a.svg --depth 1 --quantity grad --parameter 0.weight",
     "--depth is of a picture of the model, not of a quantity", "depth of a quantity"),
]  # fmt: skip


def misuse() -> Iterator[tuple[str, str, str]]:
    """Arguments with {file} and {dir}, and what the message must say."""
    yield "verify {dir}/none.py:Net", r"no file '.*none\.py'\n  The folder is", "no file"
    yield "verify {file}", r"is not of the form path\.py:Name", "no name"
    yield "verify {file}:Nett", r"has no 'Nett'\n  did you mean 'Net'\?", "another name"
    yield "verify {file}:zzzz", r"has no 'zzzz'\n  known: .*Affine.*Net", "no such name"
    yield "verify {dir}:Net", "no file", "a folder"
    yield "verify {file}:number", "number is int, not a torch.nn.Module", "not a model"
    yield "verify {file}:table", "is int, not a torch.nn.Module", "a function that makes no model"
    yield "verify {file}:broken", r"net\.py:broken, line \d+ raises ValueError: no luck", "a function that raises"
    yield "explain {file}:Sized", r"Sized needs in_features, out_features\n  Name an instance", "a class with arguments"
    yield "verify {file}:Net --quantity grda", r"no quantity 'grda'\n  did you mean 'grad'\? known: .*kfac", "quantity"
    yield "verify {compiled}:program --quantity grad", "a program has its own quantities", "quantities of a program"
    yield "verify {file}:text", r"nothing says which module .*\n  Name its class .*--module", "a rule without a module"
    yield "verify {file}:text --module Nope", "has no 'Nope'", "no such module"
    yield "explain {file}:Net --quantity zzz", r"no quantity 'zzz'\n  known: axis_moments", "unknown quantity"
    yield "explain {file}:Net --input 2,3", r"net\.py:Net raises RuntimeError: Expected 3D", "wrong shape"
    yield "explain {file}:Net --input 2,a", r"--input '2,a' is no shape: write positive sizes", "no shape"
    yield "explain {file}:Net --input 0,1,4,4", "is no shape: write positive sizes", "empty batch"
    yield "explain {file}:Net -o {dir}/no/such.txt", r"such\.txt cannot be written: No such folder", "unwritable"
    yield "explain {file}:Net -o {dir} --force", r"is a folder\n  Name a file in it", "a folder to write to"
    yield "explain {file}:Net -o {file}", r"net\.py exists\n  Choose another name, or give --force", "existing file"
    yield from DRAWN
    yield "draw {file}:Net -o {file}", r"net\.py exists\n  Choose another name, or give --force", "existing picture"
    yield "draw {file}:Net -o {dir}/a.jpg", r"a drawing is saved as \.svg, .*, \.png, \.pdf, not \.jpg", "suffix"
    yield "draw {file}:broken -o {dir}/a.jpg", r"saved as \.svg, .*, not \.jpg", "suffix before the model"
    yield (
        "draw {file}:Net -o {dir}/no/a.svg",
        r"a\.svg cannot be written: No such folder as ",
        "no folder for a picture",
    )
    yield (
        "draw {file}:Net -o {dir}/a.svg --quantity grad,kfac --parameter 0.weight",
        "one picture is of one quantity, not of 2: --quantity grad", "two quantities",
    )  # fmt: skip
    yield "draw {file}:Net -o {dir}/a.svg --quantity grad", "--quantity and --parameter belong together", "half"
    yield (
        "draw {file}:Net -o {dir}/a.svg --quantity grad --parameter 0.wight",
        r"no diagrams for a parameter '0\.wight': there are .*0\.weight", "no such parameter",
    )  # fmt: skip
    yield "explain {dir}/plain.py:net", r"no example batch for .*\n  Give the shape of x, --input 8,3,", "no example"
    yield "explain {dir}/syntax.py:net", r"syntax\.py, line 2 is not Python: ", "syntax"
    yield "explain {dir}/notes.txt:net", r"notes\.txt(, line 1)? is not Python", "not Python"
    yield "explain {dir}/raises.py:net", r"raises\.py, line 1 raises ZeroDivisionError: division by zero", "raises"
    yield "explain {dir}/imports.py:net", r"imports\.py, line 1 raises ModuleNotFoundError: .*nope_nope", "import"
    yield "explain {dir}/exits.py:net", r"exits\.py, line 2 exits\n .*__main__", "exits"
    yield "explain {dir}/pair.py:net", r"example\(\) of .*pair\.py must return the pair \(x, y\), not Tensor", "no pair"
    yield "explain {dir}/tuple.py:net", r"`example` of .*tuple\.py is tuple: make it a function", "no function"
    yield "explain {dir}/badloss.py:net", r"`loss` of .*badloss\.py is int, not a function", "loss"
    yield "verify {dir}/badrules.py:net --quantity grad", r"RULES of .*badrules\.py is int, not a mapping", "rules"
    yield (
        "verify {file}:Net --loss none --quantity kfac,ntk",
        r"kfac of .*net\.py:Net needs a loss, and it has none\n  Give --loss .*jacobians or ntk", "no loss",
    )  # fmt: skip
    yield (
        "explain {dir}/two.py:Two",
        r"forward\(\) of .*two\.py:Two takes a, b, and x does not fit: missing .*'b'\n  Define example\(\)", "inputs",
    )  # fmt: skip
    yield "bench nope", r"no benchmark 'nope'\n  there are clients, first_order, ", "no benchmark"


PLAIN = "import torch\nnet = torch.nn.Linear(3, 2)\n"
FILES = {
    "plain.py": PLAIN,
    "syntax.py": "x = 1\nnet = = 2\n",
    "notes.txt": "no Python here\n",
    "raises.py": "net = 1 / 0\n",
    "imports.py": "import nope_nope\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "pair.py": PLAIN + "def example():\n    return torch.randn(2, 3)\n",
    "tuple.py": PLAIN + "example = torch.randn(2, 3), torch.randn(2, 2)\n",
    "badloss.py": PLAIN + "example_input = (2, 3)\nloss = 3\n",
    "two.py": PLAIN + "example_input = (2, 3)\nclass Two(torch.nn.Linear):\n"
    "    def __init__(self):\n        super().__init__(3, 2)\n    def forward(self, a, b):\n        return a + b\n",
    "badrules.py": PLAIN + "example_input = (2, 3)\nRULES = 3\n",
}


@pytest.mark.parametrize(("line", "message", "name"), list(misuse()), ids=[row[2] for row in misuse()])
def test_misuse(
    line: str, message: str, name: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, nothing on stdout, one message that says what, where and what to do; no file is touched."""
    for own, text in FILES.items():
        (tmp_path / own).write_text(text, encoding="utf-8")
    places = {"file": file, "compiled": file.with_name("compiled.py"), "dir": tmp_path}
    before = {path.name: path.read_text(encoding="utf-8") for path in (*tmp_path.iterdir(), *file.parent.glob("*.py"))}
    status, out, err = run(capsys, *(word.format(**places) for word in line.split()))
    assert (status, out) == (2, ""), err
    assert re.search(message, err), err
    assert "cross_ntk" not in err
    assert err.startswith("tnbackprop ") and len(err.splitlines()) <= 5 and "Traceback" not in err
    after = {path.name: path.read_text(encoding="utf-8") for path in (*tmp_path.glob("*.*"), *file.parent.glob("*.py"))}
    assert after == before


def test_force_replaces(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, name in (("explain", "out.txt"), ("draw", "out.svg")):
        path = tmp_path / name
        path.write_text("mine", encoding="utf-8")
        assert run(capsys, command, f"{file}:Net", "-o", path)[0] == 2
        assert path.read_text(encoding="utf-8") == "mine"
        assert run(capsys, command, f"{file}:Net", "-o", path, "--force")[0] == 0
        assert path.read_text(encoding="utf-8") != "mine"


@pytest.mark.parametrize("arguments", [("explain",), ("verify", "a.py:B", "--loss", "huber"), ("draw", "a.py:B")])
def test_what_argparse_refuses(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    assert "usage: tnbackprop" in capsys.readouterr().err


def test_help_says_the_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "verify", "draw"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        for word in ("example()", "example_input", "example_target", "RULES", "--quantity", "cross_entropy"):
            assert word in shown


@pytest.mark.slow
def test_as_a_process(file: Path) -> None:
    """``python -m tnbackprop``: the status is that of the process."""
    for name, status in (("Other", 1), ("Nope", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "tnbackprop", "verify", f"{file}:{name}", "--quantity", "grad"],
            capture_output=True, text=True, check=False, cwd=Path(tn.__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == status
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("target", [("--model", "--loss", "cross_entropy"), ("--target", "torch")])
def test_generate(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...]) -> None:
    """A file that agrees with autograd on its own, and is not written over."""
    output = tmp_path / "generated.py"
    name, shape = ("Net", "4,1,4,4") if "--model" in target else ("Affine", "4,3")
    spec = f"{file}:Net" if name == "Net" else f"{file}:sized"
    arguments = ["generate", spec, "--input", shape, "--quantity", "batch_grad", *target, "-o", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(output)
    checked = subprocess.run([sys.executable, str(output), "--check"], capture_output=True, text=True, check=True)
    assert "agree" in checked.stdout
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
