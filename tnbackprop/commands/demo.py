"""`tnbackprop demo`: every first-order quantity of a small CNN on scikit-learn's 8x8 handwritten digits."""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tnbackprop as tn

SHOWN_LINES = 20
LEARNING_RATE = 0.2


def run(arguments: argparse.Namespace) -> int:
    """Compile, train a few steps with the program's own gradient, and print what it computes."""
    torch.manual_seed(0)
    console = _console()
    images, labels = _digits()
    if not 1 <= arguments.batch <= len(images):
        raise tn.InputError(f"--batch {arguments.batch}: the digits are {len(images)} samples; give 1 to {len(images)}")
    if arguments.steps < 0 or arguments.rounds < 1:
        raise tn.InputError(f"--steps {arguments.steps} --rounds {arguments.rounds}: give at least 0 steps and 1 round")
    x, y = images[: arguments.batch], labels[: arguments.batch]
    model, loss = _model(), nn.CrossEntropyLoss()
    quantities = [tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance()]

    start = time.perf_counter()
    program = tn.compile(model, loss, (x, y), quantities=quantities)
    seconds = time.perf_counter() - start
    path = _write(program.source, arguments.output, arguments.force)

    keys = ", ".join(quantity.name for quantity in quantities)
    console.print(f"[bold]one program[/bold] for {keys} (compiled in {seconds:.1f} s)")
    losses = _train(model, program, images, labels, arguments.batch, arguments.steps)
    console.print(f"{arguments.steps} gradient steps on batches of {arguments.batch}: loss", " -> ".join(losses))
    result = program(x, y)
    console.print(f"one batch of {len(x)} digits, outputs {tuple(result.output.shape)}; n counts the digits:\n")
    console.print(_table(model, result))
    console.print(
        f"\nplanned: {program.flops / 1e6:,.1f} MFLOP, {program.bytes / 1e6:,.1f} MB moved, "
        f"at most {program.peak_bytes / 1e6:,.1f} MB held"
    )
    console.print(f"time: {_relative_time(model, loss, program, x, y, arguments.rounds):.2f} x the plain gradient\n")
    _show(console, program.source)
    console.print(f"\nfull source: {path}", soft_wrap=True)
    return 0


def _console() -> Console:
    """As wide as the terminal; where there is none, wide enough for the source."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _show(console: Console, source: str) -> None:
    """The lines from the first quantity on: the forward and the loss are above them."""
    lines = source.splitlines()
    first = next(k for k, line in enumerate(lines) if "# grad of" in line)
    console.print(f"{SHOWN_LINES} of its {len(lines)} lines, from the first quantity on:")
    code = textwrap.dedent("\n".join(lines[first : first + SHOWN_LINES]))
    syntax = Syntax(code, "python", line_numbers=True, start_line=first + 1, word_wrap=True, background_color="default")
    console.print(syntax)


def _digits() -> tuple[Tensor, Tensor]:
    """The digits, shuffled: images [1797, 1, 8, 8] in 0..1, labels [1797]."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images))
    pixels = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return pixels[order], torch.as_tensor(labels)[order]


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def _write(source: str, folder: Path, force: bool) -> Path:
    """Write the source to ``folder/program.py``. Another text that is already there is kept, unless `force`."""
    path = folder / "program.py"
    if path.exists() and not force and path.read_text(encoding="utf-8") != source:
        raise FileExistsError(f"{path} is there and differs; give --force to replace it, or another --output")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path.resolve()


def _train(
    model: nn.Module, program: tn.Program, images: Tensor, labels: Tensor, batch: int, steps: int
) -> tuple[str, str]:
    """Gradient descent with the program's gradient; the loss on the first batch before and after."""
    before = program(images[:batch], labels[:batch]).loss
    for step in range(steps):
        chosen = torch.arange(step * batch, (step + 1) * batch) % len(images)
        gradient = program(images[chosen], labels[chosen])["grad"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(LEARNING_RATE * gradient[name])
    after = program(images[:batch], labels[:batch]).loss
    return f"{before:.3f}", f"{after:.3f}"


def _table(model: nn.Module, result: tn.Result) -> Table:
    """One row per parameter. Noise is the standard error of the gradient, sqrt(sum variance / N)."""
    table = Table()
    table.add_column("parameter")
    for title in ("shape", "gradient norm", "signal / noise", "smallest |∇ℓₙ|", "largest |∇ℓₙ|"):
        table.add_column(title, justify="right")
    for name, parameter in model.named_parameters():
        batch_l2 = result["batch_l2"][name]
        norms = len(batch_l2) * batch_l2.sqrt()  # batch_l2 is of the scaled (1/N) gradients
        signal = result["grad"][name].norm()
        noise = (result["variance"][name].sum() / len(batch_l2)).sqrt()
        numbers = (signal, signal / noise, norms.min(), norms.max())
        table.add_row(name, "x".join(map(str, parameter.shape)), *(f"{float(number):.3g}" for number in numbers))
    return table


def _relative_time(model: nn.Module, loss: nn.Module, program: tn.Program, x: Tensor, y: Tensor, rounds: int) -> float:
    """Median over rounds of the program's time over that of autograd's gradient, run in turns."""
    parameters = list(model.parameters())

    def plain() -> Sequence[Tensor]:
        return torch.autograd.grad(loss(model(x), y), parameters)

    ratios = []
    for _ in range(max(rounds, 1) + 3):
        plain_seconds = _seconds(plain)
        ratios.append(_seconds(lambda: program(x, y)) / plain_seconds)
    return statistics.median(ratios[3:])  # the first three warm up


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
