"""Receptive fields: kernels picked by what max pooling chose give the same VJP, exactly, on small integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import sympy
import torch
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler import processor
from tnbackprop.compiler.lower import receptive
from tnbackprop.compiler.lower.contract import build, made
from tnbackprop.compiler.lower.receptive import MANY, OF_WIDE_VJP, VJP, find_fields, receptive_fields
from tnbackprop.compiler.lower.table import LOWERINGS
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program.cost import CPU, Kernel
from tnbackprop.compiler.program.store import LIKE, Store
from tnbackprop.diagram.core import BATCH, COLUMN, Diagram, Leg, Operand, Product, Selection, Tensor, Window

from ... import oracle_second
from ...cases import seq
from ...programs import broken, called, run, shapes_of, store_of
from ...second_order import assert_equal

FLOPS = dict.fromkeys(cost.Kernel, 1e3) | {cost.Kernel.RECEPTIVE: 1e18}
EAGER = replace(CPU, launch=0.0, bandwidth=1e18, flops=FLOPS)
"""Rates with which looking kernels up is always faster."""


Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Geometry:
    """Image, convolution (kernel, stride, padding, dilation) and pool (the same), each for two axes."""

    image: tuple[int, int]
    convolution: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
    pool: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
    ceil: bool = False

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        _, stride, padding, dilation = self.convolution
        return F.conv2d(x, weight, None, stride, padding, dilation)

    def pooled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kernel, stride, padding, dilation = self.pool
        return F.max_pool2d(x, kernel, stride, padding, dilation, self.ceil, return_indices=True)


GEOMETRIES = {
    "overlapping": Geometry((9, 9), ((3, 3), (1, 1), (0, 0), (1, 1)), ((3, 3), (2, 2), (0, 0), (1, 1))),
    "apart": Geometry((8, 6), ((3, 3), (1, 1), (1, 1), (1, 1)), ((2, 2), (2, 2), (0, 0), (1, 1))),
    "not square": Geometry((7, 11), ((2, 5), (1, 2), (1, 2), (2, 1)), ((3, 2), (1, 2), (1, 0), (1, 1))),
    "beyond the end": Geometry((8, 8), ((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0), (1, 1)), ceil=True),
    "dilated": Geometry((11, 11), ((2, 2), (2, 2), (0, 1), (1, 3)), ((2, 2), (1, 1), (1, 1), (2, 2))),
    "mostly padding": Geometry((2, 2), ((1, 1), (1, 1), (3, 3), (1, 1)), ((2, 2), (2, 2), (0, 0), (1, 1))),
}


def diagram(g: Geometry, outer: int, inner: int, columns: int, weights: torch.Size, middle: torch.Size) -> Diagram:
    """g[v, n, o, h, w] [index = (y, x)] near mask[n, o, y, x] Π weight[o, i, k, l], for a pool after a convolution."""
    v, o, i = Leg(COLUMN, columns), Leg("o", outer), Leg("i", inner)
    pooled = g.pooled(torch.zeros(1, 1, *middle))[0].shape[-2:]
    operands: list[Operand] = []
    positions, choice, kernels, images, near = [], [], [], [], []
    for a in range(2):
        position, y, kernel, image = (
            Leg(f"{name}{a}", size)
            for name, size in zip("pyki", (pooled[a], middle[a], weights[2 + a], g.image[a]), strict=True)
        )
        _, stride, padding, dilation = (each[a] for each in g.convolution)
        size, step, space, gap = (each[a] for each in g.pool)
        operands.append(Window(image, ((stride, y), (dilation, kernel)), -padding))
        near.append(Window(y, ((step, position), (gap, Leg(f"c{a}", size))), -space))
        for legs, leg in ((positions, position), (choice, y), (kernels, kernel), (images, image)):
            legs.append(leg)
    operands += [
        Tensor("g", (v, BATCH, o, *positions)),
        Selection(Tensor("index", (BATCH, o, *positions)), tuple(choice), tuple(near)),
        Tensor("mask", (BATCH, o, *choice)),
        Tensor("weight", (o, i, *kernels)),
    ]
    return Diagram((v, BATCH, i, *images), (Product(sympy.Integer(1), tuple(operands)),))


def example(g: Geometry, columns: int, outer: int = 3, inner: int = 2, batch: int = 2) -> tuple[Diagram, Values]:
    generator = torch.Generator().manual_seed(columns)

    def ints(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).double()

    weight = ints(outer, inner, *g.convolution[0])
    middle = g.forward(torch.zeros(1, inner, *g.image).double(), weight).shape[-2:]
    value, index = g.pooled(ints(batch, outer, *middle))
    mask = ints(batch, outer, *middle)
    values = {"g": ints(columns, *value.shape), "index": index, "mask": mask, "weight": weight}
    return diagram(g, outer, inner, columns, weight.shape, middle), values


def expected(g: Geometry, values: Values) -> torch.Tensor:
    """What autograd sends back through the convolution, of the scattered cotangent times the mask."""
    cotangent, index, mask, weight = values["g"], values["index"], values["mask"], values["weight"]
    flat = torch.zeros(*cotangent.shape[:3], mask[0, 0].numel(), dtype=torch.float64)
    flat = flat.scatter_add_(3, index.flatten(2).expand(len(cotangent), -1, -1, -1), cotangent.flatten(3))
    scattered = flat.unflatten(3, mask.shape[2:]) * mask
    scattered, head = scattered.flatten(0, 1), scattered.shape[:2]
    x = torch.zeros(len(scattered), weight.shape[1], *g.image, dtype=torch.float64, requires_grad=True)
    (pulled,) = torch.autograd.grad(g.forward(x, weight), x, scattered)
    return pulled.unflatten(0, head)


def planned(given: Diagram, values: Values) -> list[torch.Tensor]:
    """The value by each plan."""
    found = []
    start = store_of(shapes_of(*given.products[0].operands), batch=2)
    for plan in receptive_fields(start, given.products[0], given.legs):
        store = start.fork()
        ref = made(store, plan)
        found.append(run(store, ref, values, 2))
    return found


def _tensors(given: Diagram) -> list[Tensor]:
    (product,) = given.products
    found = [op.index if isinstance(op, Selection) else op for op in product.operands]
    return [op for op in found if isinstance(op, Tensor)]


@pytest.mark.parametrize("columns", [1, 5, 16])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_exact(name: str, columns: int) -> None:
    """Both orders of the axes, with columns filled up or not."""
    given, values = example(GEOMETRIES[name], columns)
    want = expected(GEOMETRIES[name], values)
    found = planned(given, values)
    assert len(found) == 2
    assert all(torch.equal(value, want) for value in found)


needs_onednn = pytest.mark.skipif(not processor.has_onednn(), reason="no AVX-512, or torch without oneDNN")


@needs_onednn
@pytest.mark.parametrize("name", GEOMETRIES)
def test_many_columns_by_onednn(name: str) -> None:
    """In float32; small integers, so the sums are exact."""
    given, values = example(GEOMETRIES[name], MANY)
    want = expected(GEOMETRIES[name], values)
    single = {key: value.float() if value.is_floating_point() else value for key, value in values.items()}
    start = Store(replace(CPU, onednn=True), 2, 4)
    for name, shape in shapes_of(*given.products[0].operands).items():
        start.given(name, shape, floating=name != "index")
    start.like, start.lowerings = start.given(LIKE, ()), LOWERINGS
    plans = receptive_fields(start, given.products[0], given.legs)
    assert len(plans) == 2
    for plan in plans:
        store = start.fork()
        found = run(store, made(store, plan), single | {LIKE: torch.zeros(())}, 2)
        assert called(store.steps, OF_WIDE_VJP)
        assert torch.equal(found.double(), want)


@needs_onednn
def test_where_onednn_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 by a program that runs here; not in float64, with few columns, in a file, or where it is no faster."""
    monkeypatch.setitem(cost.RATES, "cpu", replace(EAGER, rows=10**6))
    model, sample, _ = models()["nothing between"]
    x, y, loss = torch.randn(2, *sample), torch.arange(2), nn.CrossEntropyLoss()
    model(x)
    monkeypatch.setattr(receptive, "MANY", 2)
    monkeypatch.setattr(processor, "made", lambda: ("AuthenticAMD", 26))
    assert processor.of_processor(CPU).flops[Kernel.CHANNELS_LAST] == 2 * CPU.flops[Kernel.CHANNELS_LAST]

    def called(dtype: torch.dtype = torch.float32) -> bool:
        program = tn.compile(model.to(dtype), loss, (x.to(dtype), y), [tn.DiagGGN()])
        assert "= receptive_vjp" in program.source
        return "mkldnn" in program.source

    assert called() and not called(torch.float64)
    assert "mkldnn" not in tn.generate(model.float(), [tn.DiagGGN()], loss=loss, example=(x, y)).source
    monkeypatch.setattr(receptive, "MANY", 100)
    assert not called()
    monkeypatch.setattr(receptive, "MANY", 2)
    new, old, intel = ("AuthenticAMD", 26), ("AuthenticAMD", 25), ("GenuineIntel", 6)
    for kind, there, chosen in ((intel, True, False), (old, True, False), (new, False, False), (new, True, True)):
        monkeypatch.setattr(processor, "made", lambda kind=kind: kind)
        monkeypatch.setattr(processor, "has_onednn", lambda there=there: there)
        assert called() == chosen


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ y - above", "- above"),
        ("field[0] - 1 - y", "field[0] - y"),
        ("(y - first[0]) // step[0] + 1", "(y - first[0]) // step[0]"),
        ("(left - start) * inner :", "0 * left :"),
        (".zero_()", ""),
        ("low * outer :", "0 * outer :"),
        ("min(down, ", "max(down, "),
    ],
)
def test_the_function_is_needed_as_it_is(old: str, new: str) -> None:
    """Each of these breaks some geometry."""
    assert VJP.count(old) == 1
    for geometry in GEOMETRIES.values():
        given, values = example(geometry, 5)
        patch = broken(receptive, "OF_VJP", VJP.replace(old, new))
        try:
            found = planned(given, values)
        except (AssertionError, IndexError, RuntimeError):  # what is never set differs from run to run
            return
        finally:
            patch.undo()
        if not all(torch.equal(value, expected(geometry, values)) for value in found):
            return
    pytest.fail("no geometry needs it")


def other(given: Diagram, old: type[Operand], new: Operand | None) -> Product:
    """The product with another operand of a type, or without it."""
    operands = [op for op in given.products[0].operands if not isinstance(op, old)]
    return Product(sympy.Integer(1), (*operands, *([new] if new is not None else [])))


def test_where_it_is_not_known_what_is_near() -> None:
    """A choice that may be anywhere, a group of channels, a result without columns: other lowerings take them."""
    given, _ = example(GEOMETRIES["overlapping"], 5)
    product = given.products[0]
    assert find_fields(product, given.legs) is not None
    (selection,) = (op for op in product.operands if isinstance(op, Selection))
    assert find_fields(other(given, Selection, replace(selection, near=())), given.legs) is None
    assert find_fields(other(given, Selection, None), given.legs) is None
    assert find_fields(product, given.legs[1:]) is None
    channel = next(leg for leg in selection.index.legs if leg.name == "o")
    assert find_fields(product, (*given.legs, channel)) is None


def models() -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """Model, sample, and how many of its convolutions read what pooling chose."""
    end = (nn.Flatten(), nn.LazyLinear(6), nn.Sigmoid(), nn.Linear(6, 3))
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return {
        "two": (
            seq(nn.Conv2d(1, 2, 3), nn.ReLU(), pool, nn.Conv2d(2, 3, 2), nn.Tanh(), nn.MaxPool2d(2),
                nn.Conv2d(3, 2, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2, 1), *end), (1, 14, 14), 2,
        ),
        "nothing between": (seq(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), *end), (1, 8, 8), 1),
        "groups": (seq(nn.Conv2d(1, 4, 2), nn.Conv2d(4, 4, 3, groups=2), nn.MaxPool2d(2), *end), (1, 8, 8), 0),
        "another pool": (seq(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 3), nn.AdaptiveMaxPool2d(2), *end), (1, 8, 8), 0),
        "one axis": (seq(nn.Conv1d(1, 2, 2), nn.Conv1d(2, 3, 3), nn.MaxPool1d(2), *end), (1, 9), 0),
        "one pooled position": (seq(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), *end), (1, 5, 5), 0),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", list(models()))
def test_in_a_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian's diagonal and the GGN's are what they are, for other batches, too."""
    monkeypatch.setitem(cost.RATES, "cpu", EAGER)
    torch.manual_seed(0)
    model, sample, count = models()[name]
    model(torch.randn(1, *sample))
    model = model.double()
    example = torch.randn(2, *sample, dtype=torch.float64), torch.arange(2)
    loss = nn.CrossEntropyLoss()
    program = tn.compile(model, loss, example, [tn.HessianDiag(), tn.DiagGGN("each", per_sample=True)])
    calls = program.source.count("= receptive_vjp(")
    assert (calls >= count > 0) or calls == count == 0
    shown = [line for line in program.explain("derive").splitlines() if line.startswith("  → Σ") and "𝟙[" in line]
    assert any("Π[" in line and "_weight[" in line for line in shown) or not count  # what a cotangent may be, too
    for size in (1, 3):
        x, y = torch.randn(size, *sample, dtype=torch.float64), torch.arange(size) % 3
        result = program(x, y)
        assert_equal(result["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), name)
        want = oracle_second.diag_ggn_per_sample(model, loss, x, y)
        assert_equal(result["each"], want, name)


def test_the_index_is_where_the_rule_says() -> None:
    """Every chosen position lies in the windows that the rule of max pooling names."""
    for geometry in GEOMETRIES.values():
        given, values = example(geometry, 1)
        (selection,) = (op for op in given.products[0].operands if isinstance(op, Selection))
        width = int(selection.choice[1].size)
        for axis, place in enumerate((values["index"] // width, values["index"] % width)):
            (step, position), (gap, choices) = selection.near[axis].terms
            start = step * torch.arange(int(position.size)) + selection.near[axis].offset
            offset = place - (start if axis else start[:, None])
            assert (offset % gap == 0).all() and (offset >= 0).all() and (offset // gap < int(choices.size)).all()


@pytest.mark.parametrize(("columns", "better"), [(16, False), (272, True)])
def test_better_where_there_are_many_columns(columns: int, better: bool) -> None:
    """As measured: for a few columns kernels are looked up in vain."""
    second = Geometry((14, 14), ((3, 3), (1, 1), (0, 0), (1, 1)), ((3, 3), (2, 2), (0, 0), (1, 1)), ceil=True)
    given, _ = example(second, columns, 96, 64, batch=1)
    operands = given.products[0].operands
    mask, weight = (next(op for op in _tensors(given) if op.name == name) for name in ("mask", "weight"))
    scattered = Tensor("scattered", (Leg(COLUMN, columns), *mask.legs))
    usual = Product(sympy.Integer(1), (scattered, weight, *(op for op in operands if isinstance(op, Window))))
    stores = []
    for product in (given.products[0], usual):
        store = store_of(shapes_of(*given.products[0].operands, scattered), batch=1, itemsize=4)
        if product is usual:
            build(store, Diagram(given.legs, (usual,)))
        else:
            made(store, receptive_fields(store, product, given.legs)[0])
        stores.append(store)
    assert (stores[0].seconds < stores[1].seconds) == better
