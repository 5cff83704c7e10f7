"""Equal modules are traced once: the graph is, line by line, that of a model whose modules are all traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler.capture import export
from tnbackprop.compiler.capture.export import capture
from tnbackprop.compiler.running.repeated import Repeats

from ... import oracle

X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])
CE = nn.CrossEntropyLoss()


class Noted(Repeats):
    """The classes of the modules that were equal to one before."""

    every: list[str]

    def __call__(self, tracer: Any, module: nn.Module, run: Any, args: Any, kwargs: Any) -> Any:
        ran: list[bool] = []

        def noted() -> Any:
            ran.append(True)
            return run()

        value = super().__call__(tracer, module, noted, args, kwargs)
        if not ran:
            self.every.append(type(module).__name__)
        return value


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    every: list[str] = []
    monkeypatch.setattr(Noted, "every", every, raising=False)
    monkeypatch.setattr(export, "Repeats", Noted)
    return every


class Block(nn.Module):
    """A linear layer between two others, with options that it holds."""

    def __init__(self, scale: float = 1.0, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.scale, self.act = scale, act
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(self.act(self.wide(self.norm(x)))) + self.shift


class Deep(nn.Module):
    """A stack of blocks, called one after the other, or as `how` says."""

    def __init__(self, *blocks: nn.Module, how: Any = None) -> None:
        super().__init__()
        self.first, self.blocks, self.head, self.how = nn.Linear(6, 6), nn.ModuleList(blocks), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how is not None:
            return self.head(self.how(self.blocks, x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plainly(model: nn.Module, example: tuple[Tensor, Tensor] = (X, Y)) -> list[str]:
    """The lines of the graph where every module is traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_captured", export._compared)
        return capture(model, CE, example, tn.RULES).rows()


def blocks_repeated(model: nn.Module, repeated: list[str]) -> int:
    """How many blocks are not traced; the graph is the same, and the program's gradient is autograd's."""
    model = model.double()
    want = plainly(model)
    repeated.clear()
    program = tn.compile(model, CE, (X, Y), [tn.Grad()])
    assert program.compiled.graph.rows() == want
    torch.manual_seed(1)
    gradient = program(X, Y)["grad"]
    torch.manual_seed(1)
    for name, own in oracle.grad(model, CE, X, Y).items():
        torch.testing.assert_close(gradient[name], own)
    return repeated.count("Block")


class Masked(nn.Module):
    """A block with a second argument, by name, and two outputs, of which one is that argument."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        assert mask is not None
        return self.block(x * mask), mask


def with_mask(blocks: Any, x: Tensor) -> Tensor:
    mask = (x > 0).to(x.dtype)
    for block in blocks:
        x, mask = block(x, mask=mask)
    return x * mask


def tied() -> nn.Module:
    """The weights of two layers are one in each block, those of two blocks, too."""
    model = Deep(*(Block() for _ in range(4)))
    model.blocks[3].wide.weight = model.blocks[1].wide.weight
    return model


def written(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
        x.mul_(2)
    return x


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "make,count",
    [
        (lambda: Deep(*(Block() for _ in range(4))), 3),
        (lambda: nn.Sequential(nn.Linear(6, 6), *(Block() for _ in range(3)), nn.Linear(6, 3)), 2),
        (lambda: Deep(Block(), Block(2.0), Block(), Block(2.0)), 2),
        (lambda: Deep(*(nn.Sequential(Block(0.5), Block()) for _ in range(3))), 0),  # the whole stages
        (lambda: Deep(Masked(), Masked(), Masked(), how=with_mask), 0),
        (lambda: Deep(Block().requires_grad_(False), Block(), Block().requires_grad_(False), Block()), 2),
        (tied, 3),
        (lambda: Deep(*(Block() for _ in range(3)), how=written), 2),
    ],
    ids=["list", "Sequential", "alternating", "stages", "arguments", "frozen", "tied", "written to afterwards"],
)
def test_repeated(make: Callable[[], nn.Module], count: int, repeated: list[str]) -> None:
    torch.manual_seed(0)
    assert blocks_repeated(make(), repeated) == count
    assert count or repeated.count("Sequential") == 2 or repeated.count("Masked") == 2


class Drops(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), training=self.training)


class Counts(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Writes(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class View(Block):
    """What it gives is what it was given, seen otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 6)


def hooked() -> nn.Module:
    model = Deep(*(Block() for _ in range(3)))
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def twice(blocks: Any, x: Tensor) -> Tensor:
    return blocks[0](blocks[0](x))


def no_grad(blocks: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        kept = blocks[0](x)
    return blocks[1](x) + kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: Deep(*(Block(scale=k) for k in (1.0, 2.0, 1))),
        lambda: Deep(*(Block(act=lambda x, k=k: x * k) for k in range(3))),
        lambda: Deep(Drops(), Drops()).train(),
        lambda: Deep(Counts(), Counts()),
        lambda: Deep(Writes(), Writes()),
        lambda: Deep(View(), View()),
        hooked,
        lambda: Deep(Block(), how=twice),
        lambda: Deep(Block(), Block().eval()),
        lambda: Deep(Block(), Block().requires_grad_(False)),
    ],
    ids=[
        "other numbers", "other functions", "random", "a counter", "writes", "views", "hooks", "called twice",
        "another mode", "frozen",
    ],
)  # fmt: skip
def test_not_repeated(make: Callable[[], nn.Module], repeated: list[str]) -> None:
    torch.manual_seed(0)
    model = make()
    blocks_repeated(model, repeated)
    assert not {"Block", "Drops", "Counts", "Writes", "View"} & set(repeated)


def test_no_grad(repeated: list[str]) -> None:
    """Where a block is without gradients; on torch 2.7 that is told by the nodes around it."""
    torch.manual_seed(0)
    assert blocks_repeated(Deep(Block(), Block(), how=no_grad), repeated) <= 1


NOW = {"scale": 1.0}


class Reads(Block):
    """What no attribute says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * NOW["scale"]


def scaled(blocks: Any, x: Tensor) -> Tensor:
    for k, block in enumerate(blocks):
        NOW["scale"] = 1.0 + k
        x = block(x)
    return x


def test_what_a_forward_reads_besides(repeated: list[str]) -> None:
    """The graph is compared with the model, and traced again."""
    torch.manual_seed(0)
    model = Deep(Reads(), Reads(), Reads(), how=scaled)
    blocks_repeated(model, repeated)
    assert repeated.count("Reads") == 2


class Many(Deep):
    """Not for few samples, but while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] < 40:
            raise ValueError("too few")
        return super().forward(x)


def test_what_cannot_be_compared(repeated: list[str]) -> None:
    """Then every module is traced."""
    torch.manual_seed(0)
    x, y = torch.randn(50, 6).double(), torch.randint(3, (50,))
    model = Many(Reads(), Reads(), how=scaled).double()
    assert capture(model, CE, (x, y), tn.RULES).rows() == plainly(model, (x, y))
    assert repeated.count("Reads")


def elsewhere(where: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A model and a loss, of which one calls frozen modules that only a function knows."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.Tanh())).double()
    teacher.requires_grad_(False)

    class Calls(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(teacher(x))

    if where == "the model":
        return Calls(6, 3).double(), CE
    last = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).double().requires_grad_(False)
    return nn.Linear(6, 6).double(), lambda f, y: (last(f) - 1).square().mean()


@pytest.mark.parametrize("where", ["the model", "the loss"])
def test_modules_that_are_no_part_of_the_model(where: str) -> None:
    model, loss = elsewhere(where)
    result = tn.compute(model, loss, (X, Y), [tn.BatchGrad()])
    for name, value in oracle.batch_grad(model, loss, X, Y).items():
        torch.testing.assert_close(result["batch_grad"][name], value)
