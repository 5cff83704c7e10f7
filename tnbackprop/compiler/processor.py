"""Processor: what this one does otherwise than the one that the rates were measured on. A table, no timing.

Convolutions are oneDNN's, matmuls MKL's. On a processor that is not Intel's MKL uses AVX2: half of AVX-512, where its
units are as wide as that. Convolutions are then twice as fast beside matmuls, and so is oneDNN's matmul (measured: 2.0
to 2.3 times MKL's on AMD EPYC of the fifth generation, 1.07 on the fourth, whose units are half as wide).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from .program.cost import Kernel, Rates

TWICE = (Kernel.CONVOLUTION, Kernel.CHANNELS_LAST)
MKL_IS_SLOW = frozenset({("AuthenticAMD", 26)})
"""Vendors and families of processors where MKL leaves half of AVX-512 unused."""
CPUINFO = Path("/proc/cpuinfo")


def of_processor(rates: Rates) -> Rates:
    """The rates, for float32, with faster convolutions and oneDNN's matmul where this processor has them."""
    if not has_onednn() or made() not in MKL_IS_SLOW:
        return rates
    flops = {**rates.flops, **{kernel: 2 * rates.flops[kernel] for kernel in TWICE}}
    return replace(rates, name=f"{rates.name} with fast convolutions", onednn=True, flops=flops)


def has_onednn() -> bool:
    """Whether torch can call oneDNN's matmul for float32, and the processor has AVX-512."""
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(fast and there and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


@lru_cache(1)
def made() -> tuple[str, int]:
    """The vendor and the family of the processor; ("", 0) where the system does not say."""
    if not CPUINFO.exists():
        return "", 0
    lines = (line.partition(":") for line in reversed(CPUINFO.read_text(errors="replace").splitlines()))
    found = {name.strip(): value.strip() for name, _, value in lines}
    family = found.get("cpu family", "")
    return found.get("vendor_id", ""), int(family) if family.isdigit() else 0
