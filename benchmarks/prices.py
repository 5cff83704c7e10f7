"""Is a plan's price right? Every step of real programs is timed alone, and compared with what was predicted for it.

    python -m benchmarks.prices [--device cuda] [--model GPT] [--repeat 7] [--least 0.1]

A step runs in the reference interpreter, on values that are there; the fastest of some runs counts. Steps that take
less than `--least` milliseconds are left out: there launches decide, and the interpreter's own time. Only ratios matter
to a plan: `ratio` is measured over predicted, divided by the same of all steps together. For each kind of kernel: how
many steps, their share of the time, the ratio of their sums, between which ratios nine steps of ten are, and the two
steps furthest away. A run over all models writes benchmarks/results/prices_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

import sympy
import torch

import tnbackprop as tn
from tnbackprop.compiler.emit.printing import torch_code
from tnbackprop.compiler.program.cost import Kernel
from tnbackprop.compiler.program.interpret import Interpreter
from tnbackprop.compiler.program.lines import lines_of
from tnbackprop.diagram.core import N

from .first_order import machine
from .models import PROBLEMS
from .modern_models import MODERN
from .timing import synchronize

RESULTS = Path(__file__).parent / "results"
QUANTITIES = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.KFAC(), tn.DiagGGNMC())
FREE = (Kernel.VIEW, Kernel.ROUNDS)


@dataclass(frozen=True)
class Step:
    """One step: milliseconds, and what they were predicted to be."""

    kernel: str
    measured: float
    predicted: float
    code: str

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


def elementwise(expr: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> Any:
    """A formula of tensors."""
    names, code = _compiled(expr, tuple(values))
    return eval(code, {"torch": torch} | {names[s]: value for s, value in values.items()})


@lru_cache
def _compiled(expr: sympy.Expr, symbols: tuple[sympy.Symbol, ...]) -> tuple[dict[sympy.Symbol, str], CodeType]:
    names = {symbol: f"value{k}" for k, symbol in enumerate(symbols)}
    return names, compile(torch_code(expr, names), "<formula>", "eval")


def steps_of(name: str, device: torch.device, repeat: int) -> Iterator[Step]:
    """Every step of one model's programs, one for each quantity."""
    torch.manual_seed(0)
    if name in MODERN:
        row = MODERN[name]
        model, loss, (x, y) = row.model().to(device).eval(), row.loss, row.data(row.batch)
    else:
        problem = PROBLEMS[name]
        (model, loss), (x, y) = problem.build(device), problem.data(problem.batch, device)
    x, y = x.to(device), y.to(device)
    for quantity in QUANTITIES:
        yield from _timed(tn.compile(model, loss, (x, y), [quantity]), x, y, device, repeat)


@torch.no_grad()
def _timed(program: tn.Program, x: Any, y: Any, device: torch.device, repeat: int) -> Iterator[Step]:
    plan, texts = program.compiled.plan, program.compiled.writer.texts()
    tensors = program.tensors(x, y)
    like = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
    env: dict[Any, Any] = {plan.given[name]: tensor for name, tensor in tensors.items() if name in plan.given}
    env |= {value: like.new_empty(_sizes(value, len(x))).uniform_() for value in plan.noises.values()}
    env[plan.like] = like
    interpreter = Interpreter({N: len(x)}, elementwise)
    for line in lines_of(plan.steps, functional=True):
        seconds = []
        for _ in range(repeat):
            synchronize(device)
            started = time.perf_counter()
            env[line.value] = interpreter.value(line.expr, env)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        value = line.value
        predicted = plan.rates.seconds(value.kernel, value.work, plan.batch, plan.itemsize)
        if value.kernel not in FREE and predicted:
            yield Step(value.kernel.value, 1e3 * min(seconds), 1e3 * predicted, texts.get(value, ("", ""))[1])


def _sizes(value: Any, batch: int) -> list[int]:
    return [size if isinstance(size, int) else int(size.xreplace({N: batch})) for size in value.shape]


def tabled(steps: list[Step]) -> list[dict[str, Any]]:
    """A row for each kind of kernel, the most expensive first."""
    measured, predicted = sum(s.measured for s in steps), sum(s.predicted for s in steps)
    by_kernel: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        by_kernel[step.kernel].append(step)
    rows = []
    for kernel, own in by_kernel.items():
        whole = sum(s.measured for s in own)
        ends = sorted(own, key=lambda s: s.ratio)
        scale = predicted / measured
        rows.append({
            "kernel": kernel,
            "steps": len(own),
            "share": whole / measured,
            "ratio": scale * whole / sum(s.predicted for s in own),
            "low": scale * ends[len(ends) // 20].ratio,
            "high": scale * ends[-1 - len(ends) // 20].ratio,
            "least": asdict(ends[0]) | {"ratio": scale * ends[0].ratio},
            "most": asdict(ends[-1]) | {"ratio": scale * ends[-1].ratio},
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["share"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prices", description="Compare predicted with measured.")
    models = (*MODERN, *PROBLEMS)
    parser.add_argument("--model", action="append", choices=models, help="repeat for several; default all")
    parser.add_argument("--least", type=float, default=0.1, help="milliseconds")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    steps = []
    for name in options.model or models:
        steps += [s for s in steps_of(name, device, options.repeat) if s.measured >= options.least]
    rows = tabled(steps)
    print("| kernel | steps | share | ratio | nine of ten | worst |\n|---|--:|--:|--:|--:|--:|")
    for row in rows:
        worst = max((row["least"]["ratio"], row["most"]["ratio"]), key=lambda ratio: abs(math.log(ratio)))
        ends = f"{row['low']:.2f} to {row['high']:.2f} | {worst:.2f}"
        print(f"| {row['kernel']} | {row['steps']} | {row['share']:.0%} | {row['ratio']:.2f} | {ends} |")
    if not options.model:
        path = RESULTS / f"prices_{options.device}.json"
        path.write_text(json.dumps({**machine(device, options), "kernels": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
