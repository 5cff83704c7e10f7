"""Preconditioned gradient descent with four curvatures against SGD with momentum and Adam, on handwritten digits.

    python examples/second_order.py --output second_order.png

The update is that of Dangel et al. 2020 (arXiv:1912.10985), Section 4. `Preconditioned` is the optimiser, all of it; it
sees no layer, and neither does the curvature it is given. All methods share model, initialisation and batches.

Tuned, by `--tune`: the settings in METHODS, each the best of 25 by the loss on the validation digits after the last
step, the mean of two seeds. Reported: the test digits, which tuning never sees, for five other seeds, all of them. The
same L2 regularisation is in every method. Seconds are those of the steps, without compilation and without evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import tnbackprop as tn

EPOCHS, BATCH, L2, EVERY = 10, 64, 1e-4, 5
SEEDS, TUNING_SEEDS = (1, 2, 3, 4, 5), (101, 102)
LOSS = nn.CrossEntropyLoss()
Batch = tuple[Tensor, Tensor]


class Preconditioned(torch.optim.Optimizer):
    """θ ← θ − α (C + (λ + η) I)⁻¹ (∇L + η θ) for the block C of each parameter (arXiv:1912.10985, Eq. 27-29).

    curvature    name of the quantity that is C: its diagonal, or its `KroneckerFactors`
    lr           the learning rate α
    damping, l2  λ and η
    """

    def __init__(self, model: nn.Module, curvature: str, lr: float, damping: float, l2: float = 0.0) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        super().__init__(trained, {"lr": lr, "damping": damping, "l2": l2})
        self.curvature = curvature

    @torch.no_grad()
    def step(self, result: tn.Result) -> None:  # type: ignore[override]
        """One step with the gradient and the curvature of a batch."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                gradient = result["grad"][name] + group["l2"] * parameter
                direction = solve(result[self.curvature][name], gradient, group["damping"] + group["l2"])
                parameter -= group["lr"] * direction


def solve(curvature: Tensor | tn.KroneckerFactors, gradient: Tensor, damping: float) -> Tensor:
    """(C + damping · I)⁻¹ g: elementwise, or with both factors damped (Martens & Grosse 2015, 1503.05671, §6.3)."""
    if isinstance(curvature, tn.KroneckerFactors):
        return curvature.inverse(damping) @ gradient
    return gradient / (curvature + damping)


@dataclass(frozen=True)
class Method:
    """A curvature for `Preconditioned`, or an optimiser of torch; its settings and what they were chosen from."""

    name: str
    kind: tn.Quantity | Callable[..., torch.optim.Optimizer]
    options: Mapping[str, float]
    grid: Mapping[str, Sequence[float]]


RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
SMALL = {"lr": RATES, "damping": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}
METHODS = (
    Method("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9},
           {"lr": (0.01, 0.03, 0.1, 0.3, 1.0), "momentum": (0.0, 0.5, 0.9, 0.95, 0.99)}),
    Method("Adam", torch.optim.Adam, {"lr": 0.01, "eps": 1e-8},
           {"lr": (0.001, 0.003, 0.01, 0.03, 0.1), "eps": (1e-8, 1e-6, 1e-4, 1e-3, 1e-2)}),
    Method("DiagGGN-MC", tn.DiagGGNMC(), {"lr": 1.0, "damping": 1.0},
           {"lr": (0.1, 0.3, 1.0, 3.0, 10.0), "damping": (1e-2, 1e-1, 1.0, 10.0, 100.0)}),
    Method("KFAC", tn.KFAC(), {"lr": 0.03, "damping": 1e-2},
           {"lr": RATES, "damping": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}),
    Method("KFLR", tn.KFLR(), {"lr": 0.01, "damping": 1e-5}, SMALL),
    Method("KFRA", tn.KFRA(), {"lr": 0.01, "damping": 1e-5}, SMALL),
)  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, 8x8 in 0..1: 1077 to train on, 360 to tune on, 360 to test on, classes in proportion."""

    train: Batch
    validation: Batch
    test: Batch


@dataclass
class History:
    """What a run came by: after `steps` steps, that took `seconds`, the loss on the training and the held-out set."""

    compilation: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def add(self, steps: int, seconds: float, model: nn.Module, train: Batch, held_out: Batch) -> None:
        self.steps.append(steps)
        self.seconds.append(seconds)
        self.loss.append(evaluate(model, train)[0])
        value, accuracy = evaluate(model, held_out)
        self.held_out.append(value)
        self.accuracy.append(accuracy)


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Loss and accuracy in percent."""
    x, y = batch
    output = model(x)
    return float(LOSS(output, y)), 100 * float((output.argmax(1) == y).float().mean())


def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.as_tensor(labels)
    rest, test = train_test_split(torch.arange(len(y)), test_size=360, stratify=y, random_state=0)
    train, validation = train_test_split(rest, test_size=360, stratify=y[rest], random_state=0)
    return Digits(*((x[chosen], y[chosen]) for chosen in (train, validation, test)))


def network() -> nn.Module:
    """1898 parameters and at most 128 features between layers: KFRA has a matrix of features x features."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def batches(size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices, shuffled for each epoch; the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(size, generator=generator).split(BATCH)


def stepper(method: Method, model: nn.Module, example: Batch) -> Callable[[Tensor, Tensor], object]:
    """One step on a batch: a compiled program for a curvature, autograd for the others."""
    if isinstance(method.kind, tn.Quantity):
        program = tn.compile(model, LOSS, example, [tn.Grad(), method.kind])
        preconditioned = Preconditioned(model, method.kind.name, l2=L2, **method.options)
        return lambda x, y: preconditioned.step(program(x, y))
    optimiser = method.kind(model.parameters(), weight_decay=L2, **method.options)

    def step(x: Tensor, y: Tensor) -> None:
        optimiser.zero_grad()
        LOSS(model(x), y).backward()
        optimiser.step()

    return step


def train(method: Method, data: Batch, held_out: Batch, seed: int, epochs: int) -> History:
    """A run from the initialisation of the seed; evaluated before, every few steps, and at the end."""
    torch.manual_seed(seed)
    model, (x, y) = network(), data
    start = time.perf_counter()
    step = stepper(method, model, (x[:BATCH], y[:BATCH]))
    history = History(time.perf_counter() - start)
    history.add(0, 0.0, model, data, held_out)
    chosen, seconds = list(batches(len(x), epochs, seed)), 0.0
    for count, indices in enumerate(chosen, start=1):
        batch = x[indices], y[indices]
        start = time.perf_counter()
        step(*batch)
        seconds += time.perf_counter() - start
        if count % EVERY == 0 or count == len(chosen):
            history.add(count, seconds, model, data, held_out)
    return history


def tune(method: Method, data: Digits, epochs: int) -> tuple[dict[str, float], float]:
    """The settings of the grid with the lowest validation loss, and that loss."""

    def final(options: dict[str, float], seed: int) -> float:
        run = replace(method, options=options)
        try:
            loss = train(run, data.train, data.validation, seed, epochs).held_out[-1]
        except tn.InputError:  # the step was too large: factors that are not finite refuse to be inverted
            return math.inf
        return loss if math.isfinite(loss) else math.inf

    grid = [dict(zip(method.grid, values, strict=True)) for values in itertools.product(*method.grid.values())]
    losses = [
        statistics.mean(final(options, seed) for seed in TUNING_SEEDS) for options in track(grid, f"{method.name:10}")
    ]
    best = min(range(len(grid)), key=losses.__getitem__)
    return grid[best], losses[best]


def shown(options: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def table(runs: Mapping[str, Sequence[History]]) -> Table:
    """A row per method: medians over the seeds, with the smallest and largest."""
    count = len(next(iter(runs.values())))
    built = Table(title=f"after the last step; median (smallest – largest) of {count} seed{'s' * (count > 1)}")
    for title in ("optimiser", "settings"):
        built.add_column(title)
    for title in ("train loss", "test accuracy in %", "ms / step", "seconds", "compile"):
        built.add_column(title, justify="right")
    options = {method.name: shown(method.options) for method in METHODS}
    for name, histories in runs.items():
        loss, accuracy = ([getattr(h, key)[-1] for h in histories] for key in ("loss", "accuracy"))
        seconds = statistics.median(h.seconds[-1] for h in histories)
        built.add_row(
            name,
            options[name],
            f"{statistics.median(loss):.3f} ({min(loss):.3f} – {max(loss):.3f})",
            f"{statistics.median(accuracy):.1f} ({min(accuracy):.1f} – {max(accuracy):.1f})",
            f"{1e3 * seconds / histories[0].steps[-1]:.1f}",
            f"{seconds:.2f}",
            f"{statistics.median(h.compilation for h in histories):.1f}",
        )
    return built


def plot(runs: Mapping[str, Sequence[History]], path: Path) -> None:
    """Train loss and test accuracy over steps and over seconds: the median, and all seeds within the band."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex="col", sharey="row", layout="constrained")
    styles = (
        ("#000000", "--"), ("#000000", ":"), ("#d55e00", "-"), ("#0072b2", "-"), ("#009e73", "-"), ("#cc79a7", "-"),
    )  # fmt: skip
    for (name, histories), (colour, style) in zip(runs.items(), styles, strict=True):
        for row, key in enumerate(("loss", "accuracy")):
            values = torch.tensor([getattr(h, key) for h in histories])
            seconds = torch.tensor([h.seconds for h in histories]).quantile(0.5, 0)
            for axis, across in zip(axes[row], (torch.tensor(histories[0].steps), seconds), strict=True):
                first = int(across is seconds)  # its axis is logarithmic, and begins with no seconds
                median, low, high = (values.quantile(q, 0)[first:] for q in (0.5, 0.0, 1.0))
                axis.plot(across[first:], median, style, color=colour, label=name, linewidth=1.6)
                axis.fill_between(across[first:], low, high, color=colour, alpha=0.1, linewidth=0)
    axes[0, 0].set(yscale="log", ylabel="train loss")
    axes[1, 0].set(ylim=(80, 100), ylabel="test accuracy in %", xlabel="steps")
    axes[1, 1].set(xscale="log", xlabel="seconds in steps")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    count = len(next(iter(runs.values())))
    figure.supxlabel(f"lines: median of {count} seeds; bands: all of them; seconds without evaluation", fontsize=9)
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("second_order.png"), help="the plot (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a plot that is already there")
    parser.add_argument("--quick", action="store_true", help="three epochs and one seed")
    parser.add_argument("--tune", action="store_true", help="search the grids and print the best settings; no plot")
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not (arguments.force or arguments.tune):
        parser.error(f"{arguments.output} is there; give --force to replace it, or another --output")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, list[History]]:
    """Run every method with every seed, in turns; print the table and write the plot."""
    arguments = parsed(argv)
    data, console = digits(), Console()
    console = console if console.is_terminal else Console(width=120)
    epochs, seeds = (3, SEEDS[:1]) if arguments.quick else (EPOCHS, SEEDS)
    if arguments.tune:
        for method in METHODS:
            options, loss = tune(method, data, epochs)
            console.print(f"{method.name:10} {shown(options)}: validation loss {loss:.4f}")
        return {}
    runs: dict[str, list[History]] = {method.name: [] for method in METHODS}
    todo: list[Any] = list(itertools.product(seeds, METHODS))
    for seed, method in track(todo, "training", console=console):
        runs[method.name].append(train(method, data.train, data.test, seed, epochs))
    console.print(table(runs))
    plot(runs, arguments.output)
    console.print(f"plot: {arguments.output.resolve()}", soft_wrap=True)
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers as small as these are slower on more
    main()
