"""On a GPU, in float64: every layer and quantity gives the CPU's numbers; loops, slices, draws, graphs and compilation.

`make test-cuda` runs them; without a CUDA device they fail. What a GPU's rates make of a plan is tested everywhere, in
test_gpu_plans.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.program import cost

from ..cases import EVERY, Case, Problem, classes, seq
from ..second_order import ALL, assert_equal, compiled, everything_of, make, tensors

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
BOUND = 1e-8  # float64; sums run in another order
IMPRECISE = {"hardsigmoid": 1e-6, "hardswish": 1e-6}  # torch's derivative keeps 1/6 in float32
FIRST_ORDER = {
    key: (key, {}) for key in ("Grad", "BatchGrad", "BatchL2", "BatchDot", "SecondMoment", "Variance")
}  # fmt: skip
EXACT = FIRST_ORDER | {"diag": ALL["diag"], "sqrt": ALL["sqrt"], "trace": ALL["trace"], "jacobians": ALL["jacobians"]}
KINDS = (FIRST_ORDER | dict(ALL), EXACT, FIRST_ORDER)
"""The largest set that the compiler takes for a case: some have no Kronecker factors, some losses no root."""


def on_gpu(problem: Problem) -> Problem:
    model, loss = problem.model.to(CUDA), problem.loss.to(CUDA)
    return Problem(model, loss, problem.x.to(CUDA), problem.y.to(CUDA))


def cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert all(value.device.type == "cuda" for value in values.values())
    return {name: value.cpu() for name, value in values.items()}


def spectrum(grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.linalg.eigvalsh(gram.flatten(2).flatten(0, 1)) for name, gram in grams.items()}


def cnn(activation: type[nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.MaxPool2d) -> Case:
    features = lambda: seq(  # noqa: E731
        nn.Conv2d(2, 4, 3, padding=1), activation(), pool(2), nn.Conv2d(4, 6, 3), activation(), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip
    return Case("cnn", features, (2, 8, 8), classes(5), nn.CrossEntropyLoss, batch=8)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_numbers_of_the_cpu(case: Case) -> None:
    for kinds in KINDS:
        wanted = {key: kind for key, kind in kinds.items() if key != "hessian" or case.name != "hardsigmoid"}
        problem = case.build()
        try:
            want = everything_of(compiled(problem, wanted), problem)
        except tn.UnsupportedError:
            with pytest.raises(tn.UnsupportedError):
                compiled(on_gpu(problem), wanted)
            continue
        moved = on_gpu(case.build())
        got = everything_of(compiled(moved, wanted), moved)
        for key, values in want.items():
            mine = cpu(got[key])
            if key == "gram":  # the columns of a root are not unique
                mine, values = spectrum(mine), spectrum(values)
            assert_equal(mine, values, f"{key} of {case}", IMPRECISE.get(case.name, BOUND))
        return
    pytest.fail(f"{case} has not even first-order quantities")


LOOPED = {"kflr": ALL["kflr"], "diag": ALL["diag"], "hessian": ALL["hessian"], "sqrt": ALL["sqrt"]}


@pytest.mark.parametrize("key", LOOPED)
def test_loops_over_columns(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = everything_of(compiled(case := cnn(nn.Sigmoid).build(), kinds := {key: LOOPED[key]}), case)
    monkeypatch.setitem(cost.RATES, "cuda", replace(cost.CUDA, rows=16))
    monkeypatch.setattr(search, "WIDER", ())
    program = compiled(problem := on_gpu(cnn(nn.Sigmoid).build()), kinds)
    assert program.compiled.plan.loops
    assert_equal(cpu(everything_of(program, problem)[key]), want[key], key, BOUND)


@pytest.mark.parametrize("key", ["kflr", "diag"])
def test_within_a_memory_limit(key: str) -> None:
    problem = on_gpu(cnn().build())
    whole = compiled(problem, {key: LOOPED[key]})
    limit, batch = int(0.7 * whole.peak_bytes), (problem.x, problem.y)
    program = tn.compile(problem.model, problem.loss, batch, [make(LOOPED[key][0])], memory_limit=limit)
    (name,) = program.quantities
    assert program.peak_bytes <= limit
    want, got = tensors(whole(*batch)[key]), tensors(program(*batch)[name])
    assert_equal(got, want, key, BOUND)


def test_drawn_quantities() -> None:
    """The same seed gives the same numbers; the mean over many draws is the exact diagonal."""
    problem = on_gpu(cnn().build())
    batch = (problem.x, problem.y)
    drawn = (tn.DiagGGNMC(mc_samples=3000), tn.KFAC(mc_samples=2), tn.SqrtGGNMC())
    program = tn.compile(problem.model, problem.loss, batch, (*drawn, tn.DiagGGN()))
    one, other = program(*batch, seed=3), program(*batch, seed=3)
    for quantity in drawn:
        assert_equal(tensors(other[quantity.name]), tensors(one[quantity.name]), quantity.name, BOUND)
    assert_equal(cpu(one["diag_ggn_mc"]), cpu(one["diag_ggn"]), "the mean of the draws", 0.2)
    generator = torch.Generator(CUDA).manual_seed(3)
    assert_equal(program(*batch, generator=generator)["sqrt_ggn_mc"], one["sqrt_ggn_mc"], "with a generator", BOUND)


QUANTITIES = (
    *(make(key) for key in FIRST_ORDER), tn.DiagGGN(), tn.SqrtGGN(), tn.HessianDiag(), tn.KFLR(), tn.KFRA(),
    tn.HesScale(),
)  # fmt: skip


def emitted(quantities: tuple[tn.Quantity, ...] = QUANTITIES) -> tuple[Any, tn.Program, Problem]:
    """The program's own function, outside of everything."""
    problem = on_gpu(cnn(nn.Sigmoid).build())
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    namespace: dict[str, Any] = {}
    exec(program.source, namespace)
    return namespace["program"], program, problem


def same(got: Any, want: Any) -> None:
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_cuda_graph_takes_the_program() -> None:
    """Captured once, replayed on other numbers: nothing in it waits for the device or depends on data."""
    function, program, problem = emitted()
    static = program.tensors(problem.x, problem.y)
    static = {name: t.clone() if t.device.type == "cuda" else t for name, t in static.items()}
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            function(dict(static))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = function(dict(static))
    fresh = program.tensors(torch.randn_like(problem.x), problem.y.flip(0))
    for name, value in fresh.items():
        static[name].copy_(value)
    graph.replay()
    with torch.no_grad():
        same(captured, function(dict(fresh)))


def test_graphed() -> None:
    """Other batches, other values of the parameters, the same draws; the factors are made of what was replayed."""
    problem = on_gpu(cnn(nn.Sigmoid).build())
    quantities = (tn.Grad(), tn.Variance(), tn.KFAC(mc_samples=2), tn.DiagGGN())
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    graph = program.graphed(problem.x, problem.y)
    for _ in range(2):
        x, y = torch.randn_like(problem.x), problem.y.flip(0)
        got, want = graph(x, y, seed=4), program(x, y, seed=4)
        same((got.loss, got.output), (want.loss, want.output))
        for key in program.quantities:
            assert_equal(tensors(got[key]), tensors(want[key]), key, BOUND)
        with torch.no_grad():
            for parameter in problem.model.parameters():
                parameter.add_(0.1)
    with pytest.raises(tn.InputError, match=r"'x' has shape \[3, .* recorded with \[8, .*record one for this batch"):
        graph(x[:3], y[:3])
    problem.model[0].weight = nn.Parameter(problem.model[0].weight.detach().clone())
    with pytest.raises(tn.InputError, match=r"'p_0_weight' is another tensor .*record it again"):
        graph(x, y)


def test_torch_compile_on_the_gpu() -> None:
    function, program, problem = emitted((tn.BatchL2(), tn.Variance(), tn.DiagGGN(), tn.KFLR()))
    torch._dynamo.reset()
    inputs = program.tensors(problem.x, problem.y)
    with torch.no_grad():
        same(torch.compile(function, fullgraph=True)(dict(inputs)), function(dict(inputs)))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_narrower_numbers(dtype: torch.dtype, bound: float) -> None:
    """float32 and bfloat16 are near float64 of the same rounded numbers; rounding makes ties in a maximum."""
    kinds = FIRST_ORDER | {"diag": ALL["diag"], "kflr": ALL["kflr"]}
    problem = on_gpu(cnn(nn.Sigmoid, nn.AvgPool2d).build())
    narrow = Problem(problem.model.to(dtype), problem.loss, problem.x.to(dtype), problem.y)
    got = everything_of(compiled(narrow, kinds), narrow)
    wide = Problem(problem.model.double(), problem.loss, narrow.x.double(), problem.y)
    want = everything_of(compiled(wide, kinds), wide)
    for key, values in want.items():
        assert_equal({name: t.double() for name, t in got[key].items()}, values, key, bound)


def test_products_and_kernels() -> None:
    problem, moved = cnn().build(), on_gpu(cnn().build())
    vector = {name: torch.randn_like(p) for name, p in problem.model.named_parameters()}
    for make_product in (tn.ggn_product, tn.hessian_product):
        want = make_product(problem.model, problem.loss, (problem.x, problem.y))(vector)
        product = make_product(moved.model, moved.loss, (moved.x, moved.y))
        assert_equal(cpu(product({name: v.to(CUDA) for name, v in vector.items()})), want, make_product.__name__, BOUND)
    want_kernel = tn.ntk(problem.model, problem.x[:3], problem.x[3:])
    torch.testing.assert_close(tn.ntk(moved.model, moved.x[:3], moved.x[3:]).cpu(), want_kernel)


def test_preconditioning() -> None:
    """Factors stay on the device through inverses, decompositions and averages."""
    problem = on_gpu(cnn().build())
    result = tn.compute(problem.model, problem.loss, (problem.x, problem.y), [tn.Grad(), tn.KFLR()])
    for name, factors in result["kflr"].items():
        gradient = result["grad"][name]
        for damping in tn.Damping:
            step = factors.inverse(1e-2, damping) @ gradient
            assert step.device == gradient.device and step.shape == gradient.shape
        exact = factors.inverse(1e-2, tn.Damping.EXACT) @ gradient
        damped = factors.to_dense() + 1e-2 * torch.eye(gradient.numel(), dtype=gradient.dtype, device=CUDA)
        torch.testing.assert_close(damped @ exact.flatten(), gradient.flatten())
