"""Emit: a program as the source of one function, and of those that it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from torch.utils import _pytree as pytree

from ...diagram.core import N
from ...errors import RuleError
from ..plan.plan import Plan
from ..program.expr import Body, Call, Expr, Filled, Rounds, Value, bodies, children, helpers, reads, sizes_in
from ..program.functions import Form, Function
from ..program.lines import Block, Line, captured_by, lines_of
from ..program.passes import Context, Program, passed
from ..program.store import NOTHING
from ..translate.graph import Graph
from .layout import Group, Row
from .naming import TAKEN, Scope, comment, docstring, string
from .printer import ATOM, FOLLOWED, Printer
from .shared import Shared, Use, shared

WIDTH = 120
MEMORY = "memory"
"""The argument of a program that says where a large value goes: (like, shape) -> a tensor, or None: torch decides."""
PROGRESS, HANDED = f"{FOLLOWED}=iter", f"{MEMORY}=lambda like, shape: None"
"""Arguments of a program that has rounds, and of one that has large values."""
HANDOVER = "handed"
"""The list of what a function lets go of."""
OWN = frozenset({MEMORY, FOLLOWED, HANDOVER, "tensors", "results", "program", "added"})
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
    """The source of ``program(tensors) -> (loss, output, results[, checks[, divisor]])``.

    functional  it writes over nothing
    """
    return Writer(graph, plan, functional).source(header)


class Writer:
    """Writes one source: the helpers and functions that it needs, and the program."""

    def __init__(self, graph: Graph, plan: Plan, functional: bool = False, width: int | None = None) -> None:
        plan = plan if width is None else replace(plan, divisor=None)  # a file has nothing to merge
        self.graph, self.plan, self.functional, self.width = graph, plan, functional, width
        self.steps = tuple(step for step, _ in plan.timed)
        self.known = {fn.name: fn.source for step in self.steps for fn in _every(helpers, step)}
        for fn in (fn for step in self.steps for fn in _every(helpers, step)):
            if fn.source != self.known[fn.name]:
                raise RuleError(f"two functions of rules are called {fn.name}, and are not the same", hint="rename one")
        inside = [each for step in self.steps for each in _inside(step.expr)]
        if any(isinstance(each, Rounds) and each.body.several for each in inside):
            self.known["added"] = ADDED
        self.bodies = list(dict.fromkeys(body for step in self.steps for body in bodies(step.expr)))
        for body in self.bodies:
            self.known |= {fn.name: fn.source for step in body.steps for fn in helpers(step.expr)}
        every = [*self.steps, *(step for body in self.bodies for step in body.steps)]
        self.taken = TAKEN | OWN | set(self.known) | words(every)
        outside = Scope(self.taken)
        self.functions = {body: _function_name(outside, body, k) for k, body in enumerate(self.bodies)}
        self.names = Scope(self.taken | set(self.functions.values()))
        for name in (*graph.inputs, *plan.given):
            self.names(plan.given[name])
        self.printer = self._printer(self.names)

    @cached_property
    def helpers(self) -> dict[str, str]:
        """The sources of those that the lines call after all passes."""
        lines = (line for each in (self.program.lines, *self.program.functions.values()) for line in each)
        called = {fn.name for line in lines for expr in _written(line) for fn in helpers(expr)} | {"added"}
        return {name: source for name, source in self.known.items() if name in called}

    def source(self, header: str) -> str:
        """All of it."""
        lines = [docstring(header), "", "import torch"]
        for source in self.helpers.values():
            lines += ["", "", source]
        for each in self.definitions():
            lines += ["", "", f"def {each.name}({', '.join(each.arguments)}):", *each.body]
        return "\n".join(lines) + "\n"

    def definitions(self) -> list[Definition]:
        """The functions that are not helpers."""
        arguments = ("tensors", *[PROGRESS] * followed(self.plan), *[HANDED] * _given_memory(self._exprs))
        calls, functions = self._straight()
        body = [*self._inputs(), *calls, *self._return()]
        return [*map(self._function, self.bodies), *functions, Definition("program", arguments, body)]

    def _straight(self) -> tuple[list[str], list[Definition]]:
        """The straight part, and the functions for what stands there several times."""
        lines, plain = self.program.lines, self.functional or self.width is not None
        rows = list(lines) if plain else shared(lines, self.program.kept, self.functions)
        inside = captured_by(lines)
        called = dict.fromkeys(row.shared for row in rows if isinstance(row, Use))
        names = {each: self.names.fresh("block") for each in called}
        shown: list[str] = []
        for calls, some in groupby(rows, lambda row: isinstance(row, Use)):
            if calls:
                shown += [line for use in some if isinstance(use, Use) for line in self._use(use, names[use.shared])]
            else:
                shown += written([row for row in some if isinstance(row, Line)], self.printer, inside=inside)
        return shown, [self._shared(each, name, inside) for each, name in names.items()]

    def _use(self, use: Use, name: str) -> list[str]:
        """The lines of a call."""
        handed = ", ".join(map(self.names, use.handed))
        args = [*_free(use.shared.lines), *[HANDOVER] * bool(handed), *map(self.names, use.params)]
        results = [self.names(value) for value in use.results]
        unread = ", ".join(map(self.names, use.unread))
        return [
            Comment(f"    # {comment(use.note)} …"),
            *[f"    {HANDOVER} = [{handed}]", f"    del {handed}"] * bool(handed),
            f"    {', '.join(results)}{',' * (len(results) == 1)} = {name}({', '.join(args)})",
            *[f"    del {unread}"] * bool(unread),
        ]

    def _shared(self, called: Shared, name: str, inside: set[Value]) -> Definition:
        """The function of what stands there several times."""
        names = Scope(self.taken | set(self.functions.values()) | {name}, "u")
        for value, hint in called.hints.items():
            if hint:
                names(value, hint)
        printer = self._printer(names)
        handed = ", ".join(map(names, called.handed))
        head = [f"    {handed}{',' * (len(called.handed) == 1)} = {HANDOVER}", f"    {HANDOVER}.clear()"] * bool(handed)
        args = [*_free(called.lines), *[HANDOVER] * bool(handed), *map(names, called.params)]
        results = ", ".join(map(names, called.results))
        body = [*head, *written(called.lines, printer, inside=inside), f"    return ({results},)"]
        return Definition(name, tuple(args), body)

    @cached_property
    def _exprs(self) -> list[Expr]:
        """Every expression of the straight part, with those of its loops."""
        return [expr for line in self.program.lines for expr in _written(line)]

    def _printer(self, names: Scope) -> Printer:
        return Printer(names, self.functions, self.width)

    def texts(self) -> dict[Value, tuple[str, str]]:
        """The name and the expression of every step, before anything is written over or elsewhere."""
        own = {step: (self.names(step), self.printer.text(step.expr)) for step in self.steps if step.expr is not None}
        for body in self.bodies:
            names = Scope(self.taken | set(self.functions.values()), "u")
            printer = self._printer(names)
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
        tensors = (*self._tensors, *plan.noises)
        given = frozenset({*(plan.given[name] for name in tensors), plan.like})
        return Program(
            lines, given, frozenset(plan.kept), functions, frozenset(plan.noises), frozenset(plan.operands)
        )

    @property
    def _tensors(self) -> tuple[str, ...]:
        """What is read from outside and not random, by the names of diagrams."""
        graph = self.graph
        return (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs, *self.plan.operands)

    def _floating(self) -> str:
        """What is called like, the first of those with the most bits."""
        graph = self.graph
        own = [n for n in (*graph.parameters, *graph.inputs) if graph.values[n].dtype.is_floating_point]
        return max(own, key=lambda name: graph.values[name].dtype.itemsize)

    def _inputs(self) -> list[str]:
        """The lines that take the tensors that are read."""
        plan = self.plan
        read = {value for expr in self._exprs for value in reads(expr)} | plan.kept
        floating = plan.given[self._floating()]
        end = [f"    {self.names(plan.like)} = {self.names(floating)}"] if plan.like in read else []
        read |= {floating} if end else set()
        if any(N in sizes_in(expr) for expr in self._exprs):
            name, axis = self._batch()
            read.add(plan.given[name])
            end.insert(0, f"    N = {self.names(plan.given[name])}.shape[{axis}]")
        lines = []
        for name in self._tensors:
            value = plan.given[name]
            if value in read:
                shape = ", ".join(map(str, value.shape))
                lines.append(f"    {self.names(value)} = tensors[{string(name)}]  # [{shape}]")
        noises = ((name, value) for name, value in plan.noises.items() if value in read)
        return [*lines, *(f"    {self.names(value)} = tensors[{string(name)}]" for name, value in noises), *end]

    def _batch(self) -> tuple[str, int]:
        """The input that says how many samples there are, and its axis."""
        for name in self.graph.inputs:
            for axis, factors in enumerate(self.graph.values[name].axes):
                if factors == (N,):
                    return name, axis
        raise AssertionError("no input has the batch")

    def _memory(self, value: Value) -> Expr:
        return Call(GIVE_MEMORY, (self.plan.like, value.shape))

    def context(self, kept: set[Value]) -> Context:
        """What the passes may know."""
        return Context(frozenset(kept), self.plan.is_large, self._memory, self.plan.like)

    def _function(self, body: Body) -> Definition:
        """A function of some samples."""
        names = Scope(self.taken | set(self.functions.values()), "u")
        printer = self._printer(names)
        params = [names(param) for param in body.params]
        assert body.batch is not None
        first, axis = body.batch
        own = passed(lines_of(body.steps), small(set(reads(body.results))))
        every = [*(expr for line in own for expr in _written(line)), *body.results]
        counted = any(N in sizes_in(expr) for expr in every)
        head = [f"    N = {names(first)}.shape[{axis}]"] if counted else []
        shown = ", ".join(printer.text(result) for result in body.results)
        last = f"    return ({shown},)" if body.several else f"    return {shown}"
        return Definition(
            self.functions[body], (*params, *["total"] * body.total), [*head, *written(own, printer), last]
        )

    def _return(self) -> list[str]:
        plan = self.plan
        leaves = pytree.tree_leaves(self.graph.output)
        shown = ", ".join(self.names(plan.output[leaf]) if leaf in plan.output else str(leaf) for leaf in leaves)
        lines = ["    results = {"]
        for quantity, by in self._values().items():
            lines.append(f"        {string(quantity)}: {{")
            lines += [self.printer.statement(f"            {string(name)}: ", value, ",") for name, value in by.items()]
            lines.append("        },")
        loss = self.names(plan.loss) if plan.loss is not None else "None"
        checks = f", [{', '.join(map(self.names, plan.checks.values()))}]" if plan.checks or plan.divisor else ""
        last = f", {self.names(plan.divisor)}" if plan.divisor else ""
        output = f"({shown},)" if leaves else "()"
        return ["\n".join([*lines, "    }"]), f"    return {loss}, {output}, results{checks}{last}"]

    def _values(self) -> dict[str, dict[str, Value | tuple[Value, ...]]]:
        """Quantity -> parameter -> a value, or its factors and then their means."""
        found: dict[str, dict[str, Value | tuple[Value, ...]]] = {}
        for result, by in self.plan.results.items():
            own = found.setdefault(result.quantity, {})
            for name, value in by.items():
                before = own.get(name, ())
                own[name] = value if result.factor is None else (*(before if isinstance(before, tuple) else ()), value)
        return found


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


class Comment(str):
    """A line that is no statement."""


@dataclass(frozen=True)
class Definition:
    """A function of a source: its name, its arguments, its statements and comments."""

    name: str
    arguments: tuple[str, ...]
    body: list[str]


def _written(line: Line) -> Iterator[Expr]:
    """What is written for a line: its expression; of a loop, what it runs over and the lines."""
    if line.block is None:
        yield line.expr
        return
    yield from (whole for _, whole in line.block.rows)
    yield from (expr for each in line.block.every for expr in _written(each))


def written(
    lines: Sequence[Line], printer: Printer, indent: str = "    ", inside: set[Value] | None = None
) -> list[str]:
    """One statement per value, and a comment where the subject changes; `inside`: what functions inside read."""
    inside = captured_by(lines) if inside is None else inside
    blocks = {line.value: line.block for line in lines if line.block is not None}
    shown: list[str] = []
    note = ""
    for line in lines:
        if line.note and line.note != note:
            note = line.note
            shown.append(Comment(f"{indent}# {comment(note)}"))
        if line.block is not None:
            shown += _loop(line.block, printer, indent)
        elif not any(value in blocks for value in line.inputs):  # what a loop leaves is there
            shown.append(printer.statement(f"{indent}{printer.names(line.value)} = ", line.expr))
        shown += freed([value for value in line.frees if value not in blocks], inside, printer, indent)
    return shown


def _loop(block: Block, printer: Printer, indent: str) -> list[str]:
    """A loop over columns."""
    cut = f"split({block.width})" if block.width > 1 else "unbind(0)"
    rows = [Row((printer.doc(whole, ATOM), f".{cut}")) for _, whole in block.rows]
    targets = ", ".join(printer.names(variable) for variable, _ in block.rows)
    over = Group("zip(", (*rows, "strict=True"), ")") if len(rows) > 1 else rows[0]
    head = printer.line(f"{indent}for {targets} in ", Group(f"{FOLLOWED}(", (over,), ")"), ":")
    again = printer.inside([*(variable for variable, _ in block.rows), *(line.value for line in block.lines)])
    inner = written(block.lines, again, f"{indent}    ")
    return [*written(block.begin, printer, indent), head, *inner, *written(block.end, printer, indent)]


def freed(values: Iterable[Value], inside: set[Value], printer: Printer, indent: str) -> list[str]:
    """Lines that let go of values; torch.compile knows no `del` of one that a function inside has captured."""
    every = list(values)
    plain = tuple(value for value in every if value not in inside)
    line = f"{indent}del {', '.join(map(printer.names, plain))}"
    fits = printer.width is None or len(line) <= printer.width
    lines = [line if fits else printer.statement(f"{indent}del ", plain)] if plain else []
    return lines + [f"{indent}{printer.names(value)} = None" for value in every if value in inside]


def followed(plan: Plan) -> bool:
    """Whether the program has rounds that a bar can follow."""
    return bool(plan.loops) or _rounds_followed(step.expr for step, _ in plan.timed)


def _rounds_followed(exprs: Iterable[Expr | None]) -> bool:
    return any(isinstance(each, Rounds) and each.followed for expr in exprs for each in _inside(expr))


def _given_memory(exprs: Iterable[Expr]) -> bool:
    """Whether something goes where memory is given."""
    return any(isinstance(each, Call) and each.fn is GIVE_MEMORY for expr in exprs for each in _inside(expr))


def _free(lines: Sequence[Line]) -> list[str]:
    """What lines of the program read that is no value: a function that has them is given it."""
    exprs = [line.expr for line in lines]
    read = {
        "N": any(N in sizes_in(expr) for expr in exprs),
        FOLLOWED: _rounds_followed(exprs),
        MEMORY: _given_memory(exprs),
    }
    return [name for name, is_read in read.items() if is_read]
