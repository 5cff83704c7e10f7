"""Memory that is used again: a step writes over an operand only where nothing can see that any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import Kernel
from tnbackprop.compiler.program.expr import Call, Expr, Value, reads
from tnbackprop.compiler.program.interpret import Interpreter
from tnbackprop.compiler.program.lines import in_place, lines_of
from tnbackprop.compiler.program.numbers import Number
from tnbackprop.diagram.core import N

from ...programs import elementwise, writer


def step(name: str, expr: Expr | None = None, own: bool = True) -> Value:
    return Value(name, expr, (4,), Kernel.ELEMENTWISE, hint=name, own=own, whole=own, inputs=reads(expr))


A, B, ONE = step("a", own=False), step("b", own=False), Number(sympy.Integer(1))
FIRST = step("t0", Call(f.MUL, (A, A)))
LAST = step("t9", Call(f.MUL, (FIRST, B)))
VIEW = step("t1", Call(f.RESHAPE, (FIRST, 4)), own=False)
AGAIN, BEHIND = step("t10", Call(f.ADD, (FIRST, ONE))), step("t10", Call(f.ADD, (VIEW, ONE)))
SEEN = step("t0", Call(f.RESHAPE, (A, 4)), own=False)
OVER_SEEN = step("t9", Call(f.MUL, (SEEN, B)))


@pytest.mark.parametrize(
    ("steps", "kept", "over"),
    [
        ((FIRST, LAST), {LAST}, True),
        ((FIRST, LAST), {LAST, FIRST}, False),
        ((FIRST, LAST, AGAIN), {LAST, AGAIN}, False),
        ((FIRST, VIEW, LAST), {LAST}, True),
        ((FIRST, VIEW, LAST), {LAST, VIEW}, False),
        ((FIRST, VIEW, LAST, BEHIND), {LAST, BEHIND}, False),
        ((SEEN, OVER_SEEN), {OVER_SEEN}, False),
        ((LAST,), {LAST}, False),
    ],
    ids=["dead", "kept", "read later", "view dead", "view kept", "view read later", "not its own", "from outside"],
)  # fmt: skip
def test_only_memory_that_nobody_sees(steps: tuple[Value, ...], kept: set[Value], over: bool) -> None:
    """And what is kept has the same numbers, in the reference interpreter."""
    plain = lines_of(steps)
    lines, text = in_place(plain, kept), writer(steps)
    codes = [f"{text.names(line.value)} = {text.printer.text(line.expr)}" for line in lines]
    assert ("t9 = t0.mul_(b)" in codes) == over
    assert ("t9 = t0 * b" in codes) != over
    numbers = {A: torch.arange(4.0), B: torch.arange(4.0, 8.0), FIRST: torch.ones(4)}
    once, other = (
        Interpreter({N: 1}, elementwise).run(each, {value: numbers[value].clone() for value in numbers})
        for each in (plain, lines)
    )
    assert all(torch.equal(once[value], other[value]) for value in {*kept, A, B})
    assert all(line.value.own or line.expr is line.value.expr for line in lines)


class Twice(nn.Module):
    """Branches that meet again, and a value that is read after it was added to another."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1).to(dtype)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.max_pool2d(torch.tanh(self.one(x)), 2)
        inner = self.two(h.to(self.two.weight.dtype)).to(h.dtype)
        return self.last((h + torch.relu(inner)).flatten(1))


QUANTITIES: list[Callable[[], tn.Quantity]] = [
    tn.Grad, tn.BatchGrad, tn.Variance, tn.SecondMoment, tn.DiagGGN, tn.SqrtGGN, tn.HessianDiag, tn.KFAC, tn.KFRA,
]  # fmt: skip


def test_nothing_that_is_seen_changes() -> None:
    """Parameters, batch and earlier results are as before, and a second call gives the same."""
    torch.manual_seed(0)
    model, x, y = Twice(), torch.randn(5, 2, 4, 4), torch.randint(3, (5,))
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities=[quantity() for quantity in QUANTITIES])
    assert "square_()" in program.source
    before = [t.clone() for t in (x, y, *model.parameters())]
    first = program(x, y, generator=torch.Generator().manual_seed(1))
    shown = {(q, p): v.clone() for q in first for p, v in first[q].items() if isinstance(v, Tensor)}
    output = first.output.clone()
    second = program(x, y, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, *model.parameters()), strict=True))
    assert torch.equal(first.output, output) and torch.equal(second.output, output)
    for (q, p), value in shown.items():
        assert torch.equal(first[q][p], value), (q, p)
        assert torch.equal(second[q][p], value), (q, p)


def test_several_dtypes_write_nothing_over() -> None:
    """A product of a float32 and a float64 has the wider dtype, which the narrower operand cannot hold."""
    torch.manual_seed(0)
    model, x, y = Twice(torch.float64), torch.randn(5, 2, 4, 4), torch.randint(3, (5,))
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities=[tn.Variance()])
    _, _, backward = program.source.partition("# cotangent of last")  # the slope of the loss is one value made in place
    assert backward and "square_()" not in backward and "mul_(" not in backward


FORWARDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "nobody reads it": (lambda x, h: h.relu(), True),
    "added again": (lambda x, h: h.relu() + h, False),
    "an output of the layer before": (lambda x, h: h.relu() * 2 + x, True),
    "its derivative reads it": (lambda x, h: torch.nn.functional.silu(h), False),
    "the input": (lambda x, h: x.relu() + h, False),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_over_the_layer_before(name: str) -> None:
    """An activation takes the memory of what it reads, where neither the model nor a derivative reads that again."""
    function, over = FORWARDS[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.inner(x))

    torch.manual_seed(0)
    model, x, y = Model().double(), torch.randn(4, 3).double(), torch.randn(4, 3).double()
    before = x.clone()
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad()])
    assert ("_.default(" in program.source) == over, program.source
    result = program(x, y)
    assert torch.equal(x, before) and torch.equal(result.output, model(x))
    want = torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
    for got, gradient in zip(result["grad"].values(), want, strict=True):
        torch.testing.assert_close(got, gradient)
