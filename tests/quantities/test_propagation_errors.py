"""A propagation that means nothing is refused: what, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.diagram.core import COLUMN
from tnbackprop.diagram.jacobian import Jacobian
from tnbackprop.errors import InputError, TnError

from .test_propagations import Free, Own, Pulled, Rough, network

MODEL, X, Y = network()


def compiled(what: Any, with_loss: bool = True) -> Callable[[], object]:
    loss, y = (nn.MSELoss(), Y) if with_loss else (None, None)
    return lambda: tn.compile(MODEL, loss, (X, y), [Pulled(what=what)])


def starts(make: Callable[[tn.Output], Any]) -> Callable[[], object]:
    return compiled(Own(make))


def diagonal(output: tn.Output) -> tn.Diagram:
    S, w = output.hessian()
    return (S * S * w).sum(COLUMN)


def matrix(output: tn.Output) -> tn.Diagram:
    S = output.root()
    return (S * output.other(S)).sum(COLUMN, "n")


@dataclass(frozen=True)
class Columns(Own):
    residual: ClassVar[tn.Residual] = tn.Residual.COLUMNS


@dataclass(frozen=True)
class Diagonals(Own):
    residual: ClassVar[tn.Residual] = tn.Residual.DIAGONAL


@dataclass(frozen=True)
class Odd(Own):
    found: Any = None

    def through(self, J: Jacobian) -> Any:
        return self.found(J)


class Undeclared(tn.Propagation):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def start(self, output: tn.Output) -> tn.Diagram:
        return output.draws(self.samples)


def other_legs(J: Jacobian) -> Jacobian:
    return Jacobian(J.diagram.sum(*(leg.name for leg in J.into)), J.out, ())


WRONG: dict[str, tuple[Callable[[], object], type[TnError], str]] = {
    "a text": (compiled("root"), InputError, r"'pulled': propagates is 'root', not a tn.Propagation: return tn.Exact"),
    "a class": (compiled(tn.Exact), InputError, r"propagates is the class Exact: give an instance, Exact\(\)"),
    "a list": (compiled(Own([1])), InputError, r"Own cannot be told apart: unhashable .*\n  Give it a tuple"),
    "no fields": (compiled(Undeclared(2)), InputError,
                  r"Undeclared has samples, which no field declares.*\n  Write @dataclass\(frozen=True\)"),
    "no draws": (lambda: tn.Draws(0), InputError, "samples=0: draw at least one column"),
    "half a draw": (lambda: tn.Draws(1.5), InputError, "samples=1.5: draw at least one column"),  # type: ignore[arg-type]
    "no draws of it": (starts(lambda output: output.draws(0)), InputError, r"draws\(0\): draw at least one column"),
    "nothing": (starts(lambda output: None), InputError, "Own: start returns NoneType: return a tn.Diagram"),
    "a slip": (starts(lambda output: output.nope), InputError,
               r"(?s)propagation Own: start raises AttributeError: .*'nope'\n.*_propagations\.py, line"),
    "no sample": (starts(lambda output: output.gradient.sum("n")), InputError,
                  r"start returns a diagram with legs \[o\], and this output has \[n, o\]\n  Return legs \[n, o\]"),
    "no element": (starts(lambda output: output.root().sum("o")), InputError, r"legs \[ν, n\], and this output has"),
    "columns of another name": (starts(lambda output: output.root().relabel(**{COLUMN: "k"})), InputError,
                                r"legs \[k, n, o\], .*\n.*relabel\(old=new\) those of another name"),
    "a matrix for each sample": (
        starts(lambda output: (output.root() * output.other(output.root())).sum(COLUMN)), InputError,
        r"(?s)legs \[n, o, o~\], .*or \[o, o~\] for a matrix of the whole batch"),
    "two kinds": (starts(lambda output: output.root() + output.draws(2).sum(COLUMN)), InputError,
                  "a start asks for columns of one kind only"),
    "no loss": (compiled(Own(lambda output: output.root()), False), tn.UnsupportedError,
                "pulled need a loss, and this program has none: pass loss= to compile"),
    "no loss after all": (compiled(Free(lambda output: output.root()), False), tn.UnsupportedError,
                          "Pulled need a loss, and this program has none"),
    "no loss, no gradient": (compiled(Free(lambda output: output.gradient), False), tn.UnsupportedError,
                             "Pulled need a loss, and this program has none"),
    "columns made": (compiled(Columns(diagonal)), InputError, r"residual is COLUMNS, .*\n  Return them as they are"),
    "a diagonal of columns": (compiled(Diagonals(lambda output: output.root())), InputError,
                              r"residual is DIAGONAL, and start returns columns\n  Return a diagonal"),
    "a diagonal of a matrix": (compiled(Diagonals(matrix)), InputError, "residual is DIAGONAL, .* returns a matrix"),
    "a matrix through another": (compiled(Rough(matrix)), InputError, r"takes the place of J\n  Leave `through`"),
    "no Jacobian": (compiled(Odd(diagonal, lambda J: J.diagram)), InputError,
                    "propagation Odd: through returns Diagram: return a Jacobian"),
    "a Jacobian of other legs": (compiled(Odd(diagonal, other_legs)), InputError,
                                 r"through returns a Jacobian with legs .*\n  It must have the same legs"),
    "a slip on the way": (compiled(Odd(diagonal, lambda J: J.nope)), InputError,
                          r"(?s)propagation Odd: through raises AttributeError: .*_errors\.py, line"),
    "a layer on its own": (
        lambda: tn.generate(nn.Linear(3, 2), [Pulled(what=Own(lambda output: output.root()))], example=X.float()),
        tn.UnsupportedError, r"Own does not say what it is handed in .*\n  Let its `alone` return another, tn.Exact"),
    "a layer that draws": (
        lambda: tn.generate(
            nn.Linear(3, 2), [Pulled(what=Free(lambda output: output.signs(*output.legs)))], example=X.float()
        ), tn.UnsupportedError, r"what is propagated is drawn, .*\n  Let its `alone` return another"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str) -> None:
    attempt, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        attempt()


def test_a_class_that_nothing_tells_apart_needs_no_fields() -> None:
    class Plain(tn.Propagation):
        def start(self, output: tn.Output) -> tn.Diagram:
            return output.gradient

    result = tn.compute(MODEL, nn.MSELoss(), (X, Y), [Pulled(what=Plain()), tn.BatchGrad()])
    for name, G in result["batch_grad"].items():
        torch.testing.assert_close(result["pulled"][name], G)
