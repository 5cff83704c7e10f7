"""The gradient is propagated with the columns of a root where both fit: the same numbers from fewer calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.plan.joint import in_turns
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.sweep.derived import Backward, Extraction, PerSample

from ...cases import CASES
from ...second_order import assert_equal

FIRST = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.Variance())
SECOND: Mapping[str, tuple[tn.Quantity, ...]] = {
    "one drawn column": (tn.DiagGGNMC(), tn.KFAC(), tn.SqrtGGNMC()),
    "three drawn columns": (tn.DiagGGNMC(mc_samples=3), tn.KFAC(mc_samples=3)),
    "the exact root": (tn.DiagGGN(), tn.KFLR(), tn.SqrtGGN(), tn.GGNTrace()),
    "the Hessian": (tn.HessianDiag(), tn.DiagGGN()),
    "several sweeps": (tn.KFRA(), tn.DiagGGN(), tn.DiagGGNMC(), tn.HesScale(), tn.HessianDiag(name="hessian")),
}
WITH = ", with the gradient"
"""What the comments of joint cotangents end with."""


def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is propagated with columns wherever it can, whatever that costs."""

    def fastest(width: int, others: object, least: object, attempt: Callable[..., search.Made | None]) -> object:
        return attempt(width, joint=True) or attempt(width)

    monkeypatch.setattr(search, "_fastest", fastest)
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=10**6))


def values(program: tn.Program, batch: tuple[object, object]) -> dict[str, dict[str, torch.Tensor]]:
    """All results as tensors by quantity and name."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for quantity, by in program(*batch, seed=3).items():
        for name, value in by.items():
            parts = getattr(value, "factors", None) or (value,)
            found.setdefault(quantity, {}).update({f"{name}#{k}": part for k, part in enumerate(parts)})
    return found


NAMES = (
    "linear_rank4", "linear_one_sample", "cnn", "residual", "reused_module", "attention", "layer_norm",
    "batch_norm_eval", "cross_entropy_positions", "mlp_sum", "tied_names", "embedding",
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers(name: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BY_NAME[name].build()
    batch, quantities = (problem.x, problem.y), [*FIRST, *SECOND[second]]
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=1))
    separate = tn.compile(problem.model, problem.loss, batch, quantities)
    joined(monkeypatch)
    together = tn.compile(problem.model, problem.loss, batch, quantities)
    assert WITH in together.source and WITH not in separate.source
    got, want = values(together, batch), values(separate, batch)
    assert list(got) == list(want)
    for quantity in want:
        assert_equal(got[quantity], want[quantity], quantity)


def wide(batch: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Weights that take longer to read than to multiply with a few rows."""
    layers = [nn.Linear(16, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)]
    return nn.Sequential(*layers), (torch.randn(batch, 16), torch.randint(10, (batch,)))


def test_where_rows_are_few() -> None:
    """Of four samples the gradient and a drawn column, in one call; not of 64, which are enough rows for the device."""
    for samples, calls in ((4, 1), (64, 2)):
        model, batch = wide(samples)
        program = tn.compile(model, nn.CrossEntropyLoss(), batch, [tn.Grad(), tn.DiagGGNMC()])
        assert (WITH in program.source) == (calls == 1)
        assert program.source.count(", p_2_weight)") == calls
        assert program.source.count("torch.cat([") == 2 - calls, "they stay together from the output on"
        assert (", jointly with the gradient:" in program.explain("derive")) == (calls == 1)
        assert (WITH in program.explain("plan")) == (calls == 1)


def test_what_has_no_gradient_to_take_along() -> None:
    model, batch = wide(4)
    program = tn.compile(model, nn.CrossEntropyLoss(), batch, [tn.DiagGGNMC()])
    assert WITH not in program.source and not any(c.joint for c in program.compiled.derived.columns)


@pytest.mark.parametrize(
    ("separate", "joint", "chosen"), [(0.01, 0.009, 0.009), (0.01, 0.0097, 0.01), (5e-4, 1e-4, 5e-4), (1.0, 0.5, 1.0)]
)
def test_where_it_looks_clearly_faster(separate: float, joint: float, chosen: float) -> None:
    """And where planning once more is worth it."""

    def attempt(width: int, **ways: bool) -> Any:
        return None, SimpleNamespace(loops=(), seconds=joint if ways.get("joint") else separate)

    assert search._fastest(8, (), PerSample(64, 16), attempt)[1].seconds == chosen


def test_in_turns() -> None:
    """Each sweep in its own order, with pairs where both come to a value; what one of them misses goes alone."""

    def back(sweep: str, value: str) -> Backward:
        return Backward(f"{sweep}_{value}", value, (), "")

    one = (back("g", "a"), Extraction("w", {}), back("g", "b"), back("g", "d"), back("g", "c"))
    other = (back("s", "z"), back("s", "a"), back("s", "b"), Extraction("w", {}), back("s", "c"), back("s", "d"))
    found = list(in_turns(one, other))
    assert [pair[0] for pair in found if pair[0]] == list(one)
    assert [pair[1] for pair in found if pair[1]] == list(other)
    assert [a.value for a, b in found if isinstance(a, Backward) and isinstance(b, Backward)] == ["a", "b", "c"]
