"""Passes: each gives the same values as the lines before it, in the reference interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.emit.source import Writer
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.expr import Call, Value
from tnbackprop.compiler.program.facts import OVER
from tnbackprop.compiler.program.interpret import Interpreter
from tnbackprop.compiler.program.lines import Line, lines_of
from tnbackprop.compiler.program.passes import PASSES, Context, Pass
from tnbackprop.diagram.core import N

from ...cases import CASES, Case
from ...programs import elementwise

GUARDED = [case for case in CASES if not case.train][::3]
QUANTITIES = (tn.Grad(), tn.BatchL2(), tn.Variance(), tn.DiagGGN(), tn.KFLR(), tn.SqrtGGN())


def integers(tensor: Tensor) -> Tensor:
    """Small ones, of the tensor's dtype."""
    return (tensor * 2).round().clamp(-3, 3) if tensor.is_floating_point() else tensor


def values_of(lines: tuple[Line, ...], env: dict[Value, Tensor], size: int) -> dict[Value, Tensor]:
    """What the lines give, and what they have made of what they were given."""
    copied = {value: tensor.clone() for value, tensor in env.items()}
    Interpreter({N: size}, elementwise).run(lines, copied)
    return copied


def check(row: Pass, writer: Writer, lines: tuple[Line, ...], env: dict[Value, Tensor], size: int) -> tuple[Line, ...]:
    """The lines after a pass, where every value that is kept, and every input, is what it was."""
    like = writer.plan.like
    fresh = partial(_empty, like)
    context = replace(writer.context(writer.wanted), large=lambda value: True, memory=fresh)
    after = row.apply(lines, context)
    want, got = values_of(lines, env, size), values_of(after, env, size)
    for value in (each for each in (*context.kept, *env) if each in want):
        if isinstance(want[value], Tensor):
            # up to the order of a sum, which follows the strides of what is summed
            bound = 1e-13 * float(want[value].abs().nan_to_num().max()) if want[value].is_floating_point() else 0.0
            same = torch.allclose(want[value], got[value], rtol=0, atol=bound, equal_nan=True)
            assert same, f"{row.name}: {value}"
    return after


def _empty(like: Value, value: Value) -> Call:
    """Memory that is there already, full of what nobody may read."""
    return Call(f.NEW_FULL, (like, value.shape, float("nan")))


TOGETHER, IN_ROUNDS = 10**6, 1
TRIED = [(case, TOGETHER) for case in GUARDED[::2]] + [(case, IN_ROUNDS) for case in GUARDED[1::2]]


@pytest.mark.thinned(25)
@pytest.mark.parametrize(("case", "rows"), TRIED, ids=str)
def test_every_pass_keeps_the_values(case: Case, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    monkeypatch.setattr(search, "WIDER", ())
    problem = case.build()
    with torch.no_grad():
        for parameter in problem.model.parameters():
            parameter.copy_(integers(parameter))
    quantities = QUANTITIES if not isinstance(problem.loss, nn.BCELoss) else QUANTITIES[:3]
    try:
        program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities=quantities)
    except tn.UnsupportedError:
        program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities=QUANTITIES[:3])
    plan, writer = program.compiled.plan, program.compiled.writer
    tensors = program.tensors(problem.x, problem.y)
    env = {plan.given[name]: tensor for name, tensor in tensors.items() if name in plan.given}
    env[plan.like] = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
    lines, size = lines_of(plan.steps), len(problem.x)
    for row in PASSES:
        lines = check(row, writer, lines, env, size)


def test_a_pass_that_writes_over_what_is_read_later_is_found() -> None:
    """The guard itself: an in-place pass without its memory analysis."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities=[tn.BatchL2(), tn.Variance()])
    plan, writer = program.compiled.plan, program.compiled.writer

    def careless(lines: tuple[Line, ...], context: Context) -> tuple[Line, ...]:
        return tuple(_over_first(line) for line in lines)

    def _over_first(line: Line) -> Line:
        fn = line.expr.fn if isinstance(line.expr, Call) else None
        if fn is None or fn.name != "+" or not isinstance(line.expr, Call):
            return line
        return replace(line, expr=Call(OVER["add_"], line.expr.args))

    tensors = program.tensors(x, y)
    env = {plan.given[name]: tensor for name, tensor in tensors.items() if name in plan.given}
    env[plan.like] = x
    with pytest.raises(AssertionError):
        check(Pass("careless", "", careless), writer, lines_of(plan.steps), env, 5)


