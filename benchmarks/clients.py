"""What clients are made of: quantities with operands and phases, halves inside of backward, and what is saved between.

    python -m benchmarks.clients [--model 3c3d] [--only clip] [--rounds 20] [--device cuda]

Times are multiples of autograd's gradient, in turns in one process. `two passes` are norms, then a weighted gradient by
autograd; `attach/…` is a training step with the user's own backward(), next to the plain one. Saved bytes are what is
kept between forward and backward for fine-tuning cases, measured, the output not counted. Peak memory is what an entry
holds beyond the model and the batch, its results included. A whole run writes benchmarks/results/clients_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tnbackprop as tn

from .first_order import RESULTS, machine
from .models import net_3c3d
from .modern_models import MODERN, Modern
from .report import tables, write
from .timing import Call, peak_bytes, peak_in_process, ratios, round_robin

BASE = "autograd/grad"
CLASSES, BATCH = 10, 32


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, 32, 32), torch.randint(CLASSES, (batch,))


MODELS: Mapping[str, Modern] = {
    "3c3d": Modern("3c3d", net_3c3d, nn.functional.cross_entropy, _images, BATCH),
    **{name: MODERN[name] for name in ("encoder", "GPT") if name in MODERN},
}
QUANTITIES: Mapping[str, Callable[[], list[tn.Quantity]]] = {
    "norms": lambda: [tn.Total(tn.BatchL2())],
    "clip": lambda: [tn.ClippedGrad()],
    "smw": lambda: [tn.NaturalGradientSMW()],
    "axis_moments": lambda: [tn.AxisMoments()],
    "singd_diagonal": lambda: [tn.ProjectedFactors()],
    "singd_dense": lambda: [tn.ProjectedFactors(structure=tn.Structure.DENSE)],
    "ekfac_drawn": lambda: [tn.KFAC(), tn.RotatedSecondMoment(root=tn.Draws(1))],
    "directional": lambda: [tn.DirectionalGrad()],
}
ATTACHED = "autograd/backward attach/batch_l2 attach/kfac"
RANK = 4


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, base.in_features, device=base.weight.device) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.mT) @ self.up.mT


def _adapted(model: nn.Module) -> nn.Module:
    """Every linear layer but the heads with an update of low rank; all else is frozen.

    Not in torch's own encoder, which reads weights past their layers.
    """
    model.requires_grad_(False)
    own = any(isinstance(each, nn.TransformerEncoderLayer) for each in model.modules())
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear) and not own]
    for name, layer in layers:
        if not name.endswith(("head", "14")):
            model.set_submodule(name, LoRA(layer))
    return model


def _only(trained: Callable[[str, nn.Parameter], bool]) -> Callable[[nn.Module], nn.Module]:
    def frozen(model: nn.Module) -> nn.Module:
        for name, p in model.named_parameters():
            p.requires_grad_(trained(name, p))
        return model

    return frozen


TUNED: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "all": _only(lambda name, p: True),
    "frozen trunk": _only(lambda name, p: name.startswith(("14.", "norm.", "head."))),
    "biases": _only(lambda name, p: name.endswith("bias")),
    "norms": _only(lambda name, p: "norm" in name),
    "vectors": _only(lambda name, p: p.ndim == 1),
    "LoRA": _adapted,
    "first layer": _only(lambda name, p: name.startswith(("0.", "patch.", "tokens.", "words."))),
}
"""Which parameters are trained."""


def calls(row: Modern, device: torch.device, only: re.Pattern[str]) -> dict[str, Call]:
    """Entries by name."""
    torch.manual_seed(0)
    model = row.model().to(device).eval()
    x, y = (each.to(device) for each in row.data(row.batch))
    parameters = list(model.parameters())

    def gradient() -> object:
        return torch.autograd.grad(row.loss(model(x), y), parameters, materialize_grads=True)

    found: dict[str, Call] = {BASE: gradient}
    for name, make in QUANTITIES.items():
        if only.search(name):
            program = tn.compile(model, row.loss, (x, y), make(), check=False)
            operands = program.some_operands(x, y)
            found[f"tnbackprop/{name}"] = lambda p=program, o=operands: p(x, y, operands=o)  # type: ignore[misc]
    if only.search("clip"):
        found["two passes/clip"] = _two_passes(model, row, x, y, parameters)
    return found | (_attached(model, row, x, y) if only.search(ATTACHED) else {})


def _two_passes(model: nn.Module, row: Modern, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> Call:
    norms = tn.compile(model, row.loss, (x, y), [tn.Total(tn.BatchL2(scale=tn.Scale.UNSCALED))], check=False)

    def each(output: Tensor) -> Tensor:
        rows = [row.loss(output[n : n + 1], y[n : n + 1]) for n in range(len(y))]
        return torch.stack(rows)

    def run() -> object:
        weights = norms(x, y)["batch_l2_total"]["all"].rsqrt().clamp(max=1)
        return torch.autograd.grad((each(model(x)) * weights).sum(), parameters, materialize_grads=True)

    return run


def _attached(model: nn.Module, row: Modern, x: Tensor, y: Tensor) -> dict[str, Call]:
    """Training steps without the optimiser: the plain one, and with quantities inside of it."""
    loss = row.loss
    handed = tn.compile(model, tn.HANDED, x, [tn.Grad(), tn.BatchL2()], check=False)
    curved = tn.compile(model, loss, (x, y), [tn.Grad(), tn.KFAC()], check=False)

    def plain() -> object:
        model.zero_grad()
        return loss(model(x), y).backward()

    def batch_l2() -> object:
        model.zero_grad()
        with tn.attach(handed):
            return loss(model(x), y).backward()

    def kfac() -> object:
        model.zero_grad()
        with tn.attach(curved) as attached:
            return attached.loss(model(x), y).backward()

    return {"autograd/backward": plain, "attach/batch_l2": batch_l2, "attach/kfac": kfac}


def saved(row: Modern, device: torch.device) -> dict[str, dict[str, int]]:
    """Bytes that autograd and the halves of a program keep for a gradient, by fine-tuning case."""
    found = {}
    for case, tuned in TUNED.items():
        torch.manual_seed(0)
        model = tuned(row.model().to(device).eval())
        if not any(p.requires_grad for p in model.parameters()):
            continue
        x, y = (each.to(device) for each in row.data(row.batch))
        program = tn.compile(model, row.loss, (x, y), [tn.Grad()], check=False)
        output, kept = program.forward(x)
        mine = kept.nbytes - (output.untyped_storage().nbytes() if _kept(kept, output) else 0)
        found[case] = {"autograd": _by_autograd(model, x), "tnbackprop": mine}
    return found


def _kept(kept: tn.Saved, output: Tensor) -> bool:
    leaves = torch.utils._pytree.tree_leaves(dict(kept.tensors))
    return any(t.untyped_storage().data_ptr() == output.untyped_storage().data_ptr() for t in leaves)


def _by_autograd(model: nn.Module, x: Tensor) -> int:
    outside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    return sum(size for at, size in found.items() if at not in outside | {output.untyped_storage().data_ptr()})


def _peak(model: str, entry: str, device: torch.device, only: re.Pattern[str]) -> int | None:
    if device.type == "cuda":
        return peak_bytes(calls(MODELS[model], device, only)[entry], device)
    return peak_in_process("clients", model, entry)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description="Time what clients are made of.")
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="repeat for several; default all")
    parser.add_argument("--only", default="", help="regular expression on entries")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="another place for the JSON")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, on a CPU a process each")
    options = parser.parse_args(argv)
    part = bool(options.only or options.model)
    torch.set_num_threads(options.threads)
    device, only = torch.device(options.device), re.compile(options.only)
    if options.peak_of:
        (name,), own = options.model, re.compile(options.peak_of.rpartition("/")[2])
        print(json.dumps(peak_bytes(calls(MODELS[name], device, own)[options.peak_of], device)))
        return 0
    results: dict[str, Any] = {**machine(device, options), "problems": {}, "saved": {}}
    for name in options.model or list(MODELS):
        row = MODELS[name]
        seconds = round_robin(calls(row, device, only), options.rounds, 3, device)
        peaks = {} if options.no_memory else {entry: _peak(name, entry, device, only) for entry in seconds}
        found = ratios(seconds, BASE)
        rows = {entry: {**asdict(each), "peak_bytes": peaks.get(entry)} for entry, each in found.items()}
        results["problems"][name] = {"batch": row.batch, "rounds": options.rounds, "entries": rows}
        print(tables({name: results["problems"][name]}), flush=True)
        results["saved"][name] = saved(row, device) if only.search("saved") else {}
        for case, each in results["saved"][name].items():
            mine, theirs = each["tnbackprop"], each["autograd"]
            print(f"saved, {case}: {mine / 1e6:.3g} MB, autograd {theirs / 1e6:.3g} MB, {mine / max(theirs, 1):.2f}")
    output = options.output or RESULTS / f"clients_{device.type}.json"
    return write(results, output, part and not options.output, plotted=False)


if __name__ == "__main__":
    sys.exit(main())
