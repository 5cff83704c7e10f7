"""What a trial plan costs: nodes of a torch.fx.Graph, made and copied, against values in layers of the store.

The planner tries thousands of plans and keeps one of each few. `python -m benchmarks.trial_layers` measures both ways
on this machine, and counts the trials of one compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch.fx import Graph

import tnbackprop as tn
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import CPU, Kernel
from tnbackprop.compiler.program.expr import Call
from tnbackprop.compiler.program.store import Store

from .models import PROBLEMS

FIRST_ORDER = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
CURVATURE = (tn.DiagGGN(), tn.KFLR())


def graph(count: int) -> Graph:
    """A chain of products."""
    made = Graph()
    value = made.placeholder("x")
    for _ in range(count):
        value = made.call_function(torch.mul, (value, value))
    return made


def store(count: int) -> Store:
    """The same chain."""
    made = Store(CPU, batch=4, itemsize=4)
    value = made.given("x", (4, 4))
    for _ in range(count):
        value = made.add(Call(f.MUL, (value, value)), (4, 4), Kernel.ELEMENTWISE)
    return made


def microseconds(run: Callable[[], object], count: int) -> float:
    """Per op, the best of five runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times) / count


def per_op(count: int = 2000) -> dict[str, float]:
    """What is done with an op -> microseconds."""
    nodes, values = graph(count), store(count)
    chain = [(step.expr, step.shape) for step in values.steps if step.expr is not None]
    return {
        "fx.Node made": microseconds(lambda: graph(count), count),
        "fx.Node copied": microseconds(lambda: Graph().graph_copy(nodes, {}), count),
        "value entered in the store": microseconds(lambda: store(count), count),
        "value found again": microseconds(lambda: [values.add(e, s, Kernel.ELEMENTWISE) for e, s in chain], count),
        "fork, of any size": microseconds(lambda: [values.fork() for _ in range(count)], count),
    }


def trials(name: str, quantities: tuple[tn.Quantity, ...]) -> tuple[int, int]:
    """How many trials one compile makes, and how many ops they see together, which copies would copy."""
    problem = PROBLEMS[name]
    model, loss = problem.build(torch.device("cpu"))
    sizes: list[int] = []
    fork = Store.fork

    def counted(self: Store) -> Store:
        sizes.append(sum(len(layer.steps) for layer in self._layers))
        return fork(self)

    with patch.object(Store, "fork", counted):
        batch = problem.data(problem.batch, torch.device("cpu"))
        tn.compile(model, loss, batch, list(quantities), check=False)
    return len(sizes), sum(sizes)


def main() -> None:
    found = per_op()
    for what, time_of in found.items():
        print(f"{what:28}{time_of:6.2f} µs")
    for quantities in (FIRST_ORDER, CURVATURE):
        count, seen = trials("3c3d-32", quantities)
        copies = 1e-6 * found["fx.Node copied"] * seen
        names = ", ".join(quantity.name for quantity in quantities)
        print(f"3C3D, {names}: {count} trials, {seen // count} ops each; as copies of a graph {copies:.1f} s")


if __name__ == "__main__":
    main()
