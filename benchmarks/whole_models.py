"""Kronecker factors of a whole transformer, as multiples of its plain gradient by autograd.

`python -m benchmarks.whole_models` times a ViT (4 blocks, width 192, a position table [1, 65, 192]) on CIFAR-shaped
images in float32, in turns with the gradient. `--dense` adds the table's factor in one piece, (65 · 192)² numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import tnbackprop as tn

from .modern_models import ViT
from .timing import Call, ratios, round_robin

DENSE = 10**6


def calls(batch: int, dense: bool) -> dict[str, Call]:
    """The gradient by autograd, and programs with factors."""
    torch.manual_seed(0)
    model, loss = ViT(), nn.CrossEntropyLoss()
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    rows = {
        "KFAC": [tn.KFAC()],
        "KFAC and gradient": [tn.KFAC(), tn.Grad()],
        "KFAC(fisher=EMPIRICAL)": [tn.KFAC(fisher=tn.Fisher.EMPIRICAL)],
    } | ({"KFAC, the table in one piece": [tn.KFAC(largest=DENSE)]} if dense else {})
    programs = {name: tn.compile(model, loss, (x, y), quantities) for name, quantities in rows.items()}

    def gradient() -> object:
        return torch.autograd.grad(loss(model(x), y), list(model.parameters()))

    return {"gradient": gradient} | {name: lambda run=run: run(x, y, seed=0) for name, run in programs.items()}  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.whole_models", description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense", action="store_true", help="also with the position table in one piece")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    seconds = round_robin(calls(options.batch, options.dense), options.rounds, 2, torch.device("cpu"))
    print(f"ViT, 4 blocks of width 192, {options.batch} images, {options.threads} threads, float32")
    for name, found in ratios(seconds, "gradient").items():
        print(f"{name:30} {found.milliseconds:8.1f} ms {found.median:6.2f}  [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()
