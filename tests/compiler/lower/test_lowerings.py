"""Lowerings: every plan that any row offers computes what the diagram means, exactly, on small integers.

The choice between plans is scripted here, so that all combinations run and not only the cheapest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnbackprop.compiler.lower.contract import build
from tnbackprop.compiler.lower.receptive import receptive_fields
from tnbackprop.compiler.lower.table import LOWERINGS
from tnbackprop.compiler.program.cost import CPU, Kernel, Rates, Work, size_at
from tnbackprop.compiler.program.expr import Ref
from tnbackprop.compiler.program.store import Store
from tnbackprop.diagram.core import (
    BATCH,
    Delta,
    Diagram,
    Leg,
    Map,
    Operand,
    Product,
    Selection,
    Tensor,
    Window,
    argument,
    operand_tensors,
)
from tnbackprop.diagram.reference import evaluate

from ...diagram.random_diagrams import diagram, diagrams, letters, product
from ...programs import codes, run, shapes_of, store_of, with_given

Plan = Callable[[Store], Ref]
X, Y = argument(0), argument(1)
a, b, c, d, e, f = letters("abcdef")
n = BATCH
g = Leg("g", 4)
MOST_WAYS = 60


class Contrary(Rates):
    """What is expensive is chosen: the orientation of a product with the most copies, say."""

    def seconds(self, kernel: Kernel, work: Work, batch: int, itemsize: int) -> float:
        return -super().seconds(kernel, work, batch, itemsize)


CONTRARY = Contrary("contrary", CPU.flops, CPU.bandwidth, CPU.launch, CPU.fresh_bandwidth, CPU.fresh_threshold)


class Scripted(Store):
    """A store that takes plan `script[k]` at its k-th choice, and the first one after that."""

    def __init__(self, rates: Rates, batch: int, script: tuple[int, ...]) -> None:
        super().__init__(rates, batch, 8)
        self.script = script
        self.taken: list[tuple[int, int]] = []

    def cheapest(self, plans: Iterable[Plan], saved: object = None) -> Ref:
        offered = list(plans)
        k = self.script[len(self.taken)] if len(self.taken) < len(self.script) else 0
        self.taken.append((k, len(offered)))
        return offered[k](self)


def ways(diagram: Diagram, rates: Rates, batch: int) -> Iterator[tuple[Scripted, Ref]]:
    """The diagram built in every way that the choices allow."""
    pending: list[tuple[int, ...]] = [()]
    for _ in range(MOST_WAYS):
        if not pending:
            return
        store = Scripted(rates, batch, pending.pop())
        with_given(store, shapes_of(*(op for term in diagram.products for op in term.operands)))
        ref = build(store, diagram)
        done = tuple(k for k, _ in store.taken)
        for position in range(len(store.script), len(done)):
            pending += [(*done[:position], other) for other in range(1, store.taken[position][1])]
        yield store, ref


def check(given: Diagram, size: int = 3) -> set[str]:
    """All plans, made for 3 samples and run with `size`, agree with the reference; returns what they call."""
    values = tensors(given, size)
    numbers = {name: value.numpy() for name, value in values.items()}
    expected = torch.as_tensor(evaluate(given, numbers, size))
    called: set[str] = set()
    for rates in (CPU, CONTRARY):
        for store, ref in ways(given, rates, batch=3):
            lines = "\n".join(codes(store))
            found = run(store, ref, values, size)
            assert ref.order == given.legs
            exact = "vector_norm(" not in lines  # a square root is rounded
            same = torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-14, atol=0)
            assert same, f"{given}\n{lines}\n{found}\n{expected}"
            called |= {name for name in CALLS if name in lines}
    return called


def tensors(given: Diagram, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    found = {t.name: t for p in given.products for op in p.operands for t in operand_tensors(op)}
    values = {}
    for name, tensor in found.items():
        shape = [size_at(leg.size, size) for leg in tensor.legs]
        values[name] = torch.randint(-1 if name.startswith("I") else -3, 4, shape, generator=generator)
        if not name.startswith("I"):
            values[name] = values[name].double()
    return values


CALLS = (
    *(f"functional.conv{dims}d(" for dims in (1, 2, 3)),
    *(f"conv{dims}d_{kind}(" for dims in (1, 2, 3) for kind in ("weight", "input")),
    ".unfold(",
)


# ---------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Slide:
    """One spatial axis: image = stride·out + dilation·kernel - padding."""

    image: int
    out: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: int = 0


def convolution(kind: str, slides: tuple[Slide, ...], groups: int = 1, outer: int = 2, inner: int = 3) -> Diagram:
    """Forward, VJPs, and the weight VJP of each sample, with legs of size 1 left away as the compiler does."""
    images = tuple(Leg(f"i{k}", s.image) for k, s in enumerate(slides))
    outputs = tuple(Leg(f"p{k}", s.out) for k, s in enumerate(slides))
    kernels = tuple(Leg(f"k{k}", s.kernel) for k, s in enumerate(slides))
    g, o, i = Leg("g", groups), Leg("o", outer), Leg("c", inner)
    head = (g,) if groups > 1 else ()
    windows = tuple(
        Window(
            image,
            tuple((step, leg) for step, leg in ((s.stride, out), (s.dilation, kernel)) if leg.size != 1),
            -s.padding,
        )
        for s, image, out, kernel in zip(slides, images, outputs, kernels, strict=True)
    )
    outputs, kernels = (tuple(leg for leg in legs if leg.size != 1) for legs in (outputs, kernels))
    people = {
        "x": Tensor("x", (n, *head, i, *images)),
        "w": Tensor("w", (*head, o, i, *kernels)),
        "y": Tensor("y", (n, *head, o, *outputs)),
    }
    result = {"forward": "y", "input": "x", "weight": "w", "samples": "w"}[kind]
    legs = people.pop(result).legs
    legs = (n, *legs) if kind == "samples" else legs
    return Diagram(legs, (Product(sympy.Integer(1), (*people.values(), *windows)),))


KINDS = ("forward", "input", "weight", "samples")
SLIDES = {
    "plain": (Slide(6, 4, 3),),
    "same": (Slide(5, 5, 3, padding=1),),
    "same_even": (Slide(5, 5, 4, padding=1),),
    "stride_that_leaves_a_rest": (Slide(8, 3, 3, stride=2),),
    "dilation": (Slide(7, 3, 3, dilation=2),),
    "all_at_once": (Slide(9, 4, 3, stride=2, dilation=2, padding=1),),
    "stride_over_kernel": (Slide(9, 3, 2, stride=4),),
    "too_large_padding": (Slide(3, 9, 3, padding=4),),
    "only_padding": (Slide(2, 2, 2, padding=5),),
    "padding_left_only": (Slide(4, 4, 3, padding=2),),
    "padding_right_only": (Slide(4, 4, 3),),
    "cut_on_the_left": (Slide(6, 3, 2, padding=-2),),
    "cut_on_the_right": (Slide(9, 3, 2),),
    "kernel_of_one": (Slide(4, 4, 1),),
    "kernel_of_one_stride": (Slide(5, 3, 1, stride=2),),
    "one_position": (Slide(4, 1, 4),),
    "one_position_padded": (Slide(4, 1, 3, padding=1),),
    "image_of_one": (Slide(1, 3, 3, padding=2),),
    "large_kernel": (Slide(14, 2, 13),),
    "two": (Slide(5, 3, 3), Slide(4, 4, 3, padding=1)),
    "two_mixed": (Slide(6, 3, 3, 2, 1, 1), Slide(7, 2, 2, 2, 3, 0)),
    "two_asymmetric": (Slide(4, 4, 2, padding=1), Slide(4, 4, 4, padding=2)),
    "two_too_large_padding": (Slide(3, 9, 3, padding=4), Slide(4, 4, 3, padding=1)),
    "two_one_of_kernel_one": (Slide(3, 3, 1), Slide(5, 3, 3)),
    "three": (Slide(3, 2, 2), Slide(3, 3, 3, padding=1), Slide(4, 2, 2, stride=2)),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("slides", SLIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions(kind: str, slides: str, groups: int) -> None:
    check(convolution(kind, SLIDES[slides], groups))


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_for_another_batch(kind: str) -> None:
    """Planned for 3 samples, run for 1 and 5."""
    for size in (1, 5):
        check(convolution(kind, SLIDES["two_mixed"], 2), size)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("forward", "functional.conv2d("),
        ("input", "conv2d_input("),
        ("input", "functional.conv2d("),  # with the flipped kernel
        ("weight", "conv2d_weight("),
        ("samples", "conv2d_weight("),
    ],
)
def test_native_convolutions_are_offered(kind: str, function: str) -> None:
    called = check(convolution(kind, SLIDES["two"]))
    assert function in str(called)
    assert (".unfold(" in called) or kind == "input"


sizes = st.integers(1, 5)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(KINDS),
    st.lists(
        st.builds(Slide, sizes, sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(-2, 4)),
        min_size=1,
        max_size=2,
    ),
    st.integers(1, 2),
)
def test_random_convolutions(kind: str, slides: list[Slide], groups: int) -> None:
    check(convolution(kind, tuple(slides), groups))


# ---------------------------------------------------------------- everything else


def t(name: str, *legs: Leg) -> Tensor:
    return Tensor(name, legs)


def one(legs: str, *operands: Operand, scale: object = 1) -> Diagram:
    return diagram(legs, product(*operands, scale=scale))


SIX = Leg("i", 6)
SIXTH = Window(SIX, ((2, d), (1, c))), Window(SIX, ((2, b), (1, a)))  # one leg that two windows count

DIAGRAMS = {
    "scalar": one("", t("x"), scale="3/4"),
    "constant": one("", scale=5),
    "constant_along_legs": one("an", scale=2),
    "zero": diagram("ab"),
    "copy": one("ab", t("x", a, b)),
    "transpose": one("ba", t("x", a, b)),
    "sum_inner": one("a", t("x", a, b)),
    "sum_outer": one("b", t("x", a, b)),
    "sum_middle": one("ad", t("x", a, n, d)),
    "sum_all": one("", t("x", n, a, b)),
    "sum_two_apart": one("b", t("x", a, b, c)),
    "diagonal": one("a", t("x", a, a)),
    "trace": one("", t("x", b, b)),
    "diagonal_of_three": one("a", t("x", a, a, a)),
    "two_diagonals": one("ab", t("x", a, b, a, b)),
    "diagonal_in_a_product": one("b", t("x", a, b, a), t("y", a)),
    "norm": one("", Map(X**2, (t("x", a, b),))),
    "norm_per_sample": one("n", Map(X**2, (t("x", n, a, b),))),
    "norm_outer": one("b", Map(X**2, (t("x", n, a, b),))),
    "norm_middle": one("nb", Map(X**2, (t("x", n, a, b),))),
    "norm_of_one": one("a", Map(X**2, (t("x", a),))),
    "norm_of_a_diagonal": one("", Map(X**2, (t("x", a, a),))),
    "norm_of_a_diagonal_kept": one("b", Map(X**2, (t("x", a, b, a),))),
    "norm_scaled": one("n", Map(X**2, (t("x", n, a),)), scale="1/4"),
    "square_times": one("a", Map(X**2, (t("x", a, b),)), t("y", b)),
    "map_of_two": one("ab", Map(X * Y + 1, (t("x", a), t("y", b)))),
    "map_of_two_turned": one("b", Map(X**2 * Y - 1, (t("x", b, a), t("y", a, b)))),
    "map_summed": one("", Map(X + Y, (t("x", a), t("y", b)))),
    "dot": one("", t("x", a), t("y", a)),
    "dot_of_matrices": one("", t("x", a, b), t("y", b, a)),
    "dot_per_sample": one("n", t("x", n, a, b), t("y", n, b, a)),
    "outer": one("ab", t("x", a), t("y", b)),
    "outer_turned": one("bac", t("x", a, c), t("y", b)),
    "outer_per_sample": one("nab", t("x", n, a), t("y", n, b)),
    "matrix_vector": one("a", t("x", a, b), t("y", b)),
    "vector_matrix": one("b", t("x", a), t("y", a, b)),
    "matrices": one("ac", t("x", a, b), t("y", b, c)),
    "matrices_turned": one("ca", t("x", b, a), t("y", c, b)),
    "batched": one("nac", t("x", n, a, b), t("y", n, b, c)),
    "batched_vector": one("na", t("x", n, a, b), t("y", n, b)),
    "batched_turned": one("cna", t("x", a, n, b), t("y", b, c, n)),
    "matrices_of_merged_legs": one("ncad", t("x", n, a, b, f), t("y", f, c, b, d)),
    "hyperedge": one("n", t("x", n, a), t("y", n, a), t("z", n, a)),
    "hyperedge_kept": one("ab", t("x", a, n), t("y", b, n), t("z", n)),
    "gram": diagram("n", product(t("x", n, a, b), t("x", n, c, b), t("g", n, a, f), t("g", n, c, f))),
    "ring": one("", t("x", a, b), t("y", b, c), t("z", c, d), t("w", d, a)),
    "chain_kept": one("af", t("x", a, b), t("y", b, c), t("z", c, d), t("w", d, f)),
    "broadcast": one("nab", t("x", a)),
    "broadcast_middle": one("anb", t("x", b, a)),
    "private_legs_of_both": one("a", t("x", a, b), t("y", a, d)),
    "size_one": one("ae", t("x", e, a)),
    "size_one_summed": one("a", t("x", e, a), t("y", e)),
    "size_one_batched": one("nea", t("x", n, e, b), t("y", b, a, e)),
    "delta_of_output_legs": one("ac", Delta((a, c))),
    "delta_of_output_legs_weighted": one("ac", Delta((a, c)), t("x", a)),
    "window_alone": one("fb", Window(f, ((1, b),), -1)),
    "window_summed_pattern": one("b", Window(f, ((1, b), (2, a)), -1)),
    "window_of_two_tensors": one("b", Window(f, ((1, b),), -1), t("x", f), t("y", f)),
    "window_without_terms": one("a", Window(f, (), 2), t("x", f, a)),
    "window_outside": one("a", Window(f, (), 7), t("x", f, a)),
    "window_three_terms": one("ab", Window(f, ((1, a), (1, b), (2, c)), -2), t("x", f), t("y", c)),
    "window_image_kept": one("fb", Window(f, ((1, b), (1, a))), t("x", f, a)),
    "windows_of_one_image": one("bd", Window(f, ((1, b), (1, a))), Window(f, ((1, d), (1, c))), t("x", f, n)),
    "windows_that_slide_together": one(
        "ca", Window(f, ((1, b), (1, a))), t("x", f, n), Window(g, ((1, b), (1, c))), t("x", g, n)
    ),
    "selection": one("na", Selection(t("I", n), (a,)), t("x", n)),
    "selection_of_two": one("nac", Selection(t("I", n), (a, c)), t("x", n)),
    "selection_summed": one("n", Selection(t("I", n), (a, c)), t("x", n, a, c)),
    "selection_turned": one("nc", Selection(t("I", n, c), (a,)), t("x", a)),
    "selection_counts": one("a", Selection(t("I", n), (a,))),
    "digits_of_a_pattern": one("nac", Window(f, ((2, a), (1, c))), Window(f, ((1, b),), 1), t("x", n, b)),
    "digits_of_a_selection": one("nac", Window(f, ((2, a), (1, c))), Selection(t("I", b), (f,)), t("x", n, b)),
    "digits_of_digits": one("nba", *SIXTH, t("x", n, c), t("y", d, e)),
    "digits_of_digits_summed": one("n", *SIXTH, t("x", n, c), t("y", d), t("z", b, n)),
    "digits_that_one_operand_has": one("nb", *SIXTH, t("x", n, c)),
    "digits_with_their_leg": one("nac", Window(f, ((2, a), (1, c))), Window(f, ((1, b),)), t("x", n, b), t("y", f, a)),
    "digits_of_a_kept_leg": one("nf", Window(f, ((2, a), (1, c))), t("x", n, a, c)),
    "sum_of_terms": diagram("ab", product(t("x", a, b), scale=2), product(t("y", b, a)), product(t("z", a))),
    "sum_with_constant": diagram("nb", product(t("x", b, n), scale="1/2"), product(scale=3)),
    "sum_of_contractions": diagram("ac", product(t("x", a, b), t("y", b, c)), product(t("z", c, a), scale=-1)),
}  # fmt: skip


@pytest.mark.parametrize("what", DIAGRAMS)
def test_diagrams(what: str) -> None:
    for size in (3, 1):
        check(DIAGRAMS[what], size)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(diagrams(most=3, depth=1))
def test_random_diagrams(given: Diagram) -> None:
    check(given)


def test_every_row_is_used() -> None:
    """Each lowering offers a plan for some diagram above; tiles (test_tiles.py) only in loops over columns.

    What is pooled, with columns: test_receptive.py.
    """
    terms = [(d.legs, p) for d in DIAGRAMS.values() for p in d.products]
    conv = convolution("forward", SLIDES["two"])
    terms.append((conv.legs, conv.products[0]))
    for row in (row for row in LOWERINGS if row is not receptive_fields):
        store = Store(CPU, 3, 8)
        assert any(row(store, term, tuple(leg for leg in legs if leg in term.legs)) for legs, term in terms), row


def test_equal_diagrams_are_built_once() -> None:
    first, second = one("ac", t("x", a, b), t("y", b, c)), one("ca", t("y", d, a), t("x", c, d))
    store = store_of({"x": (2, 3), "y": (3, 2)})
    build(store, first)
    count = len(store.steps)
    ref = build(store, second)
    assert len(store.steps) == count or ref.stored != ref.order
