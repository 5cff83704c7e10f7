"""Magnitudes in pieces: what the whole tensor has."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tnbackprop.compiler.running.magnitudes import PIECE, largest, largest_difference, sum_of_squares

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
SIZES = (0, 1, 7, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5)
NAN, INF = math.nan, math.inf


def some(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (10 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_of_the_whole(size: int, dtype: torch.dtype) -> None:
    a, b = some(size, dtype), some(size, dtype, 1)
    assert largest(a) == (float(a.double().abs().max()) if size else 0.0)
    assert largest_difference(a, b) == (float((a - b).double().abs().max()) if size else 0.0)
    assert sum_of_squares(a).dtype == torch.float64
    torch.testing.assert_close(sum_of_squares(a), a.double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("at", [0, PIECE, 2 * PIECE + 4])
@pytest.mark.parametrize("value, found", [(-1e30, 1e30), (1e30, 1e30), (INF, INF), (-INF, INF), (NAN, NAN)])
def test_one_value_anywhere(at: int, value: float, found: float) -> None:
    a, b = some(2 * PIECE + 5, torch.float64), some(2 * PIECE + 5, torch.float64, 1)
    a[at] = value
    for got in (largest(a), largest_difference(a, b), largest_difference(b, a)):
        assert got == found or (math.isnan(got) and math.isnan(found))


def test_two_infinities_have_no_difference() -> None:
    a = some(2 * PIECE, torch.float32)
    a[1] = INF
    assert math.isnan(largest_difference(a, a))


def test_squares_of_what_overflows_in_its_dtype() -> None:
    assert float(sum_of_squares(torch.full((2, 3), 1e30))) == pytest.approx(6e60)


def test_views_and_what_requires_grad() -> None:
    a = some(6, torch.float32).view(2, 3).T.requires_grad_()
    assert largest(a) == largest(a.detach().contiguous()) and largest_difference(a, a.detach().clone()) == 0
    assert not sum_of_squares(a).requires_grad
