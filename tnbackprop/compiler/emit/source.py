"""Emit: a program as the source of one function, registered with linecache so that tracebacks show it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any
from weakref import finalize

import torch
from torch.utils import _pytree as pytree

from ...errors import InputError
from ..plan.plan import Plan
from ..program.expr import Body, Call, Expr, Filled, Rounds, Value, Word, bodies, children, helpers, reads
from ..program.functions import Form, Function
from ..program.lines import Block, Lines, captured_by, lines_of
from ..program.passes import Context, Program, passed
from ..program.store import NOTHING
from ..translate.graph import Graph
from .naming import TAKEN, Scope, comment, docstring
from .printer import ATOM, FOLLOWED, Printer

_serial = count(1)
WIDTH = 120
FILENAME = "<tnbackprop program"
"""How the name begins under which a source is known to linecache."""
MEMORY = "memory"
"""The argument of a program that says where a large value goes: (like, shape) -> a tensor, or None: torch decides."""
PROGRESS, HANDED = f"{FOLLOWED}=iter", f"{MEMORY}=lambda like, shape: None"
"""Arguments of a program that has rounds, and of one that has large values."""
OWN = frozenset({MEMORY, FOLLOWED, "tensors", "results", "program", "added"})
"""Names that an emitted source has for itself."""
GIVE_MEMORY = Function(MEMORY, Form.FUNCTION, lambda like, shape: None)
ADDED = """\
def added(samples):
    # Σ over samples of tuples of tensors.
    total = [each.clone() for each in next(samples)]
    for one in samples:
        for before, each in zip(total, one, strict=True):
            before.add_(each)
        one = each = None  # not held while the next sample is computed
    return total"""


def emit(graph: Graph, plan: Plan, header: str, functional: bool = False) -> str:
    """The source of ``program(tensors) -> (loss, output, results[, checks])``; `functional`: it writes over nothing."""
    return Writer(graph, plan, functional).source(header)


class Writer:
    """Writes one source: the helpers and functions that it needs, and the program."""

    def __init__(self, graph: Graph, plan: Plan, functional: bool = False) -> None:
        self.graph, self.plan, self.functional = graph, plan, functional
        self.steps = tuple(step for step, _ in plan.timed)
        self.helpers = {fn.name: fn.source for step in self.steps for fn in _every(helpers, step)}
        inside = [each for step in self.steps for each in _inside(step.expr)]
        if any(isinstance(each, Rounds) and each.body.several for each in inside):
            self.helpers["added"] = ADDED
        self.bodies = list(dict.fromkeys(body for step in self.steps for body in bodies(step.expr)))
        for body in self.bodies:
            self.helpers |= {fn.name: fn.source for step in body.steps for fn in helpers(step.expr)}
        every = [*self.steps, *(step for body in self.bodies for step in body.steps)]
        self.taken = TAKEN | OWN | set(self.helpers) | words(every)
        outside = Scope(self.taken)
        self.functions = {body: _function_name(outside, body, k) for k, body in enumerate(self.bodies)}
        self.names = Scope(self.taken | set(self.functions.values()))
        for name in (*graph.inputs, *plan.given):
            self.names(plan.given[name])
        self.printer = Printer(self.names, self.functions)

    def source(self, header: str) -> str:
        """All of it."""
        return "\n".join([docstring(header), "", "import torch", "", "", *self.body()]) + "\n"

    def body(self) -> list[str]:
        """The functions."""
        plan = self.plan
        lines: list[str] = []
        for source in self.helpers.values():
            lines += [*source.split("\n"), "", ""]
        for each in self.bodies:
            lines += [*self._function(each), "", ""]
        head = self._inputs()
        body = written(self.program.lines, self.printer)
        large = any(f"{MEMORY}(" in line for line in body)
        arguments = ["tensors", *[PROGRESS] * followed(plan), *[HANDED] * large]
        lines.append(f"def program({', '.join(arguments)}):")
        if large or self._reads_like():
            head.append(f"    {self.names(plan.like)} = {self.names(plan.given[self._floating()])}")
        return [*lines, *head, *body, *self._return()]

    def texts(self) -> dict[Value, tuple[str, str]]:
        """The name and the expression of every step, before anything is written over or elsewhere."""
        own = {step: (self.names(step), self.printer.text(step.expr)) for step in self.steps if step.expr is not None}
        for body in self.bodies:
            names = Scope(self.taken | set(self.functions.values()), "u")
            printer = Printer(names, self.functions)
            own |= {step: (names(step), printer.text(step.expr)) for step in body.steps if step.expr is not None}
        return own

    @property
    def wanted(self) -> set[Value]:
        """The values of the straight part that are read later."""
        return self.plan.kept

    @cached_property
    def program(self) -> Program:
        """The straight part, after all passes."""
        plan = self.plan
        lines = passed(lines_of(plan.steps, self.functional), self.context(plan.kept))
        functions = {body: passed(lines_of(body.steps), small(set(reads(body.results)))) for body in self.bodies}
        graph = self.graph
        tensors = (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs, *plan.noises)
        given = frozenset({*(plan.given[name] for name in tensors), plan.like})
        return Program(lines, given, frozenset(plan.kept), functions, frozenset(plan.noises))

    def _reads_like(self) -> bool:
        plan = self.plan
        return any(plan.like in step.inputs for step in self.steps) or bool(plan.loops)

    def _floating(self) -> str:
        graph = self.graph
        return next(n for n in (*graph.parameters, *graph.inputs) if graph.values[n].dtype.is_floating_point)

    def _inputs(self) -> list[str]:
        """The lines that take the tensors that are read."""
        graph, plan = self.graph, self.plan
        inputs = (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs)
        read = {value for step in self.steps for value in step.inputs} | plan.kept
        floating = [n for n in (*graph.parameters, *graph.inputs) if graph.values[n].dtype.is_floating_point][:1]
        lines = []
        for name in inputs:
            value = plan.given[name]
            if value in read or name in floating or name == graph.inputs[0]:
                shape = ", ".join(map(str, value.shape))
                lines.append(f"    {self.names(value)} = tensors[{name!r}]  # [{shape}]")
        lines += [f"    {self.names(value)} = tensors[{name!r}]" for name, value in plan.noises.items()]
        return [*lines, self._batch_line()]

    def _batch_line(self) -> str:
        for name in self.graph.inputs:
            for axis, factors in enumerate(self.graph.values[name].axes):
                if len(factors) == 1 and str(factors[0]) == "N":
                    return f"    N = {self.names(self.plan.given[name])}.shape[{axis}]"
        raise AssertionError("no input has the batch")

    def _memory(self, value: Value) -> Expr:
        return Call(GIVE_MEMORY, (self.plan.like, value.shape))

    def context(self, kept: set[Value]) -> Context:
        """What the passes may know."""
        return Context(frozenset(kept), self.plan.is_large, self._memory, self.plan.like)

    def _function(self, body: Body) -> list[str]:
        """A function of some samples."""
        names = Scope(self.taken | set(self.functions.values()), "u")
        printer = Printer(names, self.functions)
        params = [names(param) for param in body.params]
        assert body.batch is not None
        first, axis = body.batch
        own = passed(lines_of(body.steps), small(set(reads(body.results))))
        lines = [f"    N = {names(first)}.shape[{axis}]", *written(own, printer)]
        shown = ", ".join(printer.text(result) for result in body.results)
        total = ["total"] * body.total
        head = f"def {self.functions[body]}({', '.join([*params, *total])}):"
        return [head, *lines, f"    return {shown}{', ' if body.several else ''}"]

    def _return(self) -> list[str]:
        plan = self.plan
        leaves = pytree.tree_leaves(self.graph.output)
        shown = ", ".join(self.names(plan.output[leaf]) if leaf in plan.output else str(leaf) for leaf in leaves)
        lines = ["    results = {"]
        for quantity, by in self._values().items():
            lines.append(f"        {quantity!r}: {{")
            lines += [f"            {name!r}: {value}," for name, value in by.items()]
            lines.append("        },")
        loss = self.names(plan.loss) if plan.loss is not None else "None"
        checks = f", [{', '.join(map(self.names, plan.checks.values()))}]" if plan.checks else ""
        return [*lines, "    }", f"    return {loss}, ({shown},), results{checks}"]

    def _values(self) -> dict[str, dict[str, str]]:
        """The text of every value: quantity -> parameter -> a value, or its factors and then their means."""
        parts: dict[str, dict[str, list[str]]] = {}
        whole: dict[str, dict[str, str]] = {}
        for result, by in self.plan.results.items():
            for name, value in by.items():
                if result.factor is None:
                    whole.setdefault(result.quantity, {})[name] = self.names(value)
                else:
                    parts.setdefault(result.quantity, {}).setdefault(name, []).append(self.names(value))
        for quantity, each in parts.items():
            whole[quantity] = {name: self.printer.text(tuple(map(Word, values))) for name, values in each.items()}
        return whole


def _function_name(scope: Scope, body: Body, number: int) -> str:
    return scope.fresh(f"{body.hint}_{number}")


def _every(walk: Callable[[Expr], Iterable[Any]], step: Value) -> Iterator[Any]:
    yield from walk(step.expr) if step.expr is not None else ()


def _inside(expr: Any) -> Iterator[Any]:
    """An expression and all that stands in it."""
    yield expr
    for child in children(expr) if not isinstance(expr, Value) else ():
        yield from _inside(child)


def words(steps: Iterable[Value]) -> set[str]:
    """Every word of the code that rules give, which would be taken for a value of that name."""
    every = (each for step in steps for each in _inside(step.expr) if isinstance(each, Filled))
    return {word for each in every for word in each.code.words}


def small(kept: set[Value]) -> Context:
    """The context of a function of some samples: nothing in it is large."""
    return Context(frozenset(kept), lambda value: False, lambda value: value, NOTHING)


def written(lines: Lines, printer: Printer) -> list[str]:
    """One line per value, and a comment where the subject changes."""
    inside = captured_by(lines)
    blocks = {line.value: line.block for line in lines if line.block is not None}
    shown, note = [], ""
    for line in lines:
        if line.note and line.note != note:
            note = line.note
            shown.append(f"    # {comment(note)}")
        if line.block is not None:
            shown += _loop(line.block, printer)
        elif not any(value in blocks for value in line.inputs):  # what a loop leaves is there
            shown.append(f"    {printer.names(line.value)} = {printer.text(line.expr)}")
        shown += freed([value for value in line.frees if value not in blocks], inside, printer.names)
    return shown


def _loop(block: Block, printer: Printer) -> list[str]:
    """A loop over columns."""
    names, text = printer.names, printer.text
    cut = f"split({block.width})" if block.width > 1 else "unbind(0)"
    rows = ", ".join(f"{text(whole, ATOM)}.{cut}" for _, whole in block.rows)
    targets = ", ".join(names(variable) for variable, _ in block.rows)
    over = f"zip({rows}, strict=True)" if len(block.rows) > 1 else rows
    head = f"    for {targets} in {FOLLOWED}({over}):"
    inner = [f"    {line}" for line in written(block.lines, printer)]
    return [*written(block.begin, printer), head, *inner, *written(block.end, printer)]


def freed(values: Iterable[Value], inside: set[Value], names: Callable[[Value], str]) -> list[str]:
    """Lines that let go of values; torch.compile knows no `del` of one that a function inside has captured."""
    every = list(values)
    plain = [names(value) for value in every if value not in inside]
    lines = [f"    del {', '.join(plain)}"] if plain else []
    return lines + [f"    {names(value)} = None" for value in every if value in inside]


def followed(plan: Plan) -> bool:
    """Whether the program has rounds that a bar can follow."""
    every = (each for step, _ in plan.timed for each in _inside(step.expr))
    return bool(plan.loops) or any(isinstance(each, Rounds) and each.followed for each in every)


def load(source: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The function that the source defines. While it lives, linecache knows its lines."""
    filename = f"{FILENAME} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    function: Callable[[dict[str, torch.Tensor]], Any] = namespace["program"]
    finalize(function, linecache.cache.pop, filename, None).atexit = False
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
