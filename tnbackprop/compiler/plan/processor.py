"""Processor: what this one does otherwise than the one that the rates were measured on.

Convolutions are oneDNN's, matmuls MKL's. On a processor that is not Intel's MKL uses AVX2: half of AVX-512, where its
units are as wide as that. Convolutions are then twice as fast beside matmuls, and so is oneDNN's matmul.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from ..program.cost import Kernel, Rates

SIZE, RUNS = 512, 7
"""Of the matrices that are multiplied to find out: about 15 ms in all, once in a process."""
CLEARLY = 1.5
"""Where the two differ, it is by a factor of two."""
TWICE = (Kernel.CONVOLUTION, Kernel.CHANNELS_LAST)


def of_processor(rates: Rates) -> Rates:
    """The rates, for float32, with faster convolutions and oneDNN's matmul where this processor has them."""
    if not has_onednn() or onednn_over_mm() < CLEARLY:
        return rates
    flops = {**rates.flops, **{kernel: 2 * rates.flops[kernel] for kernel in TWICE}}
    return replace(rates, name=f"{rates.name} with fast convolutions", onednn=True, flops=flops)


def has_onednn() -> bool:
    """Whether torch can call oneDNN's matmul for float32, and the processor has AVX-512."""
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(fast and there and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@lru_cache(1)
@torch.no_grad()
def onednn_over_mm() -> float:
    """How many times faster oneDNN's matmul is than torch.mm."""
    x = torch.ones(SIZE, SIZE, device="cpu", dtype=torch.float32)
    other = torch.ops.mkldnn._linear_pointwise
    return _seconds(lambda: torch.mm(x, x)) / _seconds(lambda: other(x, x, None, "none", [], ""))


def _seconds(call: Callable[[], object]) -> float:
    found = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
