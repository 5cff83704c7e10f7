"""What a step costs: FLOPs and bytes as polynomials in leg sizes, and seconds on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import sympy

from ...diagram.core import Leg, N, Size, V

Terms = tuple[tuple[int, tuple[Leg, ...]], ...]
"""A polynomial: Σ coefficient · Π sizes."""


@dataclass(frozen=True)
class Work:
    """FLOPs and elements moved by one step; `fresh` are the elements that it newly allocates.

    inside     elements that it takes next to its result while it runs
    launches   kernels that it starts
    each       what it does in every round, where it is no kernel
    turns      how many rounds there are; None: one for each sample, of that sample alone
    """

    flops: Terms = ()
    moved: Terms = ()
    fresh: Terms = ()
    inside: Terms = ()
    launches: int = 1
    each: tuple[tuple[Kernel, Work], ...] = ()
    turns: int | None = None


class Kernel(Enum):
    """The kinds of kernel that the rates tell apart."""

    VIEW = "view"
    ELEMENTWISE = "elementwise"
    REDUCE = "reduce"
    COPY = "copy"
    MM = "mm"
    BMM = "bmm"
    CONVOLUTION = "convolution"
    CHANNELS_LAST = "convolution with the channels last"
    GROUPED = "grouped convolution"
    GENERAL = "einsum"
    NATIVE = "native"
    SLICED = "sliced batch"
    TILED = "tiles of the batch"
    SHIFTED = "shifted windows"
    RECEPTIVE = "receptive fields"
    PER_SAMPLE = "sample by sample"
    ROUNDS = "rounds of columns"


IN_TURN = frozenset({Kernel.SHIFTED, Kernel.CHANNELS_LAST, Kernel.RECEPTIVE})
"""Kernels that multiply, and copy or add before or after it: neither hides the other."""


@dataclass(frozen=True)
class Rates:
    """A device: FLOP/s per kernel kind, bytes/s, seconds per launch, bytes/s into memory never touched before."""

    name: str
    flops: Mapping[Kernel, float]
    bandwidth: float
    launch: float
    fresh_bandwidth: float
    fresh_threshold: float  # allocations below this are served from memory already mapped
    copy_factor: float = 1.0  # a permuting copy takes (factor + run / length of its inner run) times its bytes
    copy_run: float = 0.0
    rows: int = 32  # samples times columns that are propagated together
    narrow: int = 0  # a matmul with fewer columns is `narrow_factor` times slower than the transposed one
    narrow_factor: float = 1.0
    odd: int = 1  # a batched matmul with an odd number of columns is faster with this multiple of them
    tile: float = 1e15  # bytes of a value that stay in the cache while the next step reads them
    symmetric: int = 0  # a product of a value with itself of at least so many rows is made in panels; 0: none is
    onednn: bool = False  # whether there is oneDNN's matmul for float32, and faster than torch.mm may be

    def seconds(self, kernel: Kernel, work: Work, batch: int, itemsize: int) -> float:
        """max(FLOPs/rate, bytes/bandwidth) + launches + the price of fresh pages."""
        if work.each:
            turns, samples = (batch, 1) if work.turns is None else (work.turns, batch)
            return turns * sum(self.seconds(inner, own, samples, itemsize) for inner, own in work.each)
        if kernel in (Kernel.VIEW, Kernel.ROUNDS):
            return 0.0
        compute = number(work.flops, batch) / self.flops.get(kernel, self.flops[Kernel.GENERAL])
        traffic = number(work.moved, batch) * itemsize / self.bandwidth
        fresh = number(work.fresh, batch) * itemsize
        pages = fresh / self.fresh_bandwidth if fresh > self.fresh_threshold else 0.0
        busy = compute + traffic if kernel in IN_TURN else max(compute, traffic)
        return busy + self.launch * work.launches + pages


# Two threads of a server CPU, float32; measured, see benchmarks/first_order.py. Only the ratios matter.
CPU = Rates(
    "cpu",
    {
        Kernel.ELEMENTWISE: 16e9,
        Kernel.REDUCE: 16e9,
        Kernel.COPY: 8e9,
        Kernel.MM: 140e9,
        Kernel.BMM: 120e9,
        Kernel.CONVOLUTION: 140e9,
        Kernel.CHANNELS_LAST: 170e9,
        Kernel.GROUPED: 60e9,
        Kernel.GENERAL: 40e9,
        Kernel.NATIVE: 20e9,
        Kernel.SLICED: 60e9,
        Kernel.TILED: 100e9,
        Kernel.SHIFTED: 120e9,
        Kernel.RECEPTIVE: 125e9,
    },
    bandwidth=24e9,
    launch=4e-6,
    fresh_bandwidth=3e9,
    fresh_threshold=32e6,
    copy_factor=0.15,
    copy_run=15.0,
    narrow=16,
    narrow_factor=2.5,
    odd=16,
    tile=4e6,
    symmetric=512,
)
# One server GPU, float32 without tensor cores; measured on an H200 at the sizes of 3C3D.
CUDA = Rates(
    "cuda",
    {
        Kernel.ELEMENTWISE: 10e12,
        Kernel.REDUCE: 10e12,
        Kernel.COPY: 10e12,
        Kernel.MM: 45e12,
        Kernel.BMM: 20e12,
        Kernel.CONVOLUTION: 15e12,
        Kernel.CHANNELS_LAST: 15e12,
        Kernel.GROUPED: 2.5e12,
        Kernel.GENERAL: 15e12,
        Kernel.NATIVE: 10e12,
        Kernel.SLICED: 10e12,
        Kernel.TILED: 10e12,
        Kernel.SHIFTED: 20e12,
        Kernel.RECEPTIVE: 10e12,
    },
    bandwidth=3.5e12,
    launch=10e-6,
    fresh_bandwidth=3.5e12,
    fresh_threshold=1e15,
    copy_factor=2.0,
    rows=4096,
)
RATES = {"cpu": CPU, "cuda": CUDA}


COLUMNS = 8
"""What V is taken to be."""


def size_at(size: Size, batch: int) -> int:
    """The size as a number at this batch size."""
    return size if isinstance(size, int) else _value(size, batch)


@lru_cache(4096)
def _value(size: sympy.Expr, batch: int) -> int:
    return int(size.xreplace({N: batch, V: COLUMNS}))


def bytes_of(shape: Sequence[Size], batch: int, itemsize: int) -> float:
    """What a value of this shape takes."""
    return float(itemsize) * math.prod(size_at(size, batch) for size in shape)


@lru_cache(2**14)
def number(terms: Terms, batch: int) -> float:
    """The polynomial as a number at this batch size."""
    total = 0.0
    for coefficient, legs in terms:
        value = float(coefficient)
        for leg in legs:
            value *= size_at(leg.size, batch)
        total += value
    return total


def polynomial(terms: Terms) -> sympy.Expr:
    """The polynomial in symbols that are the leg names (N for the batch leg); legs of size 1 drop out."""
    return sympy.Add(
        *(sympy.Mul(c, *(_symbol(leg) for leg in legs if leg.size != 1)) for c, legs in terms),
    )


def _symbol(leg: Leg) -> sympy.Symbol:
    return leg.size if leg.size in (N, V) else sympy.Symbol(leg.name.rstrip("'"), integer=True, positive=True)
