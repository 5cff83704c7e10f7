"""Squares and factors in another dtype than the model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

QUANTITIES = (
    tn.Grad(), tn.BatchGrad(), tn.SqrtGGN(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance(),
    tn.DiagGGN(), tn.GGNTrace(), tn.HessianDiag(), tn.KFLR(), tn.KFAC(), tn.KFRA(),
)  # fmt: skip
LINEAR = ("grad", "batch_grad", "sqrt_ggn")


def dense() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5))
    return model, torch.randn(16, 6), torch.randint(5, (16,))


def image() -> tuple[nn.Module, Tensor, Tensor]:
    """With values that are looked up at chosen places."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4))
    return model, torch.randn(8, 1, 8, 8), torch.randint(4, (8,))


def words() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    return model, torch.randint(9, (8, 3)), torch.randint(3, (8,))


def classes() -> tuple[nn.Module, Tensor, Tensor]:
    """So many that columns are a loop."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 40))
    return model, torch.randn(64, 4), torch.randint(40, (64,))


def in_dtype(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    return copy.deepcopy(model).to(dtype), x.to(dtype) if x.is_floating_point() else x


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [each for each in value.factors if each is not None]


@pytest.mark.slow
@pytest.mark.parametrize("build", [dense, image, words, classes])
def test_values(build: Any) -> None:
    """A model in float32, squares in float64: as far from float64 as what was squared, and of its dtype."""
    torch.manual_seed(0)
    model, x, y = build()
    quantities = [q for q in QUANTITIES if build is not words or not isinstance(q, tn.KFRA)]
    program = tn.compile(model, F.cross_entropy, (x, y), quantities, accumulate=torch.float64, check=False)
    exact, wide = in_dtype(model, x, torch.float64)
    want, got = tn.compile(exact, F.cross_entropy, (wide, y), quantities)(wide, y, seed=0), program(x, y, seed=0)
    for quantity in quantities:
        for name, value in got[quantity.name].items():
            if isinstance(quantity, tn.KFAC):  # the draws are of another dtype
                assert all(each.dtype == torch.float64 for each in leaves(value))
                continue
            for one, other in zip(leaves(value), leaves(want[quantity.name][name]), strict=True):
                assert one.dtype == (torch.float32 if quantity.name in LINEAR else torch.float64), quantity.name
                torch.testing.assert_close(one.double(), other, rtol=2e-4, atol=1e-6)
    assert program.explain()


def test_small_squares_are_there() -> None:
    """Squares of gradients of 1e-5 are 0 in float16."""
    torch.manual_seed(0)
    model, x = in_dtype(nn.Linear(4, 3), torch.randn(8, 4), torch.float16)
    y = torch.randn(8, 3).half()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return 1e-4 * F.mse_loss(f, y)

    plain = tn.compile(model, loss, (x, y), [tn.SecondMoment()], check=False)(x, y)["second_moment"]["weight"]
    found = tn.compile(model, loss, (x, y), [tn.SecondMoment()], accumulate=torch.float32, check=False)(x, y)
    exact, wide = in_dtype(model, x, torch.float64)
    want = tn.compile(exact, loss, (wide, y.double()), [tn.SecondMoment()])(wide, y.double())
    assert not plain.any()
    got, right = found["second_moment"]["weight"].double(), want["second_moment"]["weight"]
    torch.testing.assert_close(got, right, rtol=2e-2, atol=0)


def test_the_factor_of_the_input_is_exact() -> None:
    """In bfloat16 it has two or three digits; of the same numbers in float32 it has all of them."""
    torch.manual_seed(0)
    model, x = in_dtype(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(32, 6), torch.bfloat16)
    y = torch.randint(3, (32,))
    right = x.double().T @ x.double() / 32
    for dtype, least, most in ((None, 5e-4, 1e-2), (torch.float32, 0, 1e-6)):
        program = tn.compile(model, F.cross_entropy, (x, y), [tn.KFLR()], accumulate=dtype)
        factors = program(x, y)["kflr"]["0.weight"]
        found = factors.as_matrix_factors()[1].double()
        assert least <= float((found - right).norm() / right.norm()) <= most


def test_slices_of_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(36, 30), nn.Linear(30, 5)
    )
    x, y = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    quantities = [tn.Grad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(centred=True)]
    options: dict[str, Any] = {"accumulate": torch.float64, "check": False}
    whole = tn.compile(model, F.cross_entropy, (x, y), quantities, **options)
    limit = 0.7 * whole.peak_bytes
    sliced = tn.compile(model, F.cross_entropy, (x, y), quantities, **options, memory_limit=limit)
    assert sliced.peak_bytes <= limit and "def slice_" in sliced.source
    want, got = whole(x, y), sliced(x, y)
    for quantity in quantities:
        for name, value in got[quantity.name].items():
            torch.testing.assert_close(value, want[quantity.name][name], rtol=1e-5, atol=1e-8)


def test_the_model_dtype_is_as_without() -> None:
    model, x, y = dense()
    plain, same = (tn.compile(model, F.cross_entropy, (x, y), [tn.BatchL2()], accumulate=d) for d in (None, x.dtype))
    assert plain.source == same.source


def test_halves_batches_and_compute() -> None:
    """What runs later runs in the same dtypes: halves, another batch size, results that are merged, `compute`."""
    torch.manual_seed(0)
    model, x, y = dense()
    options: dict[str, Any] = {"accumulate": torch.float64}
    program = tn.compile(model, F.cross_entropy, (x, y), [tn.Grad(), tn.SecondMoment()], **options)
    want = program(x, y)["second_moment"]
    _, saved = program.forward(x)
    merged = program(x[:10], y[:10]).merge(program(x[10:], y[10:]))
    computed = tn.compute(model, F.cross_entropy, (x, y), [tn.SecondMoment()], **options)
    for found in (program.backward(saved, y), merged, computed):
        for name, value in found["second_moment"].items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-9)
    first, second = tn.compile_many(model, F.cross_entropy, (x, y), [[tn.Grad()], [tn.BatchL2()]], **options)
    assert first(x, y)["grad"]["0.weight"].dtype == torch.float32
    assert second(x, y)["batch_l2"]["0.weight"].dtype == torch.float64


@pytest.mark.parametrize(
    ("accumulate", "quantity", "error", "message"),
    [
        ("float32", tn.BatchL2(), tn.InputError, "accumulate='float32' is no floating dtype: torch.float32"),
        (torch.int32, tn.BatchL2(), tn.InputError, "accumulate=torch.int32 is no floating dtype"),
        (torch.float64, tn.ClippedGrad(), tn.UnsupportedError, "accumulate=torch.float64 with clipped_grad: .*phases"),
    ],
)
def test_what_is_refused(accumulate: Any, quantity: tn.Quantity, error: type[Exception], message: str) -> None:
    model, x, y = dense()
    with pytest.raises(error, match=message):
        tn.compile(model, F.cross_entropy, (x, y), [quantity], accumulate=accumulate)


def test_the_peak_counts_their_bytes() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(64, 4), torch.randn(8, 64), torch.randn(8, 4)
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.KFLR()], accumulate=torch.float64, check=False)
    factors = {id(each): each for value in program(x, y)["kflr"].values() for each in leaves(value)}
    assert program.peak_bytes >= sum(each.nbytes for each in factors.values())
