"""The plans that a GPU's rates choose, run on the CPU: other steps, the same numbers (on a GPU: test_cuda.py)."""

from __future__ import annotations

import pytest

from tnbackprop.compiler.program import cost

from ...cases import CASES, Case
from ...second_order import ALL, TOLERANCE, assert_equal, compiled, everything_of

QUICK = ("linear_rank3", "max_pool2d", "layer_norm")
CHOSEN = (*QUICK, "conv2d_groups", "cnn", "attention")
KINDS = {key: (key, {}) for key in ("Grad", "BatchGrad", "BatchL2", "BatchDot", "SecondMoment", "Variance")} | {
    key: ALL[key] for key in ("diag", "sqrt", "trace", "hessian", "kflr", "jacobians")
}
SOME = [
    case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES if case.name in CHOSEN
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_the_same_numbers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case.build()
    usual = compiled(problem, KINDS)
    monkeypatch.setitem(cost.RATES, "cpu", cost.CUDA)
    program = compiled(problem, KINDS)
    assert program.compiled.plan.rates is cost.CUDA
    want, got = everything_of(usual, problem), everything_of(program, problem)
    for key, values in want.items():
        assert_equal(got[key], values, f"{key} of {case}", TOLERANCE)


def test_all_names_are_there() -> None:
    assert {case.name for case in CASES} >= set(CHOSEN)
