"""Second-order quantities against autograd's gradient and the neighbours, in turns in one process.

    python -m benchmarks.second_order [--device cuda] [--problem 3c3d-32] [--only 'tnbackprop|kfac'] [--rounds 20]

Every entry computes loss, output, gradient and its quantity (curvlinops: its factors only), and is compared with
the definition before it is timed: exact quantities by value, sampled ones by their trace. Prints the tables and
the targets; a whole run writes benchmarks/results/second_order_<device>.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .contenders import BASE, HAS_BACKPACK, Outcome, Run, Setting, plain
from .curvature import (
    FIRST_ORDER,
    HAS_CURVLINOPS,
    KNOWN,
    SAMPLED,
    Definition,
    backpacked,
    curvlinops,
    define,
    facts,
    ours,
)
from .first_order import RESULTS, machine, version
from .models import PROBLEMS, Problem, net_3c3d, net_all_cnn_c
from .report import tables, write
from .timing import MALLOC_ENVIRONMENT, peak_bytes, ratios, round_robin

TOLERANCE = 2e-3  # relative to the largest entry, float32
STATISTICAL = 3.0  # the trace of a sampled quantity is that of the exact one up to this factor

Build = Callable[[Setting, tuple[str, ...]], Run]


def net_sigmoid() -> nn.Sequential:
    """3C3D with one sigmoid, before the last layer: from there on the Hessian is no GGN."""
    layers = list(net_3c3d())
    layers[-2] = nn.Sigmoid()
    return nn.Sequential(*layers)


MC = "mc"
SMALL = ("diag_ggn_mc", "kfac", "kflr", "diag_ggn", "ggn_trace", "sqrt_ggn_mc", "sqrt_ggn")
QUANTITIES = {"3c3d-32": SMALL, "3c3d-sigmoid-4": ("hessian_diag",), "allcnnc-16": ("diag_ggn", "kflr")}
SECOND_ORDER = {
    "3c3d-32": PROBLEMS["3c3d-32"],
    "3c3d-sigmoid-4": Problem("3c3d-sigmoid-4", net_sigmoid, 895_210, classes=10, batch=4),
    "allcnnc-16": Problem("allcnnc-16", net_all_cnn_c, 1_387_108, classes=100, batch=16),
}
LIMIT = {"allcnnc-16": "2GiB"}
TARGETS = {
    "3c3d-32": {"diag_ggn_mc": 1.8, "kfac": 2.5, "kflr": 5.8, "diag_ggn": 7.0, "sqrt_ggn": 20.0, MC: 4.0},
    "3c3d-sigmoid-4": {"hessian_diag": 30.0},
    "allcnnc-16": {},
}
"""Time over the plain gradient's, on two threads of a CPU."""


@dataclass(frozen=True)
class Entry:
    """One row of one contender. `positions` where it sums A over positions and takes the bias's GGN for B."""

    build: Build
    keys: tuple[str, ...]
    positions: bool = False


def entries(problem: str, only: re.Pattern[str]) -> dict[str, Entry]:
    """Entry name -> what to run; the base is always there. BackPACK is not asked where it runs out of memory."""
    wanted, mine = QUANTITIES[problem], ours(LIMIT.get(problem))
    rows = {BASE: Entry(plain, ())}
    rows |= {f"tnbackprop/{key}": Entry(mine, (key,)) for key in wanted if key in KNOWN}
    both = problem == "3c3d-32"
    if both and set(SAMPLED) <= set(KNOWN):
        rows[f"tnbackprop/{MC}"] = Entry(mine, (*FIRST_ORDER, *SAMPLED))
    if HAS_BACKPACK and problem != "allcnnc-16":
        rows |= {f"backpack/{key}": Entry(backpacked, (key,), True) for key in wanted if key != "ggn_trace"}
        if both:
            first = tuple(key for key in FIRST_ORDER if key != "batch_dot")
            rows[f"backpack/{MC}"] = Entry(backpacked, (*first, *SAMPLED), True)
    if HAS_CURVLINOPS and both:
        rows |= {f"curvlinops-no-gradient/{key}": Entry(curvlinops, (key,)) for key in ("kfac", "kflr")}
    return {name: row for name, row in rows.items() if name == BASE or only.search(name)}


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the peers' hooks, by design
    device = torch.device(options.device)
    if options.peak_of:
        return _print_peak(options, device)
    _left_out()
    results: dict[str, Any] = {**machine(device, options), "problems": {}}
    results["versions"]["curvlinops-for-pytorch"] = version("curvlinops-for-pytorch")
    for name in options.problem or list(SECOND_ORDER):
        batch = options.batch or SECOND_ORDER[name].batch
        results["problems"][name] = _time(Setting(SECOND_ORDER[name], batch, device), options)
        print(tables({name: results["problems"][name]}), flush=True)
        print(_verdicts(name, results["problems"][name]["entries"]), flush=True)
    part = bool(options.only.pattern or options.batch or options.problem)
    output = options.output or RESULTS / f"second_order_{device.type}.json"
    return write(results, output, part and not options.output)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.second_order", description="Time the second-order quantities.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--problem", action="append", choices=tuple(SECOND_ORDER), help="repeat for several")
    parser.add_argument("--only", default=re.compile(""), type=re.compile, help="regular expression on entry names")
    parser.add_argument("--batch", type=int, help="another batch size, for a quick look")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory (on a CPU a process each)")
    parser.add_argument("--output", type=Path, help="another place for the JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def _left_out() -> None:
    missing = {key for keys in QUANTITIES.values() for key in keys} - set(KNOWN)
    for key in sorted(missing):
        print(f"left out: tnbackprop/{key} (this version has no such quantity)")
    for name, present in (("backpack", HAS_BACKPACK), ("curvlinops", HAS_CURVLINOPS)):
        if not present:
            print(f"left out: {name} (not installed)")


def _time(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    rows = entries(setting.problem.name, options.only)
    definition = define(setting, tuple({key for row in rows.values() for key in row.keys}))
    base = plain(setting, ())()
    runs: dict[str, Run] = {}
    sizes: dict[str, int] = {}
    for name, row in rows.items():
        runs[name] = row.build(setting, row.keys)
        outcome = runs[name]()
        _check(name, row, outcome, base, definition)
        sizes[name] = _bytes(outcome)
        del outcome
    seconds = round_robin(runs, options.rounds, options.warmup, setting.device)
    found = ratios(seconds, BASE)
    peaks = {} if options.no_memory else {name: _peak(name, setting, options, runs) for name in rows}
    table = {
        name: {**asdict(found[name]), "quantities": row.keys, "peak_bytes": peaks.get(name), "own_bytes": sizes[name]}
        for name, row in rows.items()
    }
    return {"batch": setting.batch, "rounds": options.rounds, "entries": table}


def _check(name: str, row: Entry, mine: Outcome, base: Outcome, definition: Definition) -> None:
    """What is timed must be what is claimed."""
    pairs: list[tuple[str, Tensor, Tensor, bool]] = []
    if "grad" in mine.values:
        pairs += [("loss", mine.loss, base.loss, False), ("output", mine.output, base.output, False)]
        pairs += [(f"grad of {p}", g, base.values["grad"][p], False) for p, g in mine.values["grad"].items()]
    for key in set(row.keys) & set(definition.facts):
        for parameter, value in mine.values[key].items():
            got = facts(key, value, definition.probes[parameter])
            want = definition.facts[key][parameter]
            if row.positions and key in ("kflr", "kfac"):
                want = definition.convolutions[parameter]
                want = want if key == "kflr" else (want[0], *want[2:])
            for part, (left, right) in enumerate(zip(got, want, strict=True)):
                pairs.append((f"{key} of {parameter}", left, right, key in SAMPLED and part == 0))
    for what, got, want, sampled in pairs:
        if got.shape != want.shape:
            raise AssertionError(f"{name}: {what} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
        if sampled:
            if not 1 / STATISTICAL <= float(got / want) <= STATISTICAL:
                raise AssertionError(f"{name}: the trace of {what} is {float(got):.3g}, exact {float(want):.3g}")
            continue
        error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise AssertionError(f"{name}: {what} is wrong by {error:.1e}")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of one parameter's value: itself or its factors."""
    if isinstance(value, Tensor):
        return [value]
    return list(getattr(value, "factors", value))


def _bytes(outcome: Outcome) -> int:
    """What the results themselves take."""
    values = [v for by in outcome.values.values() for value in by.values() for v in _tensors(value)]
    return sum(v.numel() * v.element_size() for v in values)


def _peak(name: str, setting: Setting, options: argparse.Namespace, runs: dict[str, Run]) -> int | None:
    if setting.device.type == "cuda":
        return peak_bytes(runs[name], setting.device)
    command = [sys.executable, "-m", "benchmarks.second_order", "--peak-of", name, "--problem", setting.problem.name]
    command += ["--batch", str(setting.batch), "--threads", str(options.threads)]
    run = subprocess.run(command, env=os.environ | MALLOC_ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    peak: int | None = json.loads(run.stdout.splitlines()[-1])
    return peak


def _print_peak(options: argparse.Namespace, device: torch.device) -> int:
    (problem,) = options.problem
    row = entries(problem, options.only)[options.peak_of]
    setting = Setting(SECOND_ORDER[problem], options.batch, device)
    print(json.dumps(peak_bytes(row.build(setting, row.keys), device)))
    return 0


def _verdicts(problem: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Targets met or missed, and memory over the result's own bytes."""
    lines = []
    for key, target in TARGETS[problem].items():
        row = rows.get(f"tnbackprop/{key}")
        if row is not None:
            lines.append(f"{key}: {row['median']:.2f} of {target} {'met' if row['median'] <= target else 'MISSED'}")
    for name, row in rows.items():
        if row["peak_bytes"] is not None and name != BASE:
            peak, own = row["peak_bytes"] / 2**20, row["own_bytes"] / 2**20
            lines.append(f"{name}: peak {peak:.0f} MiB, its results {own:.0f} MiB, ratio {peak / own:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
