"""Shifts: the Gram of windows that slide together is exact, on small integers, wherever it is offered."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as every
from math import gcd

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler import search
from tnbackprop.compiler.lower import shifts as module
from tnbackprop.compiler.lower.candidate import Candidate
from tnbackprop.compiler.lower.contract import build, made
from tnbackprop.compiler.lower.shifts import GRAM, WINDOW_GRAM, shifts
from tnbackprop.compiler.lower.table import LOWERINGS, squares, unfolding
from tnbackprop.compiler.program.store import Store
from tnbackprop.diagram.core import BATCH, Diagram, Leg, Product, Tensor, Window
from tnbackprop.diagram.reference import evaluate

from ...programs import broken, called, run, shapes_of, store_of
from .test_lowerings import Slide, tensors

Legs = tuple[Leg, ...]


def gram(slides: tuple[Slide, ...], groups: int = 1, other: str = "x", channels: int = 2, wider: int = 0) -> Diagram:
    """Σ_{n,p} x[n, g, c, s·p + d·k - pad] other[n, g, c', s·p + d·k' - pad], with `wider` more values of k'."""
    head = (Leg("g", groups),) if groups > 1 else ()
    positions = tuple(Leg(f"p{a}", s.out) for a, s in enumerate(slides))
    operands: list[Tensor | Window] = []
    legs: Legs = head
    for copy, name, more in (("", "x", 0), ("'", other, wider)):
        channel = Leg(f"c{copy}", channels)
        images = tuple(Leg(f"i{a}{copy}", s.image) for a, s in enumerate(slides))
        kernels = tuple(Leg(f"k{a}{copy}", s.kernel + more) for a, s in enumerate(slides))
        operands.append(Tensor(name, (BATCH, *head, channel, *images)))
        for s, image, p, k in zip(slides, images, positions, kernels, strict=True):
            operands.append(Window(image, ((s.stride, p), (s.dilation, k)), -s.padding))
        legs = (*legs, channel, *kernels)
    return Diagram(legs, (Product(sympy.Integer(1), tuple(operands)),))


def planned(given: Diagram, batch: int = 3) -> list[torch.Tensor]:
    """The value by each plan that the lowering offers."""
    values, found = tensors(given, batch), []
    for plan in shifts(fresh(given), given.products[0], given.legs):
        store = fresh(given)
        ref = made(store, plan)
        assert len(called(store.steps, module.GRAM)) == 1
        found.append(run(store, ref, values, batch))
    return found


def fresh(given: Diagram, batch: int = 3) -> Store:
    return store_of(shapes_of(*given.products[0].operands), batch=batch, itemsize=4)


def expected(given: Diagram, batch: int = 3) -> torch.Tensor:
    values = {name: value.numpy() for name, value in tensors(given, batch).items()}
    return torch.as_tensor(evaluate(given, values, batch))


def check(given: Diagram, batch: int = 3) -> int:
    """Every plan is exact; how many there are."""
    found = planned(given, batch)
    for value in found:
        assert torch.equal(value, expected(given, batch)), str(given)
    return len(found)


# kernel, stride, dilation and padding of one axis; the image is such that `out` positions fit, and `rest` more
AXES = [
    Slide(max(1, s * (out - 1) + d * (k - 1) + 1 - 2 * p + rest), out, k, s, d, p)
    for out, k, s, d, (p, rest) in every((4, 7), (2, 3, 5), (1, 2, 3), (1, 2, 3), ((0, 0), (1, 1), (2, -1)))
]


@pytest.mark.parametrize("slide", AXES, ids=str)
def test_one_axis(slide: Slide) -> None:
    """Kernels below and above the stride, unequal paddings: exact, and offered where all windows share a row."""
    common = gcd(slide.stride, slide.dilation)
    edge = (slide.kernel - 1) // (slide.stride // common) * (slide.dilation // common)
    assert check(gram((slide,))) == (0 < edge < slide.out)


SLIDES = {
    "two": (Slide(6, 4, 3), Slide(7, 5, 3)),
    "two_padded": (Slide(5, 5, 3, padding=1), Slide(4, 4, 3, padding=1)),
    "two_unequal": (Slide(9, 4, 3, 2, 1, 1), Slide(9, 5, 2, 1, 3, 0)),
    "two_asymmetric": (Slide(6, 6, 2, padding=1), Slide(5, 5, 4, padding=2)),
    "two_strided_over_the_kernel": (Slide(9, 3, 2, stride=4), Slide(6, 5, 2)),
    "two_one_of_kernel_one": (Slide(5, 5, 1), Slide(5, 3, 3)),
    "two_cut": (Slide(9, 4, 3, padding=-2), Slide(9, 4, 3, padding=-1)),
    "two_steps_with_a_divisor": (Slide(17, 5, 3, 2, 4), Slide(9, 3, 2, 4, 2)),
    "three": (Slide(4, 3, 2), Slide(4, 4, 3, padding=1), Slide(7, 3, 3, stride=2)),
}
OFFERED = {"two_strided_over_the_kernel": 1, "two_one_of_kernel_one": 1, "two_steps_with_a_divisor": 1, "three": 3}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("slides", SLIDES)
def test_several_axes(slides: str, groups: int, batch: int) -> None:
    """One plan for every axis that can be shifted."""
    assert check(gram(SLIDES[slides], groups), batch) == OFFERED.get(slides, 2)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("wider", [0, 1])
@pytest.mark.parametrize("slides", ["two", "two_unequal", "two_asymmetric"])
def test_two_tensors(slides: str, wider: int) -> None:
    """Nothing needs the two images to be one, nor the kernels to be of one size."""
    assert check(gram(SLIDES[slides], 2, "y", wider=wider)) == 2


def test_open_samples_and_another_order_of_the_legs() -> None:
    given = gram(SLIDES["two_unequal"], 2)
    assert check(Diagram((BATCH, *given.legs), given.products)) == 2
    assert check(Diagram((*given.legs[::-1], BATCH), given.products)) == 2


def test_one_channel_without_a_leg() -> None:
    x, y = (Tensor("x", (BATCH, Leg(name, 6))) for name in "ij")
    p, k, m = Leg("p", 4), Leg("k", 3), Leg("m", 3)
    windows = Window(Leg("i", 6), ((1, p), (1, k))), Window(Leg("j", 6), ((1, p), (1, m)))
    assert check(Diagram((k, m), (Product(sympy.Integer(1), (x, *windows, y)),))) == 1


def test_symmetric_products_are_made_once() -> None:
    """One tensor on both sides: half the blocks, in FLOPs and in calls of the function."""
    flops = []
    for other in ("x", "y"):
        store = fresh(given := gram(SLIDES["two"], other=other))
        made(store, shifts(store, given.products[0], given.legs)[0])
        (step,) = called(store.steps, GRAM)
        assert len(step.inputs) == (1 if other == "x" else 2)
        flops.append(step.work.flops[0][0])
    assert flops == [2 * (4 + 2 + 4 + 1 + 4), 2 * (4 + 2 + 2 * (4 + 1) + 2 * 4)]  # K(O + (K-1)/2) = 15 of K²·O = 36


def _changed(given: Diagram, index: int, **to: object) -> Diagram:
    (term,) = given.products
    operands = [*term.operands]
    operands[index] = replace(operands[index], **to)  # type: ignore[arg-type]
    return Diagram(given.legs, (Product(term.scale, tuple(operands)),))


def test_not_offered() -> None:
    """Positions of their own, other steps, an open or weighted position, a leg that only one tensor sums."""
    given = gram((Slide(6, 4, 3),))
    (one, window, two, other), legs = given.products[0].operands, given.legs
    assert isinstance(window, Window) and isinstance(other, Window) and isinstance(two, Tensor)
    p, k = (leg for _, leg in other.terms)
    assert check(given) == 1
    assert check(_changed(given, 3, terms=((1, Leg("q", 4)), (1, k)))) == 0
    assert check(_changed(given, 3, terms=((2, p), (1, k)), offset=-2)) == 0
    assert check(_changed(given, 3, terms=((1, p), (2, k)), offset=-2)) == 0
    assert check(Diagram((*legs, p), given.products)) == 0
    assert check(Diagram(legs[:-1], given.products)) == 0
    assert check(_changed(given, 2, legs=(*two.legs, Leg("z", 2)))) == 0
    weighted = Product(sympy.Integer(1), (one, window, two, other, Tensor("w", (p,))))
    assert shifts(fresh(given), weighted, legs) == []
    assert check(gram((Slide(6, 2, 5),))) == 0  # no row belongs to all windows


BREAKS = {
    "a window too short": ("t + steps + 1]", "t + steps]"),
    "a window too late": ("products[t :", "products[t + 1 :"),
    "the rows behind": ("(out, edge, steps)", "(out - 1, edge, steps)"),
    "the rows in the middle": ("(edge, out - edge, 1)", "(0, out - edge, 1)"),
    "the rest of a stride": ("image[first % stride]", "image[0]"),
    "the place in a stride": ("first // stride + start", "start"),
    "an edge of the stride": ("edge = dilation * steps", "edge = steps"),
    "one transpose": ("block.mT.reshape", "block.reshape"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_break_is_caught(what: str) -> None:
    old, new = BREAKS[what]
    assert WINDOW_GRAM.count(old) == 1
    given = gram((Slide(14, 5, 4, 2, 3, 1),))
    patch = broken(module, "GRAM", WINDOW_GRAM.replace(old, new))
    (value,) = planned(given)
    patch.undo()
    assert not torch.equal(value, expected(given))


def test_the_function_is_captured_whole() -> None:
    """torch.compile follows its loops without a graph break."""
    space = {"torch": torch}
    exec(WINDOW_GRAM, space)
    x = torch.randint(-3, 4, (1, 4, 9, 6)).double()
    arguments = (x, x, (2, 3, 2, 2, 3, 2), (1, 4), 7, 1)
    whole = torch.compile(space["window_gram"], fullgraph=True, backend="eager")
    assert torch.equal(whole(*arguments), space["window_gram"](*arguments))  # type: ignore[operator]


# ---------------------------------------------------------------- in programs


def without_unfolding(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """Unfolding only where nothing can be shifted, so that the cost has no say."""
    return [] if shifts(store, product, legs) else unfolding(store, product, legs)


NETS = {
    "one_dimension": (nn.Conv1d(3, 4, 5, stride=2, padding=2), (3, 20)),
    "two_dimensions": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "groups_and_dilation": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=2, groups=2), (4, 9, 8)),
    "three_dimensions": (nn.Conv3d(2, 3, 2, padding=1), (2, 4, 3, 5)),
    "same_even": (nn.Conv2d(2, 3, 4, padding="same"), (2, 6, 6)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("net", NETS)
def test_factors_of_convolutions(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """KFAC's factors with and without shifts; planned for 3 samples, run with 3 and 1."""
    layer, shape = NETS[net]
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(3, *shape).double(), torch.randint(3, (3,))
    model(x)
    programs = []
    for rows in ((squares, *LOWERINGS[1:2], unfolding), (squares, *LOWERINGS[1:3], without_unfolding)):
        monkeypatch.setattr(search, "LOWERINGS", rows)
        programs.append(tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR()]))
    plain, shifted = programs
    assert "window_gram(" in shifted.source and "window_gram(" not in plain.source
    for batch in (3, 1):
        results = [program(x[:batch], y[:batch])["kflr"]["0.weight"] for program in programs]
        for one, two in zip(*(factors.factors for factors in results), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("slides", "channels", "batch", "shifted"),
    [
        ((Slide(32, 28, 5),) * 2, 3, 32, True),  # the convolutions of 3C3D
        ((Slide(14, 12, 3),) * 2, 64, 32, True),
        ((Slide(6, 6, 3, padding=1),) * 2, 96, 32, True),
        ((Slide(28, 24, 5),) * 2, 1, 1, False),  # calls cost more than products
        ((Slide(6, 6, 3, padding=1),) * 2, 4, 8, False),
        ((Slide(8, 4, 2, stride=2),) * 2, 64, 32, False),  # no shared rows
    ],
)
def test_the_cost_decides(slides: tuple[Slide, ...], channels: int, batch: int, shifted: bool) -> None:
    given = gram(slides, channels=channels)
    store = fresh(given, batch)
    build(store, given)
    assert bool(called(store.steps, GRAM)) == shifted


def test_slices_of_the_batch_bring_the_function() -> None:
    """Under a memory limit the function stands beside the slices that call it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 4, 3), nn.MaxPool2d(6), nn.Flatten(), nn.LazyLinear(2)).double()
    x, y = torch.randn(64, 16, 20, 20).double(), torch.randint(2, (64,))
    model(x)
    free = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR()])
    tight = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR()], memory_limit=int(0.8 * free.peak_bytes))
    assert "def slice_" in tight.source and "def window_gram(" in tight.source
    results = [program(x, y)["kflr"]["0.weight"] for program in (free, tight)]
    for one, two in zip(*(factors.factors for factors in results), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


