"""Columns that meet: what comes from behind goes on in the rounds of the one-hot columns where all of it passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.derive import columns
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.sweep.derived import Basis, Result

from ... import oracle_second
from ...cases import seq
from ...programs import code_of
from ...second_order import assert_equal

Model = Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]


class Skip(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Tied(nn.Module):
    """The same layer on both sides of the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()))


class Aside(nn.Module):
    """A parameter that is used behind the activation only, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x) + 0 * self.dead(x)
        return self.head(z.tanh())


class Positions(nn.Module):
    """The batch is the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(0, 1)).tanh()
        return self.head(self.second(x).sigmoid().mean(0))


class Towers(nn.Module):
    """Two branches of layers of their own that are added, with a layer before them or none."""

    def __init__(self, trunk: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh()) if trunk else nn.Identity()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return F.softplus(self.one(x)) + torch.exp(-(self.other(x) ** 2))


class Divided(nn.Module):
    """A value of the parameters alone, behind the layer: no sample passes there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.rand(4, 3) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() @ self.weight / self.weight.exp().sum()


def square() -> nn.Module:
    return nn.Linear(4, 4)


def chain() -> nn.Module:
    return seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def pooled() -> nn.Module:
    conv = (nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.Sigmoid())
    return seq(*conv, nn.Flatten(), nn.Linear(12, 6), nn.Sigmoid(), nn.Linear(6, 3))


# Model, example x, and where the columns that arrive somewhere come to: (value, how many of them).
CASES: dict[str, tuple[Model, tuple[int, ...], list[tuple[str, int]]]] = {
    "a chain": (chain, (4,), [("layer_4", 2), ("layer_2", 5), ("layer_0", 9)]),
    "convolutions": (pooled, (1, 8, 8), [("layer_6", 2), ("layer_3", 8)]),
    "no way around": (lambda: seq(square(), nn.Tanh(), Skip(square()), nn.Linear(4, 3)), (4,), [("layer_0", 2)]),
    "a way around": (lambda: seq(square(), Skip(square(), nn.Tanh()), nn.Linear(4, 3)), (4,), []),
    "the same parameters before and after": (Tied, (4,), []),
    "what nothing reaches": (Aside, (4,), [("add", 2)]),
    "towers": (lambda: Towers(trunk=False), (4,), [("one", 2)]),
    "towers on a layer": (lambda: Towers(trunk=True), (4,), [("trunk_0", 11)]),
    "divided by a sum of parameters": (Divided, (4,), [("first", 2)]),
    "the batch is the second axis": (Positions, (5, 3), [("second", 2), ("first", 17)]),
}  # fmt: skip


def weighted(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, weight=torch.tensor([1.0, 0.3, 2.0], dtype=f.dtype))


def indefinite(f: Tensor, y: Tensor) -> Tensor:
    """Its root has columns of either sign."""
    return (f.sin().sum(1) + f.prod(1)).mean()


def twice(f: Tensor, y: Tensor) -> Tensor:
    """A value that one call reads twice."""
    d = f - F.one_hot(y, 3)
    return (d * d * torch.stack([d, d]).sum(0).cosh()).sum(1).mean()


def elementwise(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, F.one_hot(y, 3).to(f.dtype))


def arrivals(program: tn.Program) -> list[tuple[str, int]]:
    starts = [c.start for c in program.compiled.derived.columns if isinstance(c.start, Basis) and c.start.arriving]
    return [(start.value, start.columns - start.own) for start in starts]


def problem(name: str, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = CASES[name]
    return make().double(), torch.randn(size, *shape, dtype=torch.float64), torch.arange(size) % 3


@pytest.fixture(autouse=True)
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of columns may be propagated together."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=4096))


@pytest.mark.thinned(8)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_where_columns_meet(name: str, size: int) -> None:
    """They meet where every path goes through, and nowhere else; the Hessian is what it was."""
    model, x, y = problem(name, size)
    loss = nn.CrossEntropyLoss()
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag(), tn.HessianDiag("each", per_sample=True)])
    assert arrivals(program) == CASES[name][2]
    result = program(x, y)
    assert_equal(result["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), name)
    assert_equal(result["each"], oracle_second.hessian_diag_per_sample(model, loss, x, y), name)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("loss", [weighted, indefinite, elementwise, twice], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("rows", [1, 12, 64])
def test_weights_and_rounds(loss: Loss, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns with weights of their own bring them along, into rounds of any width."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    monkeypatch.setattr(search, "WIDER", ())
    model, x, y = problem("a chain", 4)
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag()])
    assert bool(arrivals(program)) == (rows >= 12)
    assert_equal(program(x, y)["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), "hessian_diag")


def test_with_the_ggn() -> None:
    """Columns that go through all layers for the GGN do so for the Hessian, too: what is left meets still."""
    model, x, y = problem("a chain", 4)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag(), tn.DiagGGN()])
    assert arrivals(program) == [("layer_2", 3), ("layer_0", 7)]
    want = oracle_second.hessian_diag(model, nn.CrossEntropyLoss(), x, y)
    assert_equal(program(x, y)["hessian_diag"], want, "hessian_diag")


def test_not_written_out_where_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """One-hot columns are the same for every sample, unless others join them: not where that takes much memory."""
    monkeypatch.setattr(columns, "MOST_ROWS", 4 * 4**2)
    model, x, y = problem("a chain", 4)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
    assert arrivals(program) == [("layer_4", 2), ("layer_2", 5)]


def test_explained() -> None:
    model, x, y = problem("a chain", 4)
    text = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()]).explain("derive")
    assert "the 4 one-hot columns at layer_2, weighted, and 5 that arrive there" in text


def test_nothing_is_added_for_what_a_later_sweep_gives() -> None:
    """Zeros of the sweep that stopped would be steps of the program."""
    model, x, y = problem("what nothing reaches", 4)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
    results = program.compiled.plan.results[Result("hessian_diag")]
    code = code_of(program)
    assert not any(code[results[f"first.{name}"]].count(" + ") for name in ("weight", "bias"))
