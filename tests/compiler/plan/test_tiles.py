"""Tiles: in a loop over columns their sum first, and what is linear in it once, a few samples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program.cost import CPU, Kernel
from tnbackprop.compiler.program.expr import Ref
from tnbackprop.compiler.program.store import Store
from tnbackprop.compiler.sweep.derived import Result

from ... import oracle_second
from ...programs import code_of
from ...second_order import assert_equal

QUANTITIES = (tn.DiagGGN(), tn.DiagGGN("each", per_sample=True), tn.HessianDiag())


def pooled() -> nn.Module:
    first = (nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(3, 4, 2), nn.ReLU())
    return nn.Sequential(*first, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))


def positions() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 3))


SMALL = {"pooled": (pooled, (2, 8, 8)), "positions": (positions, (5, 4))}


def _is_tile(plan: Any) -> bool:
    """Whether a plan is that of a candidate of `columns_first`."""
    finish = getattr(getattr(plan, "keywords", {}).get("candidate"), "finish", None)
    return getattr(finish, "__qualname__", "").startswith("columns_first")


@pytest.mark.slow
@pytest.mark.parametrize("tile", [1.0, 150.0], ids=["each sample", "several samples"])
@pytest.mark.parametrize("name", SMALL)
def test_the_same_values(name: str, tile: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles wherever they can be, in rounds of one column, at batch sizes that they divide or do not."""
    cheapest = Store.cheapest

    def tiles_first(store: Store, plans: Iterable[Callable[[Store], Ref]], *saved: object) -> Ref:
        offered = list(plans)
        tiles = [plan for plan in offered if _is_tile(plan)]
        return cheapest(store, tiles or offered, *saved)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "cheapest", tiles_first)
    monkeypatch.setitem(cost.RATES, "cpu", replace(CPU, tile=tile, rows=4))
    monkeypatch.setattr(search, "WIDER", ())
    torch.manual_seed(0)
    model, shape = SMALL[name][0]().double(), SMALL[name][1]
    x, y, loss = torch.randn(4, *shape, dtype=torch.float64), torch.arange(4) % 3, nn.CrossEntropyLoss()
    program = tn.compile(model, loss, (x, y), QUANTITIES)
    assert "= slice_" in program.source or "sum(slice_" in program.source
    for size in (4, 3, 1):
        problem = model, loss, x[:size], y[:size]
        result = program(x[:size], y[:size])
        assert_equal(result["diag_ggn"], oracle_second.diag_ggn(*problem), "diag_ggn")
        assert_equal(result["each"], oracle_second.diag_ggn_per_sample(*problem), "each")
        assert_equal(result["hessian_diag"], oracle_second.hessian_diag(*problem), "hessian_diag")


def many_columns(tile: float, monkeypatch: pytest.MonkeyPatch) -> tuple[tn.Program, torch.Tensor]:
    """A network with more columns than positions, for a device on which a call costs nothing."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(CPU, tile=tile, launch=0.0))
    monkeypatch.setattr(search, "WIDER", ())
    torch.manual_seed(0)
    first = (nn.Conv2d(8, 32, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*first, nn.Flatten(), nn.Linear(128, 48), nn.Sigmoid(), nn.Linear(48, 3)).double()
    x = torch.randn(4, 8, 15, 15, dtype=torch.float64)
    return tn.compile(model, nn.CrossEntropyLoss(), (x, torch.arange(4) % 3), [tn.HessianDiag()]), x


@pytest.mark.slow
def test_once_behind_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop adds up what tiles are linear in, once for the weight and the bias; what is looked up is never whole."""
    whole, x = many_columns(1e9, monkeypatch)
    tiled, _ = many_columns(1e4, monkeypatch)
    assert "slice_" not in whole.source
    (loop,) = tiled.compiled.plan.loops
    code, steps = code_of(tiled), tiled.compiled.plan.steps
    assert not any("slice_" in code[step] for step in loop.body.steps)
    results = tiled.compiled.plan.results[Result("hessian_diag")]
    totals = {step for step in steps if step.kernel is Kernel.ROUNDS}
    after = steps[max(map(steps.index, totals)) + 1 :]
    (tile,) = (step for step in after if step is results["3.weight"])
    assert "sum(slice_" in code[tile]
    assert "progress(range" not in code[tile], "a tile is too short for a bar"
    value = results["3.bias"]
    while value in after:
        value = next(read for read in value.inputs if read in after or read in totals)
    assert value in tile.inputs, "the bias goes back to the same sum"
    assert len(set(loop.body.results)) == len(loop.body.results), "nothing is added up twice"
    assert tiled.peak_bytes < whole.peak_bytes
    for size in (4, 1):
        y = torch.arange(size) % 3
        assert_equal(tiled(x[:size], y)["hessian_diag"], whole(x[:size], y)["hessian_diag"], "hessian_diag")


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is one step of a plan, with its FLOPs."""
    program, _ = many_columns(1e4, monkeypatch)
    assert "tiles of the batch" in program.explain("plan")


def test_not_on_a_gpu() -> None:
    """A launch costs more there than memory that is read again."""
    assert cost.CUDA.tile > 1e12
