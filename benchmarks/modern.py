"""Models of today: each quantity with its gradient, as multiples of autograd's gradient, in turns in one process.

    python -m benchmarks.modern [--model GPT] [--only 'kfac|grad'] [--rounds 20] [--device cuda]

Every entry computes the loss, the gradient and its quantity. `vmap` is `torch.func.vmap(grad_and_value(…))`; where it
fails its row is empty. A whole run writes benchmarks/results/modern_<device>.json.
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
from .modern_models import MODERN, Modern
from .report import tables
from .timing import Call, ratios, round_robin

BASE = "autograd/grad"
QUANTITIES: Mapping[str, Callable[[], tn.Quantity]] = {
    "grad": tn.Grad,
    "batch_l2": tn.BatchL2,
    "second_moment": tn.SecondMoment,
    "batch_grad": tn.BatchGrad,
    "kfac": tn.KFAC,
    "diag_ggn_mc": tn.DiagGGNMC,
}
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
    for name, quantity in QUANTITIES.items():
        if only.search(f"tnbackprop/{name}"):
            started = time.process_time()
            program: Any = tn.compile(model, row.loss, (x, y), [quantity()] + [tn.Grad()] * (quantity is not tn.Grad))
            compiled[f"tnbackprop/{name}"] = time.process_time() - started
            found[f"tnbackprop/{name}"] = lambda program=program: program(x, y)  # type: ignore[misc]
    peers = by_vmap(model, row.loss, x, y) if only.search("vmap/") else {}
    return found | {name: call for name, call in peers.items() if only.search(name)}, compiled


def measured(row: Modern, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    entries, compiled = calls(row, device, options.only)
    seconds = round_robin(entries, options.rounds, 3, device)
    rows = {
        name: {**asdict(found), "peak_bytes": None, "compile_seconds": compiled.get(name)}
        for name, found in ratios(seconds, BASE).items()
    }
    return {"batch": row.batch, "rounds": options.rounds, "entries": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modern", description="Time models of today.")
    parser.add_argument("--model", action="append", choices=tuple(MODERN), help="repeat for several; default all")
    parser.add_argument("--only", default="", help="regular expression on entry names (contender/quantity)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="another place for the JSON")
    options = parser.parse_args(argv)
    options.only = re.compile(options.only)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results: dict[str, Any] = {**machine(device, options), "problems": {}}
    for name in options.model or list(MODERN):
        results["problems"][name] = measured(MODERN[name], device, options)
        print(tables({name: results["problems"][name]}), flush=True)
    if (options.only.pattern or options.model) and not options.output:
        print("a part of the benchmark: nothing written (give --output)")
        return 0
    output = options.output or RESULTS / f"modern_{device.type}.json"
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
