"""Sample by sample: all columns of one go together, and the results are the sums that a loop over columns gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sympy
import torch
from torch import Tensor as Values
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.lower.arrange import copies
from tnbackprop.compiler.lower.contract import build
from tnbackprop.compiler.lower.table import LOWERINGS
from tnbackprop.compiler.plan.plan import Plan
from tnbackprop.compiler.plan.samples import _without_samples
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import Kernel
from tnbackprop.compiler.program.expr import Call, Ref
from tnbackprop.compiler.program.memory import peak_of
from tnbackprop.compiler.program.numbers import Number
from tnbackprop.compiler.sweep.derived import Derived, PerSample
from tnbackprop.diagram.core import BATCH, COLUMN, Diagram, Leg, N, Product, Tensor

from ... import oracle_second
from ...cases import seq
from ...generation.test_generate import passes
from ...programs import codes, store_of
from ...second_order import assert_equal
from ..derive.test_meetings import CASES, arrivals, indefinite, problem, weighted

Attempt = Callable[..., tuple[Derived, Plan] | None]


@pytest.fixture(autouse=True)
def by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two columns are many, and one sample after the other is taken to be best wherever that can be."""

    def fastest(width: int, others: Sequence[int], least: PerSample, attempt: Attempt) -> tuple[Derived, Plan] | None:
        return attempt(1024, PerSample(2, 4)) or attempt(1)

    monkeypatch.setattr(search, "_fastest", fastest)


def calls(program: tn.Program) -> int:
    """How many sweeps go sample by sample."""
    return program.source.count("= added(slice_")


def check(program: tn.Program, model: nn.Module, loss: nn.Module, x: Values, y: Values, name: str) -> None:
    result = program(x, y)
    assert_equal(result["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), name)
    assert_equal(result["diag_ggn"], oracle_second.diag_ggn(model, loss, x, y), name)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    """Every sweep of many columns goes so; for any batch, also one of a single sample."""
    model, x, y = problem(name, 4)
    loss = nn.CrossEntropyLoss()
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag(), tn.DiagGGN()])
    assert calls(program) >= 2
    alone = [columns for columns in program.compiled.derived.columns if columns.per_sample]
    assert all(int(columns.width) % 4 == 0 and 0 <= int(columns.width) - int(columns.count) < 4 for columns in alone)
    for size in (4, 1, 7):
        check(program, model, loss, *problem(name, size)[1:], name)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("loss", [weighted, indefinite, F.cross_entropy], ids=["weighted", "indefinite", "plain"])
def test_weights(loss: Callable[[Values, Values], Values]) -> None:
    """Columns of either sign, and what the loss averages over: the batch is that of the call, not one sample."""
    model, x, y = problem("a chain", 5)
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag()])
    assert calls(program)
    assert_equal(program(x, y)["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), "hessian_diag")


def test_what_arrives_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns of a sweep before come to where many are one-hot, and go on with them, sample by sample."""
    monkeypatch.setattr(search, "_fastest", lambda width, others, least, attempt: attempt(1024, PerSample(10, 4)))
    model, x, y = problem("a chain", 3)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
    assert arrivals(program)[-1] == ("layer_0", 9) and calls(program) == 1
    want = oracle_second.hessian_diag(model, nn.CrossEntropyLoss(), x, y)
    assert_equal(program(x, y)["hessian_diag"], want, "a chain")


class Everything(nn.Module):
    """A frozen parameter, a fallback, normalisation, an embedding, an einsum, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.twice, self.frozen, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Values) -> Values:
        x = self.norm(self.table(x))
        x = self.twice(self.twice(x).tanh()).sigmoid() + self.shift
        x = torch.einsum("nti,ij->ntj", self.frozen(x), self.mix)
        return self.head(torch.cumsum(x, 1).mean(1))


def test_what_a_sample_reads() -> None:
    torch.manual_seed(0)
    model, x, y = Everything().double(), torch.randint(0, 7, (3, 5)), torch.arange(3)
    loss = nn.CrossEntropyLoss()
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag(), tn.DiagGGN()])
    assert calls(program) >= 2
    check(program, model, loss, x, y, "everything")


class Turned(nn.Module):
    def forward(self, input: Values) -> Values:
        return input.flip(1)


@dataclass(frozen=True)
class Mean(tn.DiagGGN):
    """A quantity that says how many samples there are."""

    name: str = "mean"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        found = super().extract(J, g)
        return tn.Diagram(found.legs, tuple(replace(product, scale=product.scale / tn.N) for product in found.products))


def test_the_batch_is_that_of_the_call() -> None:
    """And not the one sample that a function sees."""
    model, x, y = problem("a chain", 5)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [Mean()])
    assert calls(program)
    want = oracle_second.diag_ggn(model, nn.CrossEntropyLoss(), x, y)
    assert_equal(program(x, y)["mean"], {name: value / 5 for name, value in want.items()}, "mean")


def test_what_has_no_samples() -> None:
    """A value that only code reads, a tuple say, cannot be cut: columns behind it go in a loop."""
    torch.manual_seed(0)
    rule = tn.Rule(
        "output[n, i] = input[n, 3 - i]", saved={"both": "({input} + 2, -1)"}, forward="{input}.flip({both}[1])",
        vjp={"input": "({cotangents} + 0 * {both}[0]).flip({both}[1])"},
    )  # fmt: skip
    first, last = (nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4)), (nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3))
    model = seq(*first, Turned(), *last).double()
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.arange(3)
    loss, rules = nn.CrossEntropyLoss(), tn.RULES | {Turned: lambda layer: rule}
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag(), tn.DiagGGN()], rules=rules)
    assert calls(program) == 1 and len(program.compiled.plan.loops) == 3  # alone is what begins below it
    check(program, model, loss, x, y, "a tuple")


def test_what_counts_samples_stays() -> None:
    """A step that reads parameters alone is made once, before; not one with the batch size in its code."""
    shape = (N, 3)
    small = store_of({"p": (3,), "x": shape}, batch=1, one_sample=True)
    p, x = small.find("p"), small.find("x")
    once = small.add(Call(f.MUL, (p, Number(sympy.Integer(2)))), (3,), Kernel.ELEMENTWISE)
    many = small.add(Call(f.EXPAND, (p, N, 3)), shape, Kernel.VIEW)
    out = small.add(Call(f.ADD, (Call(f.MUL, (x, once)), many)), shape, Kernel.ELEMENTWISE)
    store = store_of({"p": (3,)})
    fixed, outside = {p, small.like}, {p: store.find("p"), small.like: store.like}
    steps = _without_samples(store, tuple(small.steps), (out,), fixed, outside)
    assert codes(store) == ["p * 2"]
    assert steps == (many, out)
    assert fixed == {p, small.like, once} and outside[once] is store.steps[0]


def test_one_sample_is_no_axis() -> None:
    """What only a leg of one sample lies between is not copied, and read in the order of memory."""
    h, i, k = Leg("h", 4), Leg("i", 5), Leg("k", 6)
    shapes = dict.fromkeys("xy", (N, 4, 5, 6))
    single, shared = (store_of(shapes, batch=1, one_sample=one) for one in (True, False))
    groups, legs = ((BATCH, i), (h,), (k,)), (BATCH, h, i, k)
    assert not copies(single, Ref(single.find("x"), legs, legs), groups)
    assert copies(shared, Ref(shared.find("x"), legs, legs), groups)
    pair = Product(sympy.Integer(1), (Tensor("x", (BATCH, h, i, k)), Tensor("y", (BATCH, h, i, k))))
    for store in (single, shared):
        build(store, Diagram((h, k), (pair,)), LOWERINGS)
        assert not any("permute" in code or "transpose" in code for code in codes(store))


def test_odd_matrices() -> None:
    """Rather 272 columns of a product than 75, which would have to be filled up for every sample."""
    o, p, k, v = Leg("o", 64), Leg("p", 196), Leg("k", 75), Leg(COLUMN, 272)
    store = store_of({"x": (64, 196, 75), "g": (196, 64, 272)}, batch=1, itemsize=4, one_sample=True)
    store.in_rounds(1, [store.find("g")])
    factors = Product(sympy.Integer(1), (Tensor("x", (o, p, k)), Tensor("g", (p, o, v))))
    build(store, Diagram((v, o, k), (factors,)), LOWERINGS)
    assert not any("pad(" in code for code in codes(store))


@pytest.mark.parametrize(
    "quantity",
    [
        tn.SqrtGGN(), tn.DiagGGN(per_sample=True), tn.GGNTrace(), tn.GGNGram(), tn.HessianDiag(per_sample=True),
        tn.KFLR(),
    ],
    ids=lambda quantity: quantity.name,
)  # fmt: skip
def test_what_stays_together(quantity: tn.Quantity) -> None:
    """What is no sum over samples, and factors, which share those of the input: their columns go in a loop, as ever."""
    model, x, y = problem("a chain", 3)
    assert not calls(tn.compile(model, nn.CrossEntropyLoss(), (x, y), [quantity]))


@pytest.mark.slow
def test_in_a_file_of_its_own(tmp_path: Path) -> None:
    """What is generated checks itself: against autograd, for several batch sizes."""
    torch.manual_seed(0)
    model = seq(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4), nn.Sigmoid())
    example = torch.randn(4, 1, 8, 8), torch.arange(4)
    file = tn.generate(model, [tn.HessianDiag()], loss=nn.CrossEntropyLoss(), example=example)
    assert "def added(" in file.source
    passes(file.source, tmp_path)


def test_what_does_not_depend_on_samples_is_outside() -> None:
    """A transposed or rearranged parameter is read by every call, and made once."""
    model, x, y = problem("a chain", 3)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
    assert "weight.flip" not in program.source.split("def program")[0]
    assert "1 / N" not in program.source.split("def program")[0]


def test_shown_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Explained as what it is, and a bar has a round for each sample."""
    totals: list[tuple[object, int]] = []

    def track(rows: list[int], total: int, description: str, **options: object) -> list[int]:
        totals.append((description, total))
        return rows

    monkeypatch.setattr("tnbackprop.runtime.progress.track", track)
    model, x, y = problem("a chain", 3)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
    assert "sample by sample" in program.explain("derive")
    shown = program.explain("plan")
    assert "sample by sample" in shown and "N × cotangent of layer_0" in shown
    assert "# the 4 one-hot columns at layer_2, weighted, sample by sample" in program.source
    program(x, y, progress=True)
    assert totals == [("slices of the batch", 3)] * calls(program)


def test_memory_is_that_of_one_sample() -> None:
    """What a call holds does not grow with the batch; the results do not, either."""
    model = seq(nn.Linear(40, 60), nn.Sigmoid(), nn.Linear(60, 50), nn.Sigmoid(), nn.Linear(50, 3))
    peaks = []
    for size in (8, 64):
        x, y = torch.randn(size, 40), torch.arange(size) % 3
        program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.HessianDiag()])
        assert calls(program)
        rows = sum(4 * size * c.start.columns * 60 for c in program.compiled.derived.columns)
        peaks.append(program.peak_bytes - 2 * rows)
        alone = [s.expr.body for s in program.compiled.plan.steps if s.kernel is Kernel.PER_SAMPLE]
        largest = max(peak_of(body.steps, body.values, 1, 4) for body in alone)
        sums = 4 * sum(p.numel() for p in model[0].parameters())
        assert program.peak_bytes >= largest + sums  # what the last sample gives, beside the sums so far
    assert peaks[1] < 2 * peaks[0]
