"""The command line: one row per sub-command."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TnError


@dataclass(frozen=True)
class Command:
    """A sub-command: `module` (of this package) has a function ``run(arguments) -> exit status``.

    The module is loaded only when the command is called, so that an extra is needed only by who uses it.
    """

    name: str
    help: str
    module: str
    arguments: Callable[[argparse.ArgumentParser], None]
    extra: str = ""


class _Version(argparse.Action):
    """Looks the version up only when asked: a source tree that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.prog} {importlib.metadata.version('tnbackprop')}")
        parser.exit()


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("tnbackprop-demo"), help="folder for the emitted source")
    parser.add_argument("--force", action="store_true", help="replace a source that is already there")
    parser.add_argument("--batch", type=int, default=64, help="samples in a batch (default 64)")
    parser.add_argument("--steps", type=int, default=60, help="gradient steps before the values are shown (default 60)")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the timing (default 30)")


COMMANDS = (
    Command("demo", "per-sample quantities of a small CNN on handwritten digits", "demo", _demo_arguments, "examples"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 with the reason on stderr."""
    commands = {command.name: command for command in COMMANDS}
    arguments = _parser().parse_args(argv)
    command = commands[arguments.command]
    try:
        module = importlib.import_module(f"{__package__}.{command.module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not command.extra or missing == __package__:
            raise
        print(
            f"tnbackprop {command.name}: {missing} is not installed. "
            f"Install it with: pip install 'tnbackprop[{command.extra}]'",
            file=sys.stderr,
        )
        return 1
    try:
        status: int = module.run(arguments)
    except (TnError, OSError) as error:
        print(f"tnbackprop {command.name}: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tnbackprop", description="Derivative quantities, compiled to plain PyTorch.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the installed version")
    rows = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.arguments(rows.add_parser(command.name, help=command.help, description=command.help))
    return parser


if __name__ == "__main__":
    sys.exit(main())
