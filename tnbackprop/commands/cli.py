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

from ..errors import TnError


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


TARGET = """\
path.py:Name is an object of a Python file: a torch.nn.Module, its class or a function without arguments that makes it,
or a tnbackprop Program; for verify also a rule. The file may define
  example()        that returns the batch (x, y), or
  example_input    x, a tensor or its shape, and example_target, y (default: random numbers, or random classes)
  loss             a function (output, y) or a loss module
  RULES            the table of rules to compile with, tn.RULES | {MyLayer: my_rule}
"""
LOSSES = ("cross_entropy", "mse", "none")


def _target_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = TARGET
    parser.add_argument("target", metavar="path.py:Name", help="what to look at, see below")
    parser.add_argument("--input", metavar="N,…", help="shape of x, the batch first: 8,3,32,32 (default: the file's)")
    help = "the loss (default: the file's; else cross_entropy for integer targets, mse for others)"
    parser.add_argument("--loss", choices=LOSSES, help=help)
    help = "key of a quantity, with _total its sum over parameters; may be repeated, or several with commas"
    parser.add_argument("--quantity", metavar="KEY", action="append", help=help)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _target_arguments(parser)
    parser.add_argument("--module", metavar="NAME", help="for a rule: its module's class, or an instance, in the file")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    _target_arguments(parser)
    parser.add_argument("--format", choices=("text", "markdown", "html"), default="text", help="(default text)")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write here instead of to the terminal")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    _target_arguments(parser)
    parser.add_argument("--parameter", metavar="NAME", help="draw the quantity of this parameter, not the model")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True,
                        help=".svg, .dot or .tex; .png or .pdf with the extra tnbackprop[pictures]")  # fmt: skip
    parser.add_argument("--rename", metavar="OLD=NEW", action="append", default=[],
                        help="what to show instead of a name of a tensor or a leg; several are allowed")  # fmt: skip
    parser.add_argument("--depth", metavar="N", type=int,
                        help="one box for each module that is so deep: 1 for those of the model itself")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _target_arguments(parser)
    parser.add_argument("--target", dest="kind", choices=("torch", "backpack", "autograd"), default="torch",
                        help="functions, BackPACK extensions, or an autograd function (default torch)")  # fmt: skip
    parser.add_argument("--model", action="store_true", help="the whole model with its loss, as one program")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the Python file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="first_order", help="which benchmark (default first_order)")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its own options, see its --help")


COMMANDS = (
    Command("demo", "per-sample quantities of a small CNN on handwritten digits", "demo", _demo_arguments, "examples"),
    Command("explain", "formulas, diagrams, path and costs, layer by layer", "explain", _explain_arguments),
    Command("verify", "a rule or a model against torch.func; 1 if it is wrong", "verify", _verify_arguments),
    Command("draw", "a picture of a model, or of one quantity", "draw", _draw_arguments),
    Command("generate", "a file that needs torch only", "generate", _generate_arguments),
    Command("bench", "a benchmark of the repository", "bench", _bench_arguments),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 (verify: it is wrong), 2 with the reason on stderr."""
    commands = {command.name: command for command in COMMANDS}
    arguments = _parser().parse_args(argv)
    command = commands[arguments.command]
    try:
        module = importlib.import_module(f"{__package__}.{command.module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not command.extra or missing == __package__.partition(".")[0]:
            raise
        print(
            f"tnbackprop {command.name}: {missing} is not installed. "
            f"Install it with: pip install 'tnbackprop[{command.extra}]'",
            file=sys.stderr,
        )
        return 2
    try:
        status: int = module.run(arguments)
    except (TnError, OSError) as error:
        print(f"tnbackprop {command.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
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
