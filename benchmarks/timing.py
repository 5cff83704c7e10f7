"""Fair clocks: everything in one process, in turns, each round compared with itself; and memory high-water marks."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Quartiles of the per-round ratio to the base, and the median time."""

    median: float
    low: float
    high: float
    milliseconds: float


def round_robin(calls: Mapping[str, Call], rounds: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round. Every round runs each call once, starting one call further on."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            elapsed = _seconds(calls[name], device)
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, Ratio]:
    """Each call's times over the base's time in the same round."""
    found = {}
    for name, times in seconds.items():
        relative = [mine / other for mine, other in zip(times, seconds[base], strict=True)]
        low, median, high = statistics.quantiles(relative, n=4) if len(relative) > 1 else relative * 3
        found[name] = Ratio(median, low, high, 1e3 * statistics.median(times))
    return found


def _seconds(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result  # outside the clock, and before the next call allocates
    return elapsed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most bytes that the call held beyond what was held before it; None where the system does not tell.

    CPU: the resident set's high-water mark, so run it in a process of its own (with `MALLOC_ENVIRONMENT`). What an
    earlier call gave is held meanwhile: its memory is not there to be used again.
    """
    held = call()  # kernels, handles and autotuning are not the call's own
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        found: int | None = torch.cuda.max_memory_allocated(device) - before
    else:
        found = _resident_peak(call)
    del held
    return found


# Freed blocks go back to the system at once, so that the resident set is what is held.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}



def peak_in_process(module: str, model: str, entry: str) -> int | None:
    """The same in a process of its own, which prints it: ``python -m benchmarks.<module> --model … --peak-of …``."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--model", model, "--peak-of", entry]
    run = subprocess.run(command, env=os.environ | MALLOC_ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    peak: int | None = json.loads(run.stdout.splitlines()[-1])
    return peak


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _resident_peak(call: Call) -> int | None:
    if not _CLEAR.exists():
        return None
    _CLEAR.write_text("5")  # sets the high-water mark back to the present value
    before = _high_water()
    call()
    return _high_water() - before


def _high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise RuntimeError(f"{_STATUS} has no VmHWM line")
    return 1024 * int(found.group(1))
