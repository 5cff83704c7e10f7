"""Emit: steps as the source of one function, registered with linecache so that tracebacks show it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError
from .graph import Graph
from .listing import lines_of
from .loops import loop_lines
from .outs import MEMORY, handed
from .plan import Plan
from .store import Step

_serial = count(1)
WIDTH = 120
FILENAME = "<tnbackprop program"
"""How the name begins under which a source is known to linecache."""
FOLLOWED, HANDED = "progress=iter", f"{MEMORY}=lambda like, shape: None"
"""Arguments of a program that has rounds, and of one that has large values."""


def emit(graph: Graph, plan: Plan, header: str) -> str:
    """The source of ``program(tensors) -> (loss, output, results)``."""
    lines = [f'"""{header}"""', "", "import torch", "", ""]
    for source in plan.functions.values():
        lines += [*source.split("\n"), "", ""]
    wanted = _read_by_output(graph, plan) | {name for loop in plan.loops for name in loop.reads}
    body = lines_of(handed(plan.steps, plan.shapes, plan.large), wanted)
    for loop in plan.loops:
        body += loop_lines(loop, plan.shapes, wanted, plan.large)
    large = any(f"{MEMORY}(like, " in line for line in body)
    arguments = ["tensors", *[FOLLOWED] * followed(plan), *[HANDED] * large]
    lines.append(f"def program({', '.join(arguments)}):")
    inputs = (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs)
    read = {name for step, _ in plan.timed for name in step.inputs} | _read_by_output(graph, plan)
    floating = next((n for n in (*graph.parameters, *graph.inputs) if graph.values[n].dtype.is_floating_point), None)
    keep = {name for name in inputs if name in read or name == floating}
    for name in inputs:
        if name in keep or name == graph.inputs[0]:
            lines.append(f"    {name} = tensors[{name!r}]  # [{', '.join(map(str, graph.values[name].shape))}]")
    lines += [f"    {name} = tensors[{name!r}]" for name in noises(plan)]
    lines.append(_batch_line(graph))
    if large or any("like" in step.inputs for step, _ in plan.timed) or any(loop.outputs for loop in plan.loops):
        lines.append(f"    like = {floating}")
    return "\n".join([*lines, *body, *_return(graph, plan)]) + "\n"


def noises(plan: Plan) -> list[str]:
    """The names of the random inputs."""
    return [name for name in plan.shapes if name.startswith("noise_")]


def followed(plan: Plan) -> bool:
    """Whether the program has rounds that a bar can follow."""
    return bool(plan.loops) or any("progress(" in step.code for step in plan.steps)


def _batch_line(graph: Graph) -> str:
    for name in graph.inputs:
        for axis, factors in enumerate(graph.values[name].axes):
            if len(factors) == 1 and str(factors[0]) == "N":
                return f"    N = {name}.shape[{axis}]"
    raise AssertionError("no input has the batch")


def _read_by_output(graph: Graph, plan: Plan) -> set[str]:
    names = set(plan.output.values())
    names |= {code for by in plan.results.values() for code in by.values()}
    return names | ({plan.loss} if plan.loss else set())


def _return(graph: Graph, plan: Plan) -> list[str]:
    leaves = pytree.tree_leaves(graph.output)
    shown = ", ".join(plan.output.get(leaf, str(leaf)) for leaf in leaves)
    lines = ["    results = {"]
    for quantity, by in plan.results.items():
        lines.append(f"        {quantity!r}: {{")
        lines += [f"            {name!r}: {code}," for name, code in by.items()]
        lines.append("        },")
    return [*lines, "    }", f"    return {plan.loss}, ({shown},), results"]


def load(source: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The function that the source defines."""
    filename = f"{FILENAME} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    function: Callable[[dict[str, torch.Tensor]], Any] = namespace["program"]
    return function


@contextmanager
def running(source: str) -> Iterator[None]:
    """What torch or Python raises in the emitted function is told with the place in the source, and what it is for."""
    try:
        yield
    except (ZeroDivisionError, IndexError, RuntimeError, ValueError, TypeError) as error:
        found = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(FILENAME)]
        if not found or isinstance(error, torch.OutOfMemoryError):
            raise
        lines = source.splitlines()[: found[-1].lineno]
        about = next((line.strip(" #") for line in reversed(lines) if line.strip().startswith("# ")), "")
        zero = "a scale divides by zero at this batch size, as 1/(N - 1) does at N = 1: give more samples"
        what = zero if isinstance(error, ZeroDivisionError) else error
        raise InputError(
            f"the batch fails in {about}: {what}\n  line {len(lines)} of program.source: {lines[-1].strip()}"
        ) from error


__all__ = ["Step", "emit", "load", "running"]
