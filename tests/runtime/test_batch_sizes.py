"""Plans for other batch sizes than the example's: made where that pays, kept, the same results, within the limit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.compiler import Compiled, sizes
from tnbackprop.compiler.sizes import Front

from .. import oracle

CE = nn.CrossEntropyLoss()
ALL = (
    tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.Variance(), tn.KFAC(), tn.DiagGGN(), tn.KFLR(), tn.HessianDiag(),
    tn.DiagGGNMC(mc_samples=3),
)  # fmt: skip


def cnn(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 12)).double()


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 3, 8, 8, generator=generator).double()
    return x, torch.randint(12, (size,), generator=generator)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The batch sizes for which is planned, where every program takes long enough for that."""
    found: list[int] = []
    plain = Front.planned

    def counted(front: Front, size: int, **known: Any) -> Compiled:
        found.append(size)
        return plain(front, size, **known)

    monkeypatch.setattr(sizes, "PLANNING", 0.0)
    monkeypatch.setattr(Front, "planned", counted)
    yield found


def values(result: tn.Result) -> list[Tensor]:
    each = (value for by in result.values() for value in by.values())
    tensors = [value.factors if isinstance(value, tn.KroneckerFactors) else value for value in each]
    return [result.loss, result.output, *pytree.tree_leaves(tensors)]


def refused(program: Any) -> bool:
    return "its results differ" in program.explain()


def same(one: tn.Result, other: tn.Result) -> None:
    for got, want in zip(values(one), values(other), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("quantity", ALL, ids=lambda q: q.name)
def test_the_same_results(planned: list[int], quantity: tn.Quantity) -> None:
    """Also the same draws of one seed."""
    model, seed = cnn(), {"seed": 3} if "mc" in quantity.name or quantity.name == "kfac" else {}
    program = tn.compile(model, CE, batch(2), [quantity])
    fixed = tn.compile(model, CE, batch(2), [quantity], replan=False)
    for size in (64, 64, 1, 2):
        same(program(*batch(size), **seed), fixed(*batch(size), **seed))
    assert planned == [2, 2, 64] and not refused(program)
    assert fixed.source_for(64) == fixed.source == program.source


@pytest.mark.slow
def test_many_at_once(planned: list[int]) -> None:
    """Drawn ones too, whose columns go with the gradient for one size and not for another."""
    quantities = [tn.BatchL2(), tn.DiagGGNMC(mc_samples=40), tn.KFAC(), tn.SqrtGGN()]
    program = tn.compile(cnn(), CE, batch(1), quantities)
    assert program.source_for(256) != program.source
    result = program(*batch(256), seed=1)
    same(result, tn.compile(program.model, CE, batch(256), quantities)(*batch(256), seed=1))
    for name, want in oracle.batch_l2(program.model, CE, *batch(256)).items():
        torch.testing.assert_close(result["batch_l2"][name], want)
    assert "N = 256: a plan of its own, " in program.explain()


@dataclass(frozen=True)
class Clipped(tn.Quantity):
    """Σ_n weight_n min(1, 1/‖∇ℓ_n‖) ∇ℓ_n / N, from norms over all parameters and an operand."""

    name: str = "clipped"

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return (tn.BatchL2(scale=tn.Scale.UNSCALED),)

    def between(self, totals: Any) -> dict[str, Tensor]:
        return {"factor": (1 / totals["batch_l2"].sqrt()).clamp(max=1)}

    def extract(self, J: Any, g: Any) -> Any:
        return (J.T @ g * g.operand("factor") * g.operand("weight")).sum("n")


@pytest.mark.slow
def test_operands_and_phases(planned: list[int]) -> None:
    """What comes between phases is captured once."""
    program = tn.compile(cnn(), CE, batch(1), [Clipped()])
    assert program.source_for(200) != program.source and planned == [1, 200]
    weight = torch.rand(200, generator=torch.Generator().manual_seed(0)).double()
    result = program(*batch(200), operands={"weight": weight})
    each = oracle.batch_grad(program.model, CE, *batch(200))
    norms = sum((200 * G).flatten(1).square().sum(1) for G in each.values()).sqrt()
    for name, G in each.items():
        want = torch.einsum("n,n...->...", (1 / norms).clamp(max=1) * weight, G)
        torch.testing.assert_close(result["clipped"][name], want)
    assert "N = 200: a plan of its own, " in program.explain()


def test_when(planned: list[int]) -> None:
    """The second batch that is far away; what is near to a plan runs by it; the nearest counts."""
    program = tn.compile(cnn(), CE, batch(8), [tn.KFLR()])
    for size in (8, 3, 31, 32):
        program(*batch(size))
    assert planned == [8]
    program(*batch(33))
    assert planned == [8, 33]
    for size in (64, 131, 9, 2):
        program(*batch(size))
    assert planned == [8, 33]
    assert program.source_for(2) == program.source_for(1) and planned == [8, 33, 2]


def test_what_costs_less_than_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before batches of about that size have taken as long as planning does."""
    program = tn.compile(cnn(), CE, batch(2), [tn.KFLR()])
    once = replace(program.compiled.plan, batch=40).seconds
    steps = sum(1 for _ in program.compiled.plan.timed)
    monkeypatch.setattr(sizes, "PLANNING", 4.5 * once / steps)
    for _ in range(4):
        program(*batch(40))
        assert "N = 40" not in program.explain()
    program(*batch(40))
    assert "N = 40" in program.explain()


def test_without(planned: list[int]) -> None:
    program = tn.compile(cnn(), CE, batch(2), [tn.KFLR()], replan=False)
    for _ in range(3):
        program(*batch(64))
    assert planned == [2]
    assert "no other plans: replan=False" in program.explain()


@pytest.mark.slow
def test_the_limit_holds_for_every_batch(planned: list[int]) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(36, 30))
    model, quantities = nn.Sequential(*layers, nn.Linear(30, 12)).double(), [tn.Variance(), tn.BatchL2()]
    free, limit = tn.compile(model, CE, batch(16), quantities), 95_000
    program = tn.compile(model, CE, batch(4), quantities, memory_limit=limit)
    assert "def slice_" not in program.source and free.peak_bytes > limit
    same(program(*batch(16)), free(*batch(16)))  # at once: no plan so far keeps within the limit
    assert planned == [16, 4, 16] and "def slice_" in program.source_for(16)
    assert program._sizes.at(16).compiled.plan.peak_bytes <= limit
    program(*batch(5))
    assert planned == [16, 4, 16]
    with pytest.raises(tn.UnsupportedError, match=r"(?s)for a batch of 500 samples memory_limit=\d+ .*fewer samples"):
        program(*batch(500))
    fixed = tn.compile(model, CE, batch(4), quantities, memory_limit=limit, replan=False)
    same(fixed(*batch(500)), free(*batch(500)))


def test_a_wrong_plan_is_not_used() -> None:
    """The example's is, which was compared with autograd; unless nothing is to be checked."""
    program = tn.compile(cnn(), CE, batch(2), [tn.Grad()])
    blind = tn.compile(program.model, CE, batch(2), [tn.Grad()], check=False)

    def wrong(compiled: Compiled) -> Compiled:
        return replace(compiled, source=compiled.source.replace("torch.mm(", "1.001 * torch.mm("))

    want = program(*batch(64))
    for each in (program, blind):
        plain = each.compiled.again
        each._sizes.example.compiled = replace(each.compiled, again=lambda size, plain=plain: wrong(plain(size)))
        assert "1.001" in each.source_for(64)
    same(program(*batch(64)), want)
    assert "1.001" not in program.source_for(64)
    assert "N = 64: its results differ from those of the plan for the example" in program.explain()
    assert not torch.equal(blind(*batch(64))["grad"]["5.weight"], want["grad"]["5.weight"])


def test_no_plan_of_its_own() -> None:
    """What compiled goes on running; it is tried once."""
    program = tn.compile(cnn(), CE, batch(2), [tn.Grad()])
    tried: list[int] = []

    def fails(size: int) -> Compiled:
        tried.append(size)
        raise tn.InvariantError("after plan, something\n  This is a bug.")

    program._sizes.example.compiled = replace(program.compiled, again=fails)
    assert program.source_for(64) == program.source_for(65) == program.source
    program(*batch(64))
    assert tried == [64] and "N = 64: after plan, something\n" in program.explain()


def test_a_plan_that_fails_says_so() -> None:
    program = tn.compile(cnn(), CE, batch(2), [tn.Grad()])
    plain = program.compiled.again
    assert plain is not None

    def broken(size: int) -> Compiled:
        compiled = plain(size)
        return replace(compiled, source=compiled.source.replace("torch.mm(", "torch.mv("))

    program._sizes.example.compiled = replace(program.compiled, again=broken)
    want = tn.compile(program.model, CE, batch(64), [tn.Grad()])(*batch(64))
    assert "torch.mv(" in program.source_for(64)
    same(program(*batch(64)), want)
    assert "N = 64: it fails: " in program.explain() and "its results differ" not in program.explain()


def test_what_the_model_draws(planned: list[int]) -> None:
    """Both plans are compared with the same masks, and torch draws afterwards what it would have drawn."""
    program = tn.compile(cnn(0.5).train(), CE, batch(2), [tn.BatchL2()])
    fixed = tn.compile(program.model, CE, batch(2), [tn.BatchL2()], replan=False)
    found = []
    for each in (program, fixed):
        torch.manual_seed(5)
        found.append([each(*batch(64)) for _ in range(3)])
    for got, want in zip(*found, strict=True):
        same(got, want)
    assert "N = 64" in program.explain() and not refused(program)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies(planned: list[int], copied: Callable[[Any], Any]) -> None:
    program = tn.compile(cnn(), CE, batch(2), [tn.KFLR()])
    other = copied(program)
    same(other(*batch(64)), program(*batch(64)))
    assert planned == [2, 64] and other.source_for(64) == program.source_for(64)


def test_several_threads(planned: list[int]) -> None:
    """One of them plans, all of them get the same."""
    program = tn.compile(cnn(), CE, batch(2), [tn.KFLR()])
    found: list[tn.Result] = []
    threads = [Thread(target=lambda: found.append(program(*batch(64)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert planned == [2, 64]
    for result in found[1:]:
        same(result, found[0])


def test_no_more_than_a_few_are_kept(planned: list[int]) -> None:
    program = tn.compile(cnn(), CE, batch(1), [tn.Grad()])
    for k in range(1, 12):
        program.source_for(4**k)
    assert len(program._sizes._every) == sizes.KEPT and program._sizes.example.batch == 1


def test_computed(planned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `compute` keeps holds no model, so it compiles another program."""
    monkeypatch.setattr(sizes, "COMPILING", 0.0)
    model = cnn()
    for size in (4, 2, 64, 1, 64, 50, 4, 64):
        result = tn.compute(model, CE, batch(size), [tn.Grad()])
        for name, want in oracle.grad(model, CE, *batch(size)).items():
            torch.testing.assert_close(result["grad"][name], want)
    for _ in range(2):
        tn.compute(model, CE, batch(1000), [tn.Grad()], replan=False)
    assert planned == [4, 64]


def test_an_error_names_the_source(planned: list[int]) -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 12))
    x, y = torch.randint(3, (64, 2)), torch.randint(12, (64,))
    program = tn.compile(model, CE, (x[:2], y[:2]), [tn.DiagGGN()])
    assert program.source_for(64) != program.source
    program(x, y)
    with pytest.raises(tn.InputError, match=r"line \d+ of program.source_for\(64\): "):
        program(x + 3, y)


def test_halves_of_other_sizes(planned: list[int]) -> None:
    """They run the plan for their size, once it was compared with that of the example."""
    program = tn.compile(cnn(), CE, batch(2), [tn.Grad(), tn.BatchL2()])
    whole = tn.compile(program.model, CE, batch(64), [tn.Grad(), tn.BatchL2()])(*batch(64))
    wanted = pytree.tree_leaves([whole["grad"], whole["batch_l2"]])
    x, y = batch(64)
    plans = []
    for _ in range(4):
        _, saved = program.forward(x)
        plans.append(saved.plan.batch)
        later = program.backward(saved, y)
        for got, want in zip(pytree.tree_leaves([later["grad"], later["batch_l2"]]), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert plans[0] == 2 and plans[-1] == 64 and planned[-1] == 64
    other = tn.compile(program.model, CE, batch(2), [tn.Grad()])
    _, saved = other.forward(x)
    with pytest.raises(tn.InputError, match="of another program"):
        program.backward(saved, y)
