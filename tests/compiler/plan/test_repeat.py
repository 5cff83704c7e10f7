"""Equal blocks are planned once: with what was planned before, a program is what it is without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.plan import choose, items

QUANTITIES = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.Variance(centred=True), tn.DiagGGN(), tn.KFAC(), tn.KFLR())


class Residual(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def mlp(blocks: int) -> nn.Module:
    layers = [layer for _ in range(blocks) for layer in (nn.Linear(6, 6), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 6), *layers, nn.Linear(6, 3))


def tied(blocks: int) -> nn.Module:
    shared = nn.Linear(8, 8)
    layers = [layer for _ in range(blocks) for layer in (shared, nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def residual(blocks: int) -> nn.Module:
    convolutions = (Residual(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)) for _ in range(blocks))
    return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), *convolutions, nn.Flatten(), nn.Linear(8, 3))


def normed(blocks: int) -> nn.Module:
    linears = (Residual(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5)), nn.Linear(5, 4)) for _ in range(blocks))
    return nn.Sequential(nn.Unflatten(1, (2, 4)), *linears, nn.Flatten(), nn.Linear(8, 3))


def other_epsilons(blocks: int) -> nn.Module:
    """Layers that differ in a number alone, in lines that are only built when a cotangent reads them."""
    norms = (nn.GroupNorm(2, 8, eps=10.0**-k) for k in range(blocks))
    layers = [layer for norm in norms for layer in (nn.Linear(8, 8), norm)]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def compiled(model: nn.Module, quantities: tuple[tn.Quantity, ...] = QUANTITIES) -> tn.Program:
    x, y = torch.randn(5, 8), torch.randint(3, (5,))
    return tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities)


def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from before."""
    for module in (choose, items):
        monkeypatch.setattr(module, "again", lambda *_: None)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("net", [mlp, tied, residual, normed, other_epsilons], ids=lambda net: net.__name__)
def test_the_same_program(net: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = net(3)
    repeated = compiled(model)
    anew(monkeypatch)
    plain = compiled(model)
    assert repeated.source == plain.source
    for one, other in zip(repeated.compiled.plan.choices, plain.compiled.plan.choices, strict=True):
        assert (one.parameter, one.best, one.found) == (other.parameter, other.best, other.found)
        for mine, yours in zip(one.options, other.options, strict=True):
            assert (mine.kept, mine.forms, mine.free) == (yours.kept, yours.forms, yours.free)
            assert mine.seconds == pytest.approx(yours.seconds)


TWO_SWEEPS = (tn.BatchGrad(), tn.DiagGGNMC(), tn.KFAC())
"""The second finds in place what the first one had built again: the norms' centred inputs."""


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("net", "quantities"),
    [(mlp, QUANTITIES), (residual, QUANTITIES), (normed, QUANTITIES), (normed, TWO_SWEEPS)],
    ids=["mlp", "residual", "normed", "normed, two sweeps"],
)
def test_planned_once(
    net: Callable[[int], nn.Module], quantities: tuple[tn.Quantity, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: set[str] = set()  # of all plans that are tried: there are more of a larger program
    own = choose._chosen

    def chosen(store: object, item: object, dotted: str, chunk: object) -> object:
        planned.add(dotted)
        return own(store, item, dotted, chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "_chosen", chosen)
    compiled(net(4), quantities)
    few = len(planned)
    planned.clear()
    compiled(net(8), quantities)
    assert 0 < len(planned) == few


def test_loops_of_equal_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of each activation go through what is before it in a loop of their own."""
    monkeypatch.setattr(search, "_widths", lambda rates, batch: (2,))
    planned: list[str] = []
    own = choose._chosen

    def chosen(store: object, item: object, dotted: str, chunk: object) -> object:
        planned.append(dotted)
        return own(store, item, dotted, chunk)  # type: ignore[arg-type]

    def curved(blocks: int) -> tn.Program:
        torch.manual_seed(0)
        layers = (layer for _ in range(blocks) for layer in (nn.Linear(6, 6), nn.Sigmoid()))
        model = nn.Sequential(nn.Linear(8, 6), *layers, nn.Linear(6, 3))
        x, y = torch.randn(5, 8), torch.randint(3, (5,))
        return tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()], check=False)

    monkeypatch.setattr(choose, "_chosen", chosen)
    found = {}
    for blocks in (4, 6):
        planned.clear()
        source = curved(blocks).source
        found[blocks] = len(planned)
    assert found[4] == found[6]
    anew(monkeypatch)
    assert curved(6).source == source


def test_a_plan_that_takes_longer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier plan shared may not be there: then it is planned as if it were new."""
    model = mlp(3)
    plain = compiled(model).source
    monkeypatch.setattr("tnbackprop.compiler.program.repeat.SLACK", 0.0)
    assert compiled(model).source == plain
