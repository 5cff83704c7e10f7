"""Which torch operators an entry runs, how often and how long.

python -m benchmarks.profile_ops tnbackprop/second_moment [--problem 3c3d-32] [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from .contenders import CONTENDERS, Setting
from .models import PROBLEMS


@dataclass(frozen=True)
class Operator:
    """One operator on one tuple of input shapes. `milliseconds` is its own time, on the device it ran on."""

    name: str
    shapes: str
    count: int
    milliseconds: float


def operators(call: Callable[[], object], device: torch.device) -> list[Operator]:
    """The operators of one call (after one that warms up), slowest first."""
    call()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as trace:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    found = []
    for event in trace.key_averages(group_by_input_shape=True):
        if not event.key.startswith("aten::"):
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        shapes = "  ".join(str(shape) for shape in event.input_shapes if shape)
        found.append(Operator(event.key, shapes, event.count, own / 1e3))
    return sorted(found, key=lambda operator: -operator.milliseconds)


def main(argv: list[str] | None = None) -> int:
    entries = {
        entry: (contender, keys)
        for contender in CONTENDERS
        if contender.available
        for entry, keys in contender.rows().items()
    }
    parser = argparse.ArgumentParser(prog="benchmarks.profile_ops", description="List an entry's operators.")
    parser.add_argument("entry", choices=tuple(entries), metavar="contender/quantity")
    parser.add_argument("--problem", choices=tuple(PROBLEMS), default="3c3d-32")
    parser.add_argument("--batch", type=int, help="another batch size")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    problem, device = PROBLEMS[options.problem], torch.device(options.device)
    contender, keys = entries[options.entry]
    run = contender.build(Setting(problem, options.batch or problem.batch, device), keys)
    print(f"{'ms':>9} {'count':>6}  operator  input shapes")
    for operator in operators(run, device):
        print(f"{operator.milliseconds:9.3f} {operator.count:6d}  {operator.name}  {operator.shapes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
