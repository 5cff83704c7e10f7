"""Random models that read one parameter in several shapes: views, slices, flips, gathers, pads, moves, broadcasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A function of a tensor; `text` is what a failure shows."""

    text: str
    function: Callable[[Tensor], Tensor]

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.function(tensor)


def factorised(draw: Random, count: int) -> Shape:
    """A random shape of so many elements, with an axis of size 1 now and then."""
    sizes: list[int] = []
    while count > 1:
        size = draw.choice([k for k in range(2, count + 1) if count % k == 0])
        sizes.append(size)
        count //= size
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        sizes.insert(draw.randint(0, len(sizes)), 1)
    return tuple(sizes)


def _view(draw: Random, shape: Shape) -> Step:
    to = factorised(draw, prod(shape))
    return Step(f"reshape({to})", lambda t: t.reshape(to))


def _slice(draw: Random, shape: Shape) -> Step:
    dim = draw.randrange(len(shape))
    start, step = draw.randrange(shape[dim]), draw.randint(1, 2)
    text = f"[{':, ' * dim}{start}::{step}]"
    return Step(text, lambda t: t[(*(slice(None),) * dim, slice(start, None, step))])


def _flip(draw: Random, shape: Shape) -> Step:
    dims = draw.sample(range(len(shape)), draw.randint(1, len(shape)))
    return Step(f"flip({dims})", lambda t: t.flip(dims))


def _gather(draw: Random, shape: Shape) -> Step:
    dim = draw.randrange(len(shape))
    index = [draw.randrange(shape[dim]) for _ in range(draw.randint(1, 4))]
    return Step(f"index_select({dim}, {index})", lambda t: t.index_select(dim, torch.tensor(index)))


def _pad(draw: Random, shape: Shape) -> Step:
    amounts = [draw.randint(0, 2) for _ in range(2 * draw.randint(1, len(shape)))]
    return Step(f"pad({amounts})", lambda t: F.pad(t, amounts))


def _roll(draw: Random, shape: Shape) -> Step:
    dim, by = draw.randrange(len(shape)), draw.randint(-2, 2)
    return Step(f"roll({by}, {dim})", lambda t: t.roll(by, dim))


def _permute(draw: Random, shape: Shape) -> Step:
    order = draw.sample(range(len(shape)), len(shape))
    return Step(f"permute({order})", lambda t: t.permute(order))


def _broadcast(draw: Random, shape: Shape) -> Step:
    count = draw.randint(2, 3)
    table = torch.arange(1.0, 1.0 + count * prod(shape), dtype=torch.float64).reshape(count, *shape) / 9
    return Step(f"+ table{(count, *shape)}", lambda t: table + t)


def _expand(draw: Random, shape: Shape) -> Step:
    count = draw.randint(2, 3)
    return Step(f"expand({count}, ...)", lambda t: t.expand(count, *shape))


def _sum(draw: Random, shape: Shape) -> Step:
    dim = draw.randrange(len(shape))
    return Step(f"sum({dim})", lambda t: t.sum(dim))


def _select(draw: Random, shape: Shape) -> Step:
    dim = draw.randrange(len(shape))
    place = draw.randrange(shape[dim])
    return Step(f"select({dim}, {place})", lambda t: t.select(dim, place))


def _cat(draw: Random, shape: Shape) -> Step:
    dim = draw.randrange(len(shape))
    return Step(f"cat([t, 2 t], {dim})", lambda t: torch.cat([t, 2 * t], dim))


def _pointwise(draw: Random, shape: Shape) -> Step:
    return draw.choice((Step("tanh()", torch.tanh), Step("** 2", torch.square), Step("* 0.7", lambda t: t * 0.7)))


def _normed(draw: Random, shape: Shape) -> Step:
    dim = draw.randrange(len(shape))
    return Step(f"/ (1 + norm({dim}))", lambda t: t / (1 + t.square().sum(dim, keepdim=True)))


MOVES = (_view, _view, _view, _slice, _flip, _gather, _pad, _roll, _permute, _broadcast, _expand, _sum, _select, _cat)
MOST = 48


def reading(draw: Random, shape: Shape, bend: bool) -> list[Step]:
    """Some steps that start at a tensor of the shape."""
    tensor, steps = torch.ones(shape, dtype=torch.float64), []
    for _ in range(draw.randint(0, 3)):
        make = draw.choice((*MOVES, _pointwise, _normed) if bend else MOVES)
        if tensor.ndim == 0 and make is not _broadcast and make is not _view:
            continue
        step = make(draw, tuple(tensor.shape))
        moved = step(tensor)
        if 0 < moved.numel() <= MOST and moved.ndim <= 5:
            tensor, steps = moved, [*steps, step]
    return steps


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * t": lambda x, t: x * t.reshape(-1)[: x.shape[1] if t.numel() >= x.shape[1] else 1],
    "x + t.sum()": lambda x, t: x + t.sum(),
    "x @ t": lambda x, t: _square(x, t),
    "linear(x, t, t)": lambda x, t: _linear(x, t),
    "x ⊗ t, summed": lambda x, t: (x[:, :, None] * t.reshape(1, 1, -1)).tanh().sum(2),
    "x + mean(t) mean(x)": lambda x, t: x + t.reshape(-1)[: x.shape[1]].mean() * x.mean(1, keepdim=True),
}  # fmt: skip


def _square(x: Tensor, t: Tensor) -> Tensor:
    width = x.shape[1]
    flat = t.reshape(-1).repeat(width * width // t.numel() + 1)[: width * width]
    return x @ flat.reshape(width, width)


def _linear(x: Tensor, t: Tensor) -> Tensor:
    rows = t.reshape(-1)[: t.numel() // x.shape[1] * x.shape[1]].reshape(-1, x.shape[1])
    if not rows.shape[0]:
        return x - t.sum()
    return F.linear(x, rows, t.reshape(-1)[: rows.shape[0]]).mean(1, keepdim=True) + x


class Regrouped(nn.Module):
    """x through uses of tensors that are read from the parameters."""

    def __init__(self, shapes: list[Shape], reads: list[tuple[int, list[Step], str]], bend: bool) -> None:
        super().__init__()
        self.p = nn.ParameterList([torch.zeros(shape) for shape in shapes])
        self.reads, self.bend = reads, bend

    def forward(self, x: Tensor) -> Tensor:
        for which, steps, use in self.reads:
            tensor: Tensor = self.p[which]
            for step in steps:
                tensor = step(tensor)
            x = USES[use](x, tensor)
            x = x.tanh() if self.bend else x
        return x

    def extra_repr(self) -> str:
        lines = [f"p[{which}]{list(self.p[which].shape)}.{'.'.join(s.text for s in steps)} -> {use}"
                 for which, steps, use in self.reads]  # fmt: skip
        return "\n".join([*lines, f"bent: {self.bend}"])


def regrouped(seed: int) -> tuple[nn.Module, Tensor]:
    """A model and its input."""
    draw = Random(seed)
    torch.manual_seed(seed)
    shapes = [factorised(draw, draw.choice((2, 4, 6, 6, 8, 12, 12))) for _ in range(draw.choice((1, 1, 2)))]
    bend = draw.random() < 0.5
    reads = []
    for _ in range(draw.randint(2, 3)):
        which = draw.randrange(len(shapes))
        reads.append((which, reading(draw, shapes[which], bend), draw.choice(list(USES))))
    model = Regrouped(shapes, reads, bend).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model, torch.randn(draw.randint(2, 3), draw.randint(1, 4), dtype=torch.float64)
