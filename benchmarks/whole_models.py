"""Kronecker factors of a whole transformer, as multiples of its plain gradient by autograd.

`python -m benchmarks.whole_models` times a ViT (4 blocks, width 192, a position table [1, 65, 192]) on CIFAR-shaped
images in float32, in turns with the gradient. `--dense` adds the table's factor in one piece, (65 · 192)² numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from .timing import Call, ratios, round_robin

DENSE = 10**6


class Block(nn.Module):
    """Attention and two linear layers, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4 × 4 pixels, a class token, a table of positions."""

    def __init__(self, blocks: int = 4, width: int = 192, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


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
