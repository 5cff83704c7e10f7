"""Models of today: each quantity with its gradient, as multiples of autograd's gradient, in turns in one process.

    python -m benchmarks.modern [--large] [--model GPT] [--only 'kfac|grad'] [--rounds 20] [--device cuda]

Every entry computes the loss, the gradient and its quantity; `kfac_alone` the loss and the factors. `vmap` is
`torch.func.vmap(grad_and_value(…))`; where it fails its row is empty. Peak memory is measured with `--large` alone, on
a CPU in a process for each entry: it is what an entry holds beyond the model and the batch, its results included. A
whole run writes benchmarks/results/modern_<device>.json, or large_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

import tnbackprop as tn

from .first_order import RESULTS, machine
from .modern_models import LARGE, MODERN, Modern
from .report import tables, write
from .timing import Call, peak_bytes, peak_in_process, ratios, round_robin

BASE = "autograd/grad"
QUANTITIES: Mapping[str, Callable[[], tn.Quantity]] = {
    "grad": tn.Grad,
    "batch_l2": tn.BatchL2,
    "second_moment": tn.SecondMoment,
    "batch_grad": tn.BatchGrad,
    "kfac": tn.KFAC,
    "diag_ggn_mc": tn.DiagGGNMC,
}
ALONE: Mapping[str, Callable[[], tn.Quantity]] = {"kfac_alone": tn.KFAC}
"""Without the gradient."""
Parameters = dict[str, Tensor]


def individual(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Callable[[], Parameters]:
    """Gradients of each sample by vmap."""

    def one(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    each = vmap(grad_and_value(one), (None, 0, 0))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return lambda: each(parameters, x, y)[0]  # type: ignore[no-any-return]


def by_vmap(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> dict[str, Call]:
    """With the gradient, as ours; nothing where vmap fails."""
    each, count = individual(model, loss, x, y), len(x)
    try:
        each()
    except (RuntimeError, ValueError) as error:
        print(f"vmap: {str(error).splitlines()[0]}")
        return {}

    def batch_grad() -> object:
        found = {name: g / count for name, g in each().items()}
        return found, {name: g.sum(0) for name, g in found.items()}

    def batch_l2() -> object:
        found = each()
        squares = {name: g.flatten(1).square().sum(1) / count**2 for name, g in found.items()}
        return squares, {name: g.mean(0) for name, g in found.items()}

    def second_moment() -> object:
        found = each()
        return {name: (g.square().sum(0), g.mean(0)) for name, g in found.items()}

    return {"vmap/batch_grad": batch_grad, "vmap/batch_l2": batch_l2, "vmap/second_moment": second_moment}


def calls(row: Modern, device: torch.device, only: re.Pattern[str]) -> tuple[dict[str, Call], dict[str, float]]:
    """Entries, and the CPU seconds that ours took to compile."""
    torch.manual_seed(0)
    model = row.model().to(device).eval()
    x, y = (each.to(device) for each in row.data(row.batch))
    compiled = {}

    def gradient() -> object:
        return torch.autograd.grad(row.loss(model(x), y), list(model.parameters()), materialize_grads=True)

    found: dict[str, Call] = {BASE: gradient}
    for name, quantity in {**QUANTITIES, **ALONE}.items():
        if only.search(f"tnbackprop/{name}"):
            started = time.process_time()
            asked = [quantity()] + [tn.Grad()] * (quantity is not tn.Grad and name not in ALONE)
            program: Any = tn.compile(model, row.loss, (x, y), asked)
            compiled[f"tnbackprop/{name}"] = time.process_time() - started
            found[f"tnbackprop/{name}"] = lambda program=program: program(x, y)  # type: ignore[misc]
    peers = by_vmap(model, row.loss, x, y) if only.search("vmap/") else {}
    return found | {name: call for name, call in peers.items() if only.search(name)}, compiled


def measured(row: Modern, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    entries, compiled = calls(row, device, options.only)
    seconds = round_robin(entries, options.rounds, 3, device)
    peaks = {}
    if row.name in LARGE:
        for name, call in entries.items():
            own = device.type == "cuda"
            peaks[name] = peak_bytes(call, device) if own else peak_in_process("modern", row.name, name)
    rows = {
        name: {**asdict(found), "peak_bytes": peaks.get(name), "compile_seconds": compiled.get(name)}
        for name, found in ratios(seconds, BASE).items()
    }
    return {"batch": row.batch, "rounds": options.rounds, "entries": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modern", description="Time models of today.")
    every = MODERN | LARGE
    parser.add_argument("--large", action="store_true", help="models of real size, without vmap")
    parser.add_argument("--model", action="append", choices=tuple(every), help="repeat for several; default all")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="regular expression on entry names (contender/quantity)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="another place for the JSON")
    options = parser.parse_args(argv)
    part = bool(options.only or options.model)
    only = options.peak_of or options.only or ("tnbackprop/(batch_l2|diag_ggn_mc|kfac)" if options.large else "")
    options.only = re.compile(only)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.peak_of:
        (name,) = options.model
        print(json.dumps(peak_bytes(calls(every[name], device, options.only)[0][options.peak_of], device)))
        return 0
    results: dict[str, Any] = {**machine(device, options), "problems": {}}
    for name in options.model or list(LARGE if options.large else MODERN):
        results["problems"][name] = measured(every[name], device, options)
        print(tables({name: results["problems"][name]}), flush=True)
    output = options.output or RESULTS / f"{'large' if options.large else 'modern'}_{device.type}.json"
    return write(results, output, part and not options.output)


if __name__ == "__main__":
    sys.exit(main())
