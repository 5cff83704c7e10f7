"""Processor: what this one does otherwise than the one that the rates were measured on. A table, no timing.

Convolutions are oneDNN's, matmuls MKL's. On a processor that is not Intel's MKL uses AVX2: half of AVX-512, where its
units are as wide as that. Convolutions are then twice as fast relative to matmuls, and so is the matmul of oneDNN
(measured on AMD EPYC of the fourth and fifth generation: 2.0 to 2.3).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from ..program.cost import Kernel, Rates

TWICE = (Kernel.CONVOLUTION, Kernel.CHANNELS_LAST)
MKL_IS_SLOW = frozenset({"AuthenticAMD", "HygonGenuine"})
"""Vendors for whose processors MKL leaves half of AVX-512 unused."""
CPUINFO = Path("/proc/cpuinfo")


def of_processor(rates: Rates) -> Rates:
    """The rates, for float32, with faster convolutions and oneDNN's matmul where this processor has them."""
    if not has_onednn() or vendor() not in MKL_IS_SLOW:
        return rates
    flops = {**rates.flops, **{kernel: 2 * rates.flops[kernel] for kernel in TWICE}}
    return replace(rates, name=f"{rates.name} with fast convolutions", onednn=True, flops=flops)


def has_onednn() -> bool:
    """Whether torch can call oneDNN's matmul for float32, and the processor has AVX-512."""
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(fast and there and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@lru_cache(1)
def vendor() -> str:
    """Who made the processor; "" where the system does not say."""
    if not CPUINFO.exists():
        return ""
    lines = (line.partition(":") for line in CPUINFO.read_text(errors="replace").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")
