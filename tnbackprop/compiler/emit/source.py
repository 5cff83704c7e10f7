"""Emit: a program as the source of one function, registered with linecache so that tracebacks show it."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...diagram.core import Size
from ...errors import InputError
from ..plan.loops import Loop, loop_lines
from ..plan.plan import Plan
from ..program.expr import Body, Call, Expr, Filled, Join, Slices, Value, bodies, children, helpers, reads
from ..program.functions import Form, Function
from ..program.lines import Line, captured_by, lines_of
from ..program.passes import Context, Program, passed
from ..translate.graph import Graph
from .naming import TAKEN, Scope, comment, docstring
from .printer import FOLLOWED, Printer

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
    total = next(samples)
    for one in samples:
        total = [before + each for before, each in zip(total, one, strict=True)]
    return total"""


def emit(graph: Graph, plan: Plan, header: str, functional: bool = False) -> str:
    """The source of ``program(tensors) -> (loss, output, results)``; `functional`: it writes over nothing."""
    return Writer(graph, plan, functional).source(header)


class Writer:
    """Writes one source: the helpers and functions that it needs, and the program."""

    def __init__(self, graph: Graph, plan: Plan, functional: bool = False) -> None:
        self.graph, self.plan, self.functional = graph, plan, functional
        self.steps = tuple(step for step, _ in plan.timed)
        self.helpers = {fn.name: fn.source for step in self.steps for fn in _every(helpers, step)}
        inside = [each for step in self.steps for each in _inside(step.expr)]
        if any(isinstance(each, Slices) and each.join == Join.EACH for each in inside):
            self.helpers["added"] = ADDED
        self.bodies = list(dict.fromkeys(body for step in self.steps for body in bodies(step.expr)))
        for body in self.bodies:
            self.helpers |= {fn.name: fn.source for step in body.steps for fn in helpers(step.expr)}
        every = [*self.steps, *(step for body in self.bodies for step in body.steps)]
        self.taken = TAKEN | OWN | set(self.helpers) | _words(every)
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
        wanted = self.wanted
        head = self._inputs()
        body = written(self.program.lines, self.printer)
        for loop in plan.loops:
            body += self._loop(loop, wanted)
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
        return self.plan.kept | {value for loop in self.plan.loops for value in loop.reads}

    @cached_property
    def program(self) -> Program:
        """The straight part, after all passes."""
        plan = self.plan
        lines = passed(lines_of(plan.steps, self.functional), self.context(self.wanted))
        later = {v for loop in plan.loops for v in (*loop.after, *(total for _, total in loop.outputs))}
        return Program(lines, frozenset({*plan.given.values(), plan.like}), frozenset(self.wanted - later))

    def _reads_like(self) -> bool:
        plan = self.plan
        return any(plan.like in step.inputs for step in self.steps) or any(loop.outputs for loop in plan.loops)

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
        return Context(frozenset(kept), self.plan.is_large, self._memory)

    def _lines(self, lines: tuple[Line, ...], kept: set[Value]) -> list[str]:
        return written(passed(lines, self.context(kept)), self.printer)

    def _function(self, body: Body) -> list[str]:
        """A function of some samples."""
        names = Scope(self.taken | set(self.functions.values()), "u")
        printer = Printer(names, self.functions)
        params = [names(param) for param in body.params]
        first, axis = body.batch
        kept = set(reads(body.results))
        lines = [f"    N = {names(first)}.shape[{axis}]", *written(passed(lines_of(body.steps), small(kept)), printer)]
        shown = ", ".join(printer.text(result) for result in body.results)
        total = ["total"] * body.total
        head = f"def {self.functions[body]}({', '.join([*params, *total])}):"
        return [head, *lines, f"    return {shown}{', ' if body.several else ''}"]

    def _loop(self, loop: Loop, wanted: set[Value]) -> list[str]:
        """The loop, and what is done after it; `wanted` are the values that are read later.

        Totals are allocated once: sums are added up in place, a concatenation is filled in.
        """
        names, text = self.names, self.printer.text
        like = names(self.plan.like)
        slots = {t: Value(f"slot:{t.key}", None, t.shape, hint=t.hint.replace("total", "slot")) for _, t in loop.filled}
        lines = [f"    # {loop.columns} columns, {loop.width} at a time"]
        lines += [f"    {names(total)} = {names(loop.begin[total])} + {names(value)}" for value, total in loop.alike]
        for value, total in loop.summed:
            zeros = f"{like}.new_zeros({text(value.shape)})"
            begin = f"{names(loop.begin[total])}.clone()" if total in loop.begin else zeros
            lines.append(f"    {names(total)} = {begin}")
        for value, total in loop.filled:
            lines.append(f"    {names(total)} = {self._empty(total, (loop.count * loop.width, *value.shape[1:]))}")
        cut = f"split({loop.width})" if loop.width > 1 else "unbind(0)"
        rows = ", ".join(f"{names(value)}.{cut}" for value in (*loop.rows.values(), *slots))
        targets = ", ".join(names(value) for value in (*loop.rows, *slots.values()))
        over = f"zip({rows}, strict=True)" if "," in targets else rows
        lines.append(f"    for {targets} in {FOLLOWED}({over}):")
        lines += self._round(loop, slots)
        if loop.count * loop.width > loop.columns:
            lines += [f"    {names(total)} = {names(total)}[:{loop.columns}]" for _, total in loop.filled]
        after = lines_of(loop.after)
        lines += self._lines(after, wanted)
        spent = [total for _, total in loop.summed if total not in wanted]
        return [*lines, *freed(spent, captured_by(after), names)]

    def _round(self, loop: Loop, slots: dict[Value, Value]) -> list[str]:
        """The lines inside of the loop."""
        names = self.names
        steps, copied, added = loop_lines(loop, slots)
        kept = {value for value, _ in (*copied, *added)} | {value for value, _ in loop.filled}
        lines = [f"    {line}" for line in self._lines(steps, kept)]
        squeezed = "" if loop.width > 1 else ".squeeze(0)"
        lines += [f"        {names(slots[total])}[:] = {names(value)}{squeezed}" for value, total in copied]
        lines += [f"        {names(total)} = {names(total)}.add_({names(value)})" for value, total in added]
        own = {line.value for line in steps}
        left = [value for value in dict.fromkeys(value for value, _ in loop.outputs) if value in own and value in kept]
        return [*lines, *freed([*loop.rows, *slots.values(), *left], captured_by(steps), names)]

    def _empty(self, total: Value, shape: tuple[Size, ...]) -> str:
        """A value that is filled in later."""
        like, sizes = self.names(self.plan.like), self.printer.text(shape)
        out = f", out={MEMORY}({like}, {sizes})" if self.plan.is_large(total) else ""
        return f"torch.empty({sizes}, dtype={like}.dtype, device={like}.device{out})"

    def _return(self) -> list[str]:
        plan = self.plan
        leaves = pytree.tree_leaves(self.graph.output)
        shown = ", ".join(self.names(plan.output[leaf]) if leaf in plan.output else str(leaf) for leaf in leaves)
        lines = ["    results = {"]
        for quantity, by in plan.results.items():
            lines.append(f"        {quantity!r}: {{")
            lines += [f"            {name!r}: {self.names(value)}," for name, value in by.items()]
            lines.append("        },")
        loss = self.names(plan.loss) if plan.loss is not None else "None"
        return [*lines, "    }", f"    return {loss}, ({shown},), results"]


def _function_name(scope: Scope, body: Body, number: int) -> str:
    return scope.fresh(f"{body.hint}_{number}")


def _every(walk: Callable[[Expr], Iterable[Any]], step: Value) -> Iterator[Any]:
    yield from walk(step.expr) if step.expr is not None else ()


def _inside(expr: Any) -> Iterator[Any]:
    """An expression and all that stands in it."""
    yield expr
    for child in children(expr) if not isinstance(expr, Value) else ():
        yield from _inside(child)


def _words(steps: Iterable[Value]) -> set[str]:
    """Every word of the code that rules give, which would be taken for a value of that name."""
    every = (each for step in steps for each in _inside(step.expr) if isinstance(each, Filled))
    return {word for each in every for word in each.code.words}


def small(kept: set[Value]) -> Context:
    """The context of a function of some samples: nothing in it is large."""
    return Context(frozenset(kept), lambda value: False, lambda value: value)


def written(lines: tuple[Line, ...], printer: Printer) -> list[str]:
    """One line per value, and a comment where the subject changes."""
    inside = captured_by(lines)
    shown, note = [], ""
    for line in lines:
        if line.note != note:
            note = line.note
            shown.append(f"    # {comment(note)}")
        shown.append(f"    {printer.names(line.value)} = {printer.text(line.expr)}")
        shown += freed(line.frees, inside, printer.names)
    return shown


def freed(values: Iterable[Value], inside: set[Value], names: Callable[[Value], str]) -> list[str]:
    """Lines that let go of values; torch.compile knows no `del` of one that a function inside has captured."""
    every = list(values)
    plain = [names(value) for value in every if value not in inside]
    lines = [f"    del {', '.join(plain)}"] if plain else []
    return lines + [f"    {names(value)} = None" for value in every if value in inside]


def followed(plan: Plan) -> bool:
    """Whether the program has rounds that a bar can follow."""
    every = (each for step in plan.steps for each in _inside(step.expr))
    return bool(plan.loops) or any(isinstance(each, Slices) and each.followed for each in every)


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
