"""Torch code on a few samples at a time: values, memory, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..cases import CASES
from .test_operands import LAYERS, run, unscaled

BY_NAME = {case.name: case for case in CASES}


def histogram(G: Tensor) -> Tensor:
    return torch.histc(G.flatten(), 12, -1, 1)


def largest(G: Tensor) -> Tensor:
    return G.reshape(G.shape[0], -1).abs().topk(1, 1).values


def mean(G: Tensor) -> Tensor:
    return (G / G.shape[-1]).flatten(1).sum().reshape(1)


def positive(G: Tensor) -> Tensor:
    return (torch.tensor(0.0, dtype=G.dtype) < G).sum(0).to(G.dtype)


@dataclass(frozen=True)
class Streamed(tn.Quantity):
    """Torch code on ∇ℓ_n."""

    name: str = "streamed"
    function: Callable[[Any], Any] = histogram
    rows: bool = False

    def __post_init__(self) -> None:
        """A function is no option of a quantity."""

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Stream:
        return tn.Stream((J.T @ g) / g.scale, self.function, self.rows)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_streams(name: str) -> None:
    problem = BY_NAME[name].build()
    rows = Streamed("largest", largest, rows=True)
    quantities = [Streamed(), rows, Streamed("positive", positive), tn.Total(Streamed())]
    result, G = run(problem, quantities), unscaled(problem)
    for n, own in G.items():
        torch.testing.assert_close(result["streamed"][n], histogram(own))
        torch.testing.assert_close(result["largest"][n], largest(own))
        torch.testing.assert_close(result["positive"][n], positive(own))
    torch.testing.assert_close(result["streamed_total"]["all"], sum(histogram(own) for own in G.values()))


def test_never_all_at_once() -> None:
    """The individual gradients of 64 samples would take 64 times the memory of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 2))
    x, y = torch.randn(64, 600), torch.randn(64, 2)
    program = tn.compile(model, nn.MSELoss(), (x, y), [Streamed()])
    whole = 64 * 4 * 600 * 600
    assert program.peak_bytes < whole / 2
    G = tn.compute(model, nn.MSELoss(), (x, y), [tn.BatchGrad(scale=tn.Scale.UNSCALED)])["batch_grad"]
    for size in (64, 5):
        result = program(x[:size], y[:size])["streamed"]
        own = G if size == 64 else tn.compute(
            model, nn.MSELoss(), (x[:size], y[:size]), [tn.BatchGrad(scale=tn.Scale.UNSCALED)]
        )["batch_grad"]  # fmt: skip
        for n, value in result.items():
            assert (value - histogram(own[n])).abs().sum() <= 1e-3 * value.sum()  # on the border of a bin


@pytest.mark.thinned(3)
@pytest.mark.parametrize("size", [7, 11, 13])
def test_an_axis_of_any_size_is_no_axis_of_samples(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, 2), nn.Tanh(), nn.Linear(2, size)).double()
    x, y = torch.randn(5, size).double(), torch.randint(size, (5,))
    result = tn.compute(
        model, nn.CrossEntropyLoss(), (x, y),
        [Streamed(), Streamed("mean", mean), tn.BatchGrad(scale=tn.Scale.UNSCALED)],
    )  # fmt: skip
    for n, own in result["batch_grad"].items():
        torch.testing.assert_close(result["mean"][n], mean(own))
        torch.testing.assert_close(result["streamed"][n], histogram(own))


@dataclass(frozen=True)
class OfNorms(Streamed):
    """Of what has no legs of the parameter."""

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Stream:
        return tn.Stream(((J.T @ g) ** 2).sum_parameter(), self.function, self.rows)


@dataclass(frozen=True)
class TurnedRound(Streamed):
    """Its diagram has the samples last."""

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Stream:
        G = (J.T @ g) / g.scale
        return tn.Stream(G.ordered(*(leg.name for leg in (*J.legs, *G.legs[:1]))), self.function, self.rows)


def test_slices_have_the_samples_in_front() -> None:
    problem = BY_NAME["mlp_sum"].build()
    result = run(problem, [TurnedRound("turned", mean), Streamed("plain", mean)])
    for name, value in result["plain"].items():
        torch.testing.assert_close(result["turned"][name], value)


REFUSED = {
    "legs": (OfNorms(), tn.InputError, r"its stream is of \[n\], and slices are of \[n, "),
    "in place": (Streamed(function=lambda G: G.mul_(2).sum()), tn.UnsupportedError, "writes over what it is given"),
    "one sample": (
        Streamed(function=lambda G: G.sum() * (2 if G.shape[0] == 1 else 1)),
        tn.UnsupportedError, "does something else for one sample",
    ),
    "random": (
        Streamed(function=lambda G: (G * torch.rand_like(G)).sum()),
        tn.UnsupportedError, "the stream of .* draws random numbers",
    ),
    "branch": (Streamed(function=lambda G: G.sum() if G.sum() > 0 else -G.sum()), tn.UnsupportedError, "depends on"),
    "fails": (Streamed(function=lambda G: G @ torch.ones(99)), tn.InputError, "the stream of .* fails"),
    "no tensor": (Streamed(function=lambda G: {"a": G.sum()}), tn.InputError, "makes dict, not a tensor"),
    "rows": (Streamed(function=largest), tn.InputError, r"makes \[N, 1\]: a row for each sample goes with rows=True"),
    "no rows": (Streamed(rows=True), tn.InputError, r"makes \[12\]: a row for each sample"),
    "total": (tn.Total(Streamed(function=positive)), tn.UnsupportedError, "streamed_total of parameter .* no total"),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_stream(name: str) -> None:
    quantity, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        run(BY_NAME["mlp_sum"].build(), [quantity])


@dataclass(frozen=True)
class Pairs(tn.Quantity):
    """Pairs samples."""

    name: str = "pairs"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Stream:
        G = J.T @ g
        return tn.Stream((G * G.relabel(n="m")).sum("m"), histogram)


def test_samples_that_meet_are_no_stream() -> None:
    with pytest.raises(tn.UnsupportedError, match="a stream is cut along the samples, and this diagram pairs them"):
        run(BY_NAME["linear"].build(), [Pairs()])


@dataclass(frozen=True)
class Plain(Streamed):
    """Torch code on (1/N) ∇ℓ_n for a loss that averages."""

    name: str = "plain"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Stream:
        return tn.Stream(J.T @ g, self.function, self.rows)


@pytest.mark.slow
def test_batches_join() -> None:
    """Sums over samples add up, rows are put one after the other; of what depends on N nobody knows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 3).double(), torch.randint(3, (7,))
    norm = Streamed("norm", lambda G: G.square().sum())
    large = Streamed("large", lambda G: (G.abs() > 0.1).sum(0))
    quantities = [Streamed(), Streamed("largest", largest, rows=True), norm, large, tn.Total(Streamed())]
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        program = tn.compile(model, loss, (x, y), quantities)
        whole, found = program(x, y), tn.over(program, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])])
        for q in whole:
            for n, value in whole[q].items():
                torch.testing.assert_close(found[q][n], value)
    result = tn.compute(model, nn.CrossEntropyLoss(), (x, y), [Plain()])
    with pytest.raises(tn.InputError, match=r"(?s)'plain' of '2.weight' cannot be merged.*J.T @ g\) / g.scale"):
        result.merge(result)
    weighted = nn.CrossEntropyLoss(weight=torch.rand(3).double())
    one, two = (tn.compute(model, weighted, (x[own], y[own]), [Streamed()]) for own in (slice(0, 3), slice(3, 7)))
    with pytest.raises(tn.InputError, match=r"(?s)'streamed' of .* cannot be merged.*Compile with a loss that sums"):
        one.merge(two)


def test_explained() -> None:
    program = BY_NAME["mlp_sum"].build()
    program = tn.compile(program.model, program.loss, (program.x, program.y), [Streamed(), tn.Total(Streamed())])
    text = program.explain()
    assert "torch code on slices of it, a few samples at a time" in text and "streamed_total" in text


def test_traced_once() -> None:
    """For each shape of a parameter, whatever widths and batch sizes are planned for."""
    calls: list[int] = []

    def counted(G: Tensor) -> Tensor:
        calls.append(1)
        return histogram(G)

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]).double()
    x, y = torch.randn(4, 6).double(), torch.randint(6, (4,))
    quantities = [Streamed(function=counted), tn.DiagGGN()]
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities, check=False)
    traced = len(calls)
    assert traced <= 2 * 2  # a weight and a bias; torch may call it twice
    assert program.source_for(512) != program.source and len(calls) == traced
