"""`tnbackprop bench`: one of the benchmarks of the repository, as ``python -m benchmarks.<name>`` runs it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ..errors import InputError

ROOT = Path(__file__).parents[2]


def run(arguments: argparse.Namespace) -> int:
    """The exit status of the benchmark. Raises `InputError` where the repository is not there, or not the benchmark."""
    folder = ROOT / "benchmarks"
    if not (folder / "contenders.py").is_file():
        raise InputError(
            "the benchmarks are not installed: they are in the repository, not in the package\n"
            "  Clone it, then `make bench`, or `pip install -e '.[bench]'` and this command again."
        )
    names = sorted(path.stem for path in folder.glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))
    if arguments.name not in names:
        raise InputError(f"no benchmark {arguments.name!r}\n  there are {', '.join(names)}")
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{arguments.name}", *arguments.options], cwd=ROOT
    ).returncode
