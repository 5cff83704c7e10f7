"""Condensed cotangents: read before a pooling scatters them; the same values, whichever the planner takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.sweep.derived import Derived, Extraction, Result
from tnbackprop.diagram.algebra import inline
from tnbackprop.diagram.core import Selection, Tensor

from ...second_order import assert_equal

QUANTITIES = (
    tn.SqrtGGN(),
    tn.DiagGGN(),
    tn.DiagGGN("each", per_sample=True),
    tn.GGNTrace(),
    tn.HessianDiag(),
    tn.SqrtGGNMC(mc_samples=3),
)


class PooledOver(nn.Module):
    """The largest of all positions, as of a set of points."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.max(1).values


class Residual(nn.Module):
    """What is pooled goes on beside it: its cotangent is a sum, and no longer zero anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x).tanh()
        return torch.cat([torch.nn.functional.max_pool2d(x, 2).flatten(1), x.flatten(1)], 1)


def cases() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    found = {
        "overlapping": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(16, 3)),
            torch.randn(4, 2, 7, 7),
        ),
        "two pools, a norm and a sigmoid": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, stride=2), norm, nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
                nn.Conv2d(4, 5, 3, padding=1, groups=1), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5, 3),
            ),
            torch.randn(3, 2, 9, 9),
        ),
        "one axis": (
            nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)),
            torch.randn(3, 2, 8),
        ),
        "three axes, adaptive": (
            nn.Sequential(nn.Conv3d(1, 2, 2), nn.AdaptiveMaxPool3d(2), nn.Flatten(), nn.Linear(16, 3)),
            torch.randn(2, 1, 4, 4, 4),
        ),
        "grouped": (
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
            torch.randn(2, 4, 6, 6),
        ),
        "a set of points": (
            nn.Sequential(nn.Linear(2, 4), nn.Tanh(), PooledOver(), nn.Linear(4, 3)),
            torch.randn(4, 5, 2),
        ),
    }  # fmt: skip
    return {name: (model.double(), x.double()) for name, (model, x) in found.items()}


CASES = cases()


def condensed_items(derived: Derived) -> Iterator[Extraction]:
    return (item for item in derived.items if isinstance(item, Extraction) and item.condensed)


def only_condensed(derived: Derived) -> Derived:
    """With what is condensed in the place of what it stands for."""

    def one(item: Any) -> Any:
        return replace(item, diagrams=item.diagrams | item.condensed) if isinstance(item, Extraction) else item

    columns = tuple(replace(c, schedule=tuple(map(one, c.schedule))) for c in derived.columns)
    return replace(derived, columns=columns)


QUICK = ("overlapping", "grouped", "a set of points")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("rows", [4, pytest.param(10**4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_the_same_values(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantity of what comes before a pooling, in loops over columns and without, at two batch sizes."""
    model, x = CASES[name]
    y = torch.randint(3, (len(x),))
    loss = nn.CrossEntropyLoss()
    plain = tn.compile(model, loss, (x, y), QUANTITIES)
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    derive = search.derive
    monkeypatch.setattr(search, "derive", lambda *given: only_condensed(derive(*given)))
    forced = tn.compile(model, loss, (x, y), QUANTITIES)
    found = {item.parameter for item in condensed_items(forced.compiled.derived)}
    assert len(found) >= 2, "the weight and the bias before the pooling"
    for batch in (len(x), 1):
        got, want = (program(x[:batch], y[:batch], seed=1) for program in (forced, plain))
        for quantity in QUANTITIES:
            assert_equal(got[quantity.name], want[quantity.name], quantity.name)


def test_what_is_condensed() -> None:
    """Several columns behind a selection, where nothing else is added to it; never one column."""
    model, x = CASES["overlapping"]
    y, loss = torch.randint(3, (len(x),)), nn.CrossEntropyLoss()
    derived = tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchGrad(), tn.DiagGGN()]).compiled.derived
    assert [item.parameter for item in condensed_items(derived)] == ["p_0_weight", "p_0_bias"]
    for item in condensed_items(derived):
        assert item.condensed.keys() == {Result("diag_ggn")}
        (product,) = inline(item.condensed[Result("diag_ggn")]).products
        assert sum(isinstance(op, Selection) for op in product.operands) == 2, "one for each half"
        names = {op.name for op in product.operands if isinstance(op, Tensor)}
        assert {name.rpartition(":")[2] for name in names if name.startswith(":s")} == {"layer_2"}, "behind the pooling"
    mixing = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3), *model[1:]).double()
    derived = tn.compile(mixing, loss, (x, y), [tn.DiagGGN()]).compiled.derived
    found = [item.parameter for item in condensed_items(derived)]
    assert found == ["p_1_weight", "p_1_bias"], "the layer before adds up channels: its cotangent is zero nowhere"
    alone = tn.compile(model, loss, (x, y), [tn.Grad(), tn.DiagGGNMC(), tn.KFAC()])
    assert not list(condensed_items(alone.compiled.derived))
    branching = nn.Sequential(Residual(), nn.Linear(3 * 4 + 3 * 16, 3)).double()
    program = tn.compile(branching, loss, (torch.randn(2, 2, 4, 4).double(), torch.tensor([0, 2])), [tn.DiagGGN()])
    assert not list(condensed_items(program.compiled.derived))


def test_the_hessian_of_a_pooled_net_reads_before_the_scatter() -> None:
    """With many columns that is the faster plan, and nothing is scattered that is not pulled on."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(16 * 36, 128), nn.Sigmoid(),
        nn.Linear(128, 10),
    )  # fmt: skip
    x, y = torch.rand(4, 3, 18, 18), torch.randint(10, (4,))
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
    loop = program.source.partition("for column_1")[2]
    assert "total_1" in loop and "bmm" in loop
    assert "scatter_add_" not in loop
    assert "𝟙[" in program.explain("plan")
