"""First-order quantities against autograd's gradient and the neighbours, in turns in one process.

    python -m benchmarks.first_order [--device cuda] [--problem 3c3d-32] [--only 'tnbackprop|vmap'] [--rounds 30]

Every entry computes loss, output, gradient and its quantity, and is compared with the definition before
it is timed. Prints the tables; a whole run writes benchmarks/results/first_order_<device>.json and .png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .contenders import BASE, CONTENDERS, QUANTITIES, Contender, Outcome, Run, Setting, vmapped
from .models import PROBLEMS
from .report import tables, write
from .timing import MALLOC_ENVIRONMENT, peak_bytes, ratios, round_robin

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tnbackprop", "torch", "opt_einsum", "backpack-for-pytorch", "opacus")
TOLERANCE = 1e-3  # of the norm, float32: a wrong convention is far above; a nearly tied maximum moves single entries


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the peers' hooks, by design
    device = torch.device(options.device)
    if options.peak_of:
        return _print_peak(options, device)
    for contender in CONTENDERS:
        if not contender.available:
            print(f"left out: {contender.name} ({contender.needs} is not installed)")
    output = options.output or RESULTS / f"first_order_{device.type}.json"
    results: dict[str, Any] = {**machine(device, options), "problems": {}}
    for name in options.problem or list(PROBLEMS):
        batch = options.batch or PROBLEMS[name].batch
        results["problems"][name] = _time(Setting(PROBLEMS[name], batch, device), options)
        print(tables({name: results["problems"][name]}), flush=True)
    part = bool(options.only.pattern or options.batch or options.problem)
    return write(results, output, part and not options.output)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.first_order", description="Time the first-order quantities.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--problem", action="append", choices=tuple(PROBLEMS), help="repeat for several; default all")
    parser.add_argument("--only", default="", help="regular expression on entry names (contender/quantity)")
    parser.add_argument("--batch", type=int, help="another batch size, for a quick look")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory (on a CPU a process each)")
    parser.add_argument("--output", type=Path, help="another place for the JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        options.only = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r}: {error}")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def _entries(only: re.Pattern[str]) -> dict[str, tuple[Contender, tuple[str, ...]]]:
    """Entry name -> contender and quantities; the base is always there."""
    rows = {
        entry: (contender, keys)
        for contender in CONTENDERS
        if contender.available
        for entry, keys in contender.rows().items()
    }
    return {entry: row for entry, row in rows.items() if entry == BASE or only.search(entry)}


def _time(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    entries = _entries(options.only)
    truth = vmapped(setting, tuple(QUANTITIES))()
    runs: dict[str, Run] = {}
    for entry, (contender, keys) in entries.items():
        runs[entry] = contender.build(setting, keys)
        _check(entry, runs[entry](), truth, contender, setting.batch)
    del truth
    seconds = round_robin(runs, options.rounds, options.warmup, setting.device)
    found = ratios(seconds, BASE)
    peaks = {} if options.no_memory else {entry: _peak(entry, setting, options, runs) for entry in entries}
    rows = {
        entry: {"quantities": keys, **asdict(found[entry]), "peak_bytes": peaks.get(entry)}
        for entry, (_, keys) in entries.items()
    }
    return {"batch": setting.batch, "rounds": options.rounds, "entries": rows}


def _check(entry: str, mine: Outcome, truth: Outcome, contender: Contender, batch: int) -> None:
    """What is timed must be what is claimed.

    A variance is compared on the scale of the second moment: peers subtract two float32 sums (uncentred).
    """
    pairs = [("loss", mine.loss, truth.loss, truth.loss), ("output", mine.output, truth.output, truth.output)]
    for key, values in mine.values.items():
        scales = truth.values["second_moment" if key == "variance" else key]
        for name, value in values.items():
            scaled = contender.scale(key, value, batch)
            pairs.append((f"{key} of {name}", scaled, truth.values[key][name], scales[name]))
    for what, got, want, scale in pairs:
        if got.shape != want.shape:
            raise AssertionError(f"{entry}: {what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        error = float((got - want).norm() / scale.norm().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise AssertionError(f"{entry}: {what} is wrong by {error:.1e}")


def _peak(entry: str, setting: Setting, options: argparse.Namespace, runs: dict[str, Run]) -> int | None:
    if setting.device.type == "cuda":
        return peak_bytes(runs[entry], setting.device)
    command = [sys.executable, "-m", "benchmarks.first_order", "--peak-of", entry, "--problem", setting.problem.name]
    command += ["--batch", str(setting.batch), "--threads", str(options.threads)]
    environment = os.environ | MALLOC_ENVIRONMENT
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    peak: int | None = json.loads(run.stdout.splitlines()[-1])
    return peak


def _print_peak(options: argparse.Namespace, device: torch.device) -> int:
    contender, keys = _entries(options.only)[options.peak_of]
    setting = Setting(PROBLEMS[options.problem[0]], options.batch, device)
    print(json.dumps(peak_bytes(contender.build(setting, keys), device)))
    return 0


def machine(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {package: version(package) for package in PACKAGES}
    return {"device": name, "threads": options.threads, "python": platform.python_version(), "versions": versions}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
