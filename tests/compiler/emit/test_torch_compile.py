"""torch.compile takes the source of second-order programs as one graph: together, in loops, in slices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.plan.plan import Plan
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.sweep.derived import PerSample

QUANTITIES = {
    "kfac": tn.KFAC(mc_samples=2), "kflr": tn.KFLR(), "kfra": tn.KFRA(), "diag_ggn": tn.DiagGGN(),
    "sqrt_ggn": tn.SqrtGGN(), "hessian_diag": tn.HessianDiag(), "hesscale": tn.HesScale(), "ggn_gram": tn.GGNGram(),
}  # fmt: skip


def assert_one_graph(
    quantity: tn.Quantity, share: float | None, backend: str = "eager", before: tuple[nn.Module, ...] = ()
) -> tn.Program:
    """The same numbers from the traced source; `share` of the memory that the program would take."""
    torch.manual_seed(0)
    features = (*before, nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Sigmoid())
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    loss, x, y = nn.CrossEntropyLoss(), torch.randn(8, 2, 8, 8).double(), torch.randint(5, (8,))
    program = tn.compile(model, loss, (x, y), [quantity])
    if share is not None:
        program = tn.compile(model, loss, (x, y), [quantity], memory_limit=int(share * program.peak_bytes))
    namespace: dict[str, object] = {}
    exec(program.source, namespace)
    tensors = program.tensors(x, y)
    for name, value in program.compiled.plan.noises.items():
        shape = [cost.size_at(size, len(x)) for size in value.shape]
        tensors[name] = torch.rand(shape, dtype=x.dtype)
    torch._dynamo.reset()
    traced = torch.compile(namespace["program"], fullgraph=True, backend=backend)
    want, got = (pytree.tree_leaves(function(dict(tensors))) for function in (namespace["program"], traced))
    assert len(want) == len(got)
    for one, other in zip(want, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTITIES)
def test_columns_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=10**6))
    program = assert_one_graph(QUANTITIES[name], None)
    assert not program.compiled.plan.loops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kflr", "diag_ggn", "sqrt_ggn"])
@pytest.mark.parametrize("rows", [8, 10**6])
def test_large_values(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they go is left to torch.compile."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    monkeypatch.setattr(Plan, "is_large", lambda plan, value: True)
    assert "out=memory(like, " in assert_one_graph(QUANTITIES[name], None, "aot_eager").source


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "kflr", "diag_ggn", "sqrt_ggn", "hessian_diag"])
def test_loops_over_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several columns in each round."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=8 if name == "kfac" else 16))
    monkeypatch.setattr(search, "WIDER", ())
    program = assert_one_graph(QUANTITIES[name], None)
    assert program.compiled.plan.loops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diag_ggn", "hessian_diag"])
def test_sample_by_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with kernels that are picked by what max pooling chose."""
    flops = dict.fromkeys(cost.Kernel, 1e3) | {cost.Kernel.RECEPTIVE: 1e18}
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, launch=0.0, bandwidth=1e18, flops=flops))
    monkeypatch.setattr(search, "_fastest", lambda width, others, least, attempt: attempt(1024, PerSample(2, 4)))
    program = assert_one_graph(QUANTITIES[name], None, before=(nn.Conv2d(2, 2, 1),))
    assert "= added(slice_" in program.source and "= receptive_vjp(" in program.source


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kflr", "hesscale"])
def test_slices_of_the_batch(name: str) -> None:
    program = assert_one_graph(QUANTITIES[name], 0.7)
    assert "progress(range(" in program.source


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "diag_ggn"])
def test_traced_to_aten(name: str) -> None:
    assert_one_graph(QUANTITIES[name], None, "aot_eager")
