"""Is the chosen plan the fast one? For each parameter of 3C3D and each squared quantity, every option is timed.

    python -m benchmarks.plan_choice [--device cuda] [--problem 3c3d-128] [--rounds 30]

An option is a set of parts that are built (the individual gradients, the centred ones); the others are multiplied out,
which for a square of sums over positions is the Gram form. The forward and the cotangent, which all options share,
are computed once and are not timed. Prints chosen / fastest; writes benchmarks/results/plan_choice_<device>.json and
exits with 1 where a choice is more than 1.3 times slower than the best.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tnbackprop as tn
from tnbackprop.compiler.emit.source import Writer
from tnbackprop.compiler.plan.choose import Choice, Option
from tnbackprop.compiler.program.expr import Value

from .models import PROBLEMS, Problem
from .timing import round_robin

RESULTS = Path(__file__).parent / "results"
QUANTITIES = (tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
ALLOWED = 1.3


@dataclass(frozen=True)
class Row:
    """One parameter and quantity: measured and predicted milliseconds of every option."""

    parameter: str
    shape: tuple[int, ...]
    quantity: str
    chosen: str
    fastest: str
    ratio: float
    milliseconds: Mapping[str, float]
    predicted: Mapping[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3f} ({self.predicted[name]:.3f})" for name, ms in self.milliseconds.items())
        verdict = "" if self.chosen == self.fastest else f"  [{self.fastest} is faster]"
        return f"{self.parameter:10} {self.quantity:14} {self.ratio:5.2f}  {self.chosen}{verdict}: {times}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.plan_choice", description="Time every option of every choice.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--problem", default="3c3d-32", choices=tuple(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="another place for the JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    problem, device = PROBLEMS[options.problem], torch.device(options.device)
    print("chosen / fastest; milliseconds measured (predicted)", flush=True)
    rows = []
    for name, _ in problem.build(device)[0].named_parameters():
        for quantity in QUANTITIES:
            rows.append(measure(problem, device, name, quantity, options.rounds))
            print(rows[-1], flush=True)
    worst = max(row.ratio for row in rows)
    print(f"worst {worst:.2f}, allowed {ALLOWED}")
    written = {"problem": problem.name, "device": str(device), "threads": options.threads, "torch": torch.__version__}
    output = options.output or RESULTS / f"plan_choice_{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    rounded = {**written, "worst": worst, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output}")
    return 0 if worst <= ALLOWED else 1


def measure(problem: Problem, device: torch.device, parameter: str, quantity: tn.Quantity, rounds: int) -> Row:
    """All options of one parameter, with every other parameter frozen, in turns."""
    model, loss = problem.build(device)
    for name, other in model.named_parameters():
        other.requires_grad_(name == parameter)
    x, y = problem.data(problem.batch, device)
    program = tn.compile(model, loss, (x, y), [quantity])
    (choice,) = program.compiled.plan.choices
    values = _values(program, x, y)
    runs = {label(option, choice): _run(option, program, values, len(x)) for option in choice.options}
    _agree(runs, quantity.name)
    seconds = round_robin(runs, rounds, warmup=5, device=device)
    # The least of all rounds: what others do on the machine only ever adds.
    milliseconds = {name: 1e3 * min(times) for name, times in seconds.items()}
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    chosen = label(choice.chosen, choice)
    return Row(
        parameter,
        tuple(model.get_parameter(parameter).shape),
        quantity.name,
        chosen,
        fastest,
        milliseconds[chosen] / milliseconds[fastest],
        milliseconds,
        {label(option, choice): 1e3 * option.seconds for option in choice.options},
    )


def label(option: Option, choice: Choice) -> str:
    """What is built, by the position of the part."""
    built = [str(k + 1) for k, part in enumerate(choice.found) if part in option.kept]
    return f"build {'+'.join(built)}" if built else "multiply out"


def _values(program: tn.Program, x: Tensor, y: Tensor) -> dict[Value, Any]:
    """Every value of a run."""
    plan, tensors = program.compiled.plan, program.tensors(x, y)
    values: dict[Value, Any] = {value: tensors[name] for name, value in plan.given.items() if name in tensors}
    values[plan.like] = next(v for v in tensors.values() if v.is_floating_point())
    text = Writer(program.compiled.graph, plan)
    namespace = _functions(text) | {"N": len(x)}
    with torch.no_grad():
        for step in plan.steps:
            own = {text.names(value): values[value] for value in step.inputs}
            values[step] = eval(text.printer.text(step.expr), namespace | own)
    return values


def _functions(text: Writer) -> dict[str, Any]:
    """The functions next to a program."""
    namespace: dict[str, Any] = {"torch": torch, "progress": iter}
    for source in (*text.helpers.values(), *("\n".join(text._function(body)) for body in text.bodies)):
        exec(source, namespace)
    return namespace


def _run(option: Option, program: tn.Program, values: Mapping[Value, Any], batch: int) -> Callable[[], list[Tensor]]:
    """The steps of an option as a function, which frees what nobody reads any more."""
    plan = replace(program.compiled.plan, steps=option.steps)
    text = Writer(program.compiled.graph, plan)
    last = {value: k for k, step in enumerate(option.steps) for value in step.inputs}
    own, kept = set(option.steps), set(option.results.values())
    lines = ["def run():"]
    for k, step in enumerate(option.steps):
        lines.append(f"    {text.names(step)} = {text.printer.text(step.expr)}")
        dead = [text.names(value) for value in step.inputs if last[value] == k and value in own - kept]
        lines += [f"    del {', '.join(dead)}"] if dead else []
    lines.append(f"    return [{', '.join(map(text.names, kept))}]")
    namespace = _functions(text) | {text.names(value): each for value, each in values.items() if value not in own}
    namespace["N"] = batch
    exec("\n".join(lines), namespace)
    run: Callable[[], list[Tensor]] = torch.no_grad()(namespace["run"])
    return run


def _agree(runs: Mapping[str, Callable[[], list[Tensor]]], what: str) -> None:
    """All options compute the same values, in whatever order of memory."""
    results = {name: sorted(float(value.double().norm()) for value in run()) for name, run in runs.items()}
    first = next(iter(results.values()))
    for name, norms in results.items():
        torch.testing.assert_close(norms, first, rtol=1e-3, atol=1e-12, msg=f"{what}: {name} differs: {results}")


if __name__ == "__main__":
    sys.exit(main())
