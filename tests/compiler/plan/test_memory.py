"""memory_limit: the peak that is planned stays below it, by slices of the batch, with the same values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tnbackprop as tn
from tnbackprop.compiler.program.cost import Kernel, size_at
from tnbackprop.runtime import progress

from ... import oracle

QUANTITIES = (tn.Grad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(centred=True))


def problem() -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(36, 30), nn.Linear(30, 5)
    ).double()
    return model, nn.CrossEntropyLoss(), torch.randn(16, 3, 8, 8).double(), torch.randint(5, (16,))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("share", [0.7, 0.5, 0.4])
def test_same_values_within_the_limit(share: float) -> None:
    model, loss, x, y = problem()
    free = tn.compile(model, loss, (x, y), QUANTITIES)
    limit = int(share * free.peak_bytes)
    program = tn.compile(model, loss, (x, y), QUANTITIES, memory_limit=limit)
    assert program.peak_bytes <= limit < free.peak_bytes
    assert "def slice_" in program.source
    for batch in (16, 5, 1):
        result = program(x[:batch], y[:batch])
        for quantity in QUANTITIES:
            want = getattr(oracle, quantity.name)(model, loss, x[:batch], y[:batch])
            for name, value in want.items():
                torch.testing.assert_close(result[quantity.name][name], value, rtol=1e-10, atol=1e-12)


def test_progress_follows_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for each term that is sliced, with the same numbers; one bar at a time where loops are nested."""
    rounds: list[tuple[str, int]] = []

    def track(rows: list[object], description: str, total: int, transient: bool) -> list[object]:
        rounds.append((description, total))
        return rows

    monkeypatch.setattr("tnbackprop.runtime.progress.track", track)
    model, loss, x, y = problem()
    free = tn.compile(model, loss, (x, y), QUANTITIES)
    assert "progress" not in free.source
    program = tn.compile(model, loss, (x, y), QUANTITIES, memory_limit=int(0.5 * free.peak_bytes))
    chunk = int(program.source.partition("progress(range(0, N, ")[2].partition(")")[0])
    plain, followed = program(x, y), program(x, y, progress=True)
    assert rounds == [("slices of the batch", 16 // chunk)] * program.source.count("progress(range(")
    for quantity, by in plain.items():
        for name, value in by.items():
            assert torch.equal(followed[quantity][name], value)
    rounds.clear()
    bar = progress.bars()
    assert [[list(bar(range(3))) for _ in bar([0, 1])], list(bar(range(4)))] == [[[0, 1, 2]] * 2, [0, 1, 2, 3]]
    assert rounds == [("columns", 2), ("slices of the batch", 4)]


def test_no_bar_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnbackprop.runtime.progress.track", None)
    with pytest.raises(tn.InputError, match="pip install rich"):
        progress.bars()


def test_a_limit_that_cannot_be_met() -> None:
    model, loss, x, y = problem()
    with pytest.raises(tn.UnsupportedError, match=r"memory_limit=1000 bytes cannot be met.*one sample at a time"):
        tn.compile(model, loss, (x, y), QUANTITIES, memory_limit="1kB")


@pytest.mark.parametrize("text", ["2 apples", "GiB", "-1MB"])
def test_no_amount_of_memory(text: str) -> None:
    model, loss, x, y = problem()
    with pytest.raises(tn.InputError, match="is no amount of memory"):
        tn.compile(model, loss, (x, y), QUANTITIES, memory_limit=text)


def largest_step(program: tn.Program, batch: int) -> int:
    """Elements of the largest value that a step makes (a view makes none)."""
    plan = program.compiled.plan
    made = [step for step, _ in plan.timed if step.kernel is not Kernel.VIEW]
    return max(prod(size_at(size, batch) for size in step.shape) for step in made)


class Held(TorchDispatchMode):
    """The bytes of tensors that are made and not let go of, and the most that they have been at once."""

    def __init__(self, *outside: torch.Tensor) -> None:
        super().__init__()
        self.sizes = dict.fromkeys((tensor.untyped_storage().data_ptr() for tensor in outside), 0)
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(found):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.sizes:
                self.sizes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return found


def mlp() -> tuple[nn.Module, torch.Tensor]:
    layers = (nn.Linear(100, 150), nn.ReLU(), nn.Linear(150, 150), nn.Tanh(), nn.Linear(150, 10))
    return nn.Sequential(*layers), torch.randn(128, 100)


def cnn() -> tuple[nn.Module, torch.Tensor]:
    layers = (nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 36, 10)), torch.randn(32, 3, 16, 16)


def encoder() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 32, 10)), torch.randn(16, 16, 32)


ALL = (tn.BatchL2(), tn.Variance(), tn.BatchGrad(), tn.DiagGGN(), tn.KFLR(), tn.KFAC(), tn.SqrtGGN(), tn.HessianDiag())
CLOSE = 0.1
"""How far the peak that is planned may be from that of the tensors; what kernels need for themselves is in neither."""


@pytest.mark.thinned(5)
@pytest.mark.parametrize("quantity", ALL, ids=lambda q: q.name)
@pytest.mark.parametrize(
    "model", [mlp, cnn, pytest.param(encoder, marks=pytest.mark.slow)], ids=lambda each: each.__name__
)
def test_the_peak_is_that_of_the_tensors(model: Callable[..., Any], quantity: tn.Quantity) -> None:
    torch.manual_seed(0)
    net, x = model()
    y = torch.randint(10, (len(x),))
    program = tn.compile(net.eval(), nn.CrossEntropyLoss(), (x, y), [tn.Grad(), quantity])
    program(x, y)
    with Held(x, y, *net.parameters()) as held:
        result = program(x, y)
    assert result.loss is not None
    assert abs(program.peak_bytes / held.peak - 1) < CLOSE, (program.peak_bytes, held.peak)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", [tn.DiagGGN(), tn.GGNTrace(), tn.HessianDiag()], ids=lambda q: q.name)
def test_no_root_of_the_whole(quantity: tn.Quantity) -> None:
    """V [V, N, *p] is never formed for a diagonal or a trace, by squares or by loops over columns; SqrtGGN forms it."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 10))
    model, x, y = nn.Sequential(*layers), torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, elements in parameters.items():
        if "weight" not in name:
            continue
        for other, parameter in model.named_parameters():
            parameter.requires_grad_(other == name)
        root = 9 * 32 * elements
        program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [quantity])
        whole = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.SqrtGGN()])
        columns = 9 * 32 * 16 * 36  # of what is propagated, all at once
        assert largest_step(program, 32) <= max(root // 2, columns), f"{quantity.name} of {name}"
        assert whole.peak_bytes >= 4 * root
