"""Calls that mix samples, and those that look so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.batched.axes import value_axes
from tnbackprop.compiler.translate.graph import Value
from tnbackprop.compiler.translate.inplace import functional
from tnbackprop.compiler.translate.torch_internals import operators
from tnbackprop.diagram.core import N

from ... import oracle
from ...capturing import Function
from ...second_order import assert_equal

aten = torch.ops.aten
Forward = Callable[[Any, Tensor], Tensor]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def compiled(forward: Forward) -> tuple[nn.Module, tn.Program]:
    torch.manual_seed(0)
    model = Function(forward, a=nn.Linear(3, 3)).double()
    return model, tn.compile(model, nn.MSELoss(reduction="sum"), (X, X), [tn.Grad(), tn.BatchGrad()])


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda m, x: torch.renorm(m.a(x), 2, 1, 9.0), "renorm.*works along the batch axis"),
        (lambda m, x: torch._safe_softmax(m.a(x), 0), "softmax.*works along the batch axis"),
        (lambda m, x: torch.take_along_dim(m.a(x), torch.zeros(3, dtype=torch.long)) + x, "batch|samples"),
        (
            lambda m, x: (m.a.weight.repeat_interleave(len(x), 0) * m.a.bias.repeat(3 * len(x), 1))[: len(x)] * m.a(x),
            "mixes samples|different orders",
        ),
        (
            lambda m, x: m.a(x)[(m.a(x) > 0).sum(1).sort()[1] // 1],
            "picks samples of .* sort those of each .* experts_implementation='batched_mm'",
        ),
    ],
    ids=["renorm", "safe_softmax", "flat", "repeated for each sample", "sorted"],
)
def test_refused(forward: Forward, match: str) -> None:
    with pytest.raises(tn.UnsupportedError, match=match):
        compiled(forward)


def test_a_sample_is_scaled_on_its_own() -> None:
    """renorm scales what it finds at each index of `dim`: at 0, each sample."""
    model, program = compiled(lambda m, x: torch.renorm(m.a(x), 2, 0, 0.5))
    result, loss = program(X[:4], X[:4]), nn.MSELoss(reduction="sum")
    assert_equal(result["batch_grad"], oracle.batch_grad(model, loss, X[:4], X[:4]), "batch_grad")


def test_copies_of_one_for_each_sample() -> None:
    """All are the same, so that those of a sample may stand side by side."""
    model, program = compiled(lambda m, x: m.a(x) * m.a.bias.repeat(2 * len(x), 1).unflatten(0, (-1, 2)).sum(1))
    result, loss = program(X[:4], X[:4]), nn.MSELoss(reduction="sum")
    assert_equal(result["batch_grad"], oracle.batch_grad(model, loss, X[:4], X[:4]), "batch_grad")


def test_copies_next_to_merged_axes() -> None:
    """Copies along one axis leave the factors of the others as they are."""
    merged = Value("x", ((2, N), (3,)), torch.float64)

    def axes(target: Any, **arguments: Any) -> Any:
        shape = arguments.pop("shape")
        return value_axes(target, {"input": merged, **arguments}, shape, "here")

    arguments = {"repeats": 2, "dim": 1, "shape": (2 * N, 6)}
    assert axes(aten.repeat_interleave.self_int, **arguments) == ((2, N), (6,))
    along = {"repeats": 2, "dim": 0, "shape": (4 * N, 3)}
    assert axes(aten.repeat_interleave.self_int, **along) == ((2, N, 2), (3,))
    assert axes(aten.repeat.default, repeats=(1, 2), shape=(2 * N, 6)) == ((2, N), (6,))
    assert axes(aten.repeat.default, repeats=(3, 1), shape=(6 * N, 3)) == ((6, N), (3,))


def test_names_of_others_mean_nothing() -> None:
    """An operator of another library that is called like torch's is not torch's."""
    with operators("tnbackprop_test") as library:
        library.define("relu_(Tensor(a!) x) -> Tensor(a!)")
        with pytest.raises(tn.UnsupportedError, match="no functional counterpart"):
            functional(torch.ops.tnbackprop_test.relu_.default, "here")
