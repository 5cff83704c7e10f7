"""The command line: exit status 0, 1 where verify finds something wrong, 2 with one message for misuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tnbackprop as tn
from tnbackprop.commands.cli import main
from tnbackprop.commands.loading import _known
from tnbackprop.generation.quantities import KEYS

QUICK = ("--steps", "3", "--rounds", "1")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row per parameter, twenty lines of the source, and the whole of it in a file that is Python."""
    assert main(["demo", "--output", str(tmp_path), *QUICK]) == 0
    printed = capsys.readouterr().out
    for name in ("0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias", "MFLOP", "x the plain gradient"):
        assert name in printed
    source = (tmp_path / "program.py").read_text(encoding="utf-8")
    compile(source, "program.py", "exec")
    assert "def program(tensors):" in source
    assert str(tmp_path / "program.py") in printed
    shown = source[source.index("    # grad of") :].splitlines()[:20]
    assert all(line.strip()[:60] in printed for line in shown)


def test_demo_keeps_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "program.py"
    path.write_text("mine", encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path), *QUICK]) == 2
    assert "--force" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"


def test_demo_refuses_a_batch_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path), "--batch", "5000"]) == 2
    assert "5000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert tn.__version__ in capsys.readouterr().out


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.slow
def test_a_missing_extra_is_named() -> None:
    """Without scikit-learn the command says what to install; core needs no extra."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from tnbackprop.commands.cli import main\n"
        "sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tnbackprop[examples]" in done.stderr


def test_a_key_is_the_quantity_that_the_package_names() -> None:
    """Not one of its subclasses inside, which has the same key."""
    known = {quantity.name: quantity for quantity in _known(tn.Quantity, None)}  # type: ignore[type-abstract]
    assert {"grad", "diag_ggn", "kflr", "sqrt_ggn", "clipped_grad"} <= known.keys()
    assert all(getattr(tn, type(each).__name__, None) is type(each) for each in known.values())
    assert all(type(known[key]) is cls for key, cls in KEYS.items())
