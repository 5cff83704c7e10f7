"""Plan: what is built once, what is put back in its place, and in which order everything is contracted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from ..bind import BoundRule
from ..diagram import COLUMN, Diagram, Leg, Size
from ..errors import UnsupportedError
from .beside import Beside
from .choose import Choice
from .contract import Lowering, build
from .cost import Kernel, Rates, Work, bytes_of
from .derived import Columns, Derived, Extraction
from .forward import call_code, call_written_over, fill, forward_work, is_fresh
from .graph import Call, Graph, op_text
from .items import named, scheduled, shaped
from .listing import alive
from .loops import Loop, Results, over_columns
from .memory import Piece, peak_bytes
from .pairs import written_over
from .root_steps import root_steps
from .samples import sample_by_sample
from .store import Ref, Step, Store

INDEFINITE = "#indefinite"
"""Key of the checks that a loss Hessian is positive semi-definite, among the results."""


@dataclass(frozen=True)
class Plan:
    """Straight-line steps and where the results are."""

    steps: tuple[Step, ...]
    results: Mapping[str, Mapping[str, str]]  # quantity -> parameter name -> code
    loss: str | None
    output: Mapping[str, str]  # value name in the model's output -> value
    choices: tuple[Choice, ...]
    batch: int
    itemsize: int
    rates: Rates
    shapes: Mapping[str, tuple[Size, ...]]
    functions: Mapping[str, str]  # slices of the batch: name -> source
    loops: tuple[Loop, ...] = ()
    pieces: Mapping[str, Piece] = field(default_factory=dict)  # steps that call a function of one sample -> its steps

    @property
    def timed(self) -> Iterator[tuple[Step, int]]:
        """Every step with the number of times that it runs."""
        yield from ((step, 1) for step in self.steps)
        for loop in self.loops:
            yield from ((step, loop.count) for step in loop.steps)
            yield from ((step, 1) for step in loop.after)

    @property
    def kept(self) -> set[str]:
        """The values that it is for."""
        codes = {code for by in self.results.values() for code in by.values()} | set(self.output.values())
        return codes | ({self.loss} if self.loss else set())

    @property
    def large(self) -> frozenset[str]:
        """The values whose memory the system would give page by page."""
        sizes = {name: bytes_of(shape, self.batch, self.itemsize) for name, shape in self.shapes.items()}
        return frozenset(name for name, size in sizes.items() if size > self.rates.fresh_threshold)

    @property
    def seconds(self) -> float:
        """Predicted, at the example's batch size."""
        each = ((self.rates.seconds(s.kernel, s.work, self.batch, self.itemsize), times) for s, times in self.timed)
        return sum(seconds * times for seconds, times in each)


def plan(
    graph: Graph,
    derived: Derived,
    lowerings: tuple[Lowering, ...],
    rates: Rates,
    itemsize: int,
    memory_limit: int | None = None,
) -> Plan:
    """The fastest plan whose peak is within `memory_limit` bytes, met by slicing the batch into ever smaller pieces."""
    best = _plan(graph, derived, lowerings, rates, itemsize, None)
    chunk = graph.example_batch
    while memory_limit is not None and peak_bytes(best) > memory_limit:
        if chunk == 1:
            raise UnsupportedError(
                f"memory_limit={memory_limit} bytes cannot be met: one sample at a time still takes "
                f"{peak_bytes(best):.0f} bytes.\n  Results and forward values count, too: ask for fewer quantities, "
                "or compile with a smaller example batch."
            )
        chunk = (chunk + 1) // 2
        best = _plan(graph, derived, lowerings, rates, itemsize, chunk)
    return best


def _plan(
    graph: Graph, derived: Derived, lowerings: tuple[Lowering, ...], rates: Rates, itemsize: int, chunk: int | None
) -> Plan:
    """Steps for the forward, the cotangents and every result, cheapest first, dead ones dropped."""
    store = Store(rates, graph.example_batch, itemsize)
    _inputs(store, graph)
    _forward(store, graph, {call.output.name: rule for call, rule in derived.bound}, lowerings)
    choices: list[Choice] = []
    ahead = next((columns.beside for columns in derived.columns if columns.beside), len(derived.schedule))
    results = scheduled(store, graph, derived.schedule[:ahead], lowerings, chunk, choices)
    checks: dict[str, str] = {}
    loops, pieces = _sweeps(store, graph, derived, lowerings, chunk, choices, results, checks)
    if checks:
        results[INDEFINITE] = checks
    output = {name: store.resolve(name) for name in names_in(graph.output)}
    loss = store.resolve(graph.loss) if graph.loss else None
    inner = {step.name for loop in loops for step in loop.steps}
    wanted = {*output.values(), *(code for by in results.values() for code in by.values()), *([loss] if loss else [])}
    wanted |= {name for loop in loops for name in loop.reads}
    steps = alive((step for step in store.steps if step.name not in inner), wanted)
    shapes = store.shapes | {out: _total(loop, store.shapes[own], out) for loop in loops for own, out in loop.outputs}
    return Plan(
        steps, _in_order(results, graph), loss, output, tuple(choices), graph.example_batch, itemsize, rates, shapes,
        store.functions, tuple(loops), pieces,
    )  # fmt: skip


def _sweeps(
    store: Store,
    graph: Graph,
    derived: Derived,
    lowerings: tuple[Lowering, ...],
    chunk: int | None,
    choices: list[Choice],
    results: dict[str, dict[str, str]],
    checks: dict[str, str],
) -> tuple[list[Loop], dict[str, Piece]]:
    """All sweeps of columns, and what is called for each sample.

    Those in a loop come last: what it sums may go on from results of the others.
    """
    saved = [each.name for _, rule in derived.bound for each in rule.saved]
    looped: list[tuple[Columns, Mapping[str, str]]] = []
    pieces: dict[str, Piece] = {}
    for columns in sorted(derived.columns, key=lambda each: not each.beside):  # what is left of the gradient first
        rows = root_steps(store, graph, columns, lowerings, checks)
        apart = sample_by_sample(store, graph, columns, saved, rows, lowerings) if columns.alone else None
        if apart is not None:
            choices += apart.choices
            pieces[apart.call] = apart.piece
            _gather(results, _together(store, apart.results, results))
        elif columns.beside:
            both = Beside(store, graph, lowerings, columns, derived.swept)
            for found in both.build(derived.schedule[columns.beside :], chunk, choices):
                _gather(results, found)
        elif columns.looped:
            looped.append((columns, rows))
        else:
            mine = scheduled(store, graph, columns.schedule, lowerings, chunk, choices, columns.carried)
            _gather(results, _together(store, mine, results))
    loops = []
    for columns, varying in looped:
        store.in_rounds(columns.rounds, varying)
        mine = scheduled(store, graph, columns.schedule, lowerings, chunk, choices, columns.carried)
        stacked = {q for item in columns.schedule if isinstance(item, Extraction) for q in _with_columns(item)}
        loop, sums = over_columns(store, varying, columns, mine, stacked, results)
        store.in_rounds(1)
        loops.append(loop)
        _gather(results, sums)
    return loops, pieces


def _gather(results: dict[str, dict[str, str]], mine: Results) -> None:
    for quantity, by in mine.items():
        results.setdefault(quantity, {}).update(by)


def _together(store: Store, mine: Results, earlier: Results) -> dict[str, dict[str, str]]:
    """The results of a sweep added to what earlier sweeps have contributed."""
    return {
        quantity: {name: _sum(store, earlier.get(quantity, {}).get(name), value) for name, value in by.items()}
        for quantity, by in mine.items()
    }


def _sum(store: Store, one: str | None, other: str) -> str:
    if one is None:
        return other
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(store.shapes[other]))
    work = Work(flops=((1, legs),), moved=((3, legs),), fresh=((1, legs),))
    codes = [one, other]
    into = written_over(store, [Ref(code, legs, legs) for code in codes], codes, legs, "add_")
    return store.add(" + ".join(codes), store.shapes[other], Kernel.ELEMENTWISE, work, own=True, into=into)


def _total(loop: Loop, shape: tuple[Size, ...], total: str) -> tuple[Size, ...]:
    """The shape of what a loop gives: a concatenation has a row per column."""
    return (loop.columns, *shape[1:]) if total in loop.stacked else shape


def _with_columns(item: Extraction) -> set[str]:
    """The quantities whose results keep the column leg."""
    return {q for q, diagram in item.diagrams.items() if any(leg.name == COLUMN for leg in diagram.legs)}


def _in_order(results: dict[str, dict[str, str]], graph: Graph) -> dict[str, dict[str, str]]:
    """Parameters in the order of the model, not of the sweep."""
    names = [dotted[0] for dotted in graph.parameters.values()]
    return {q: {name: by[name] for name in (*names, *by) if name in by} for q, by in results.items()}


def _inputs(store: Store, graph: Graph) -> None:
    for name in (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs):
        store.shapes[name] = graph.values[name].shape
    store.shapes["like"] = ()
    dtypes = {value.dtype for value in graph.values.values() if value.dtype.is_floating_point}
    if len(dtypes) == 1:
        store.floating |= {name for name, value in graph.values.items() if value.dtype in dtypes}


def _forward(store: Store, graph: Graph, bound: Mapping[str, BoundRule], lowerings: tuple[Lowering, ...]) -> None:
    """The model's own calls. Inner lines of a rule are built when a derivative reads them."""
    for call in graph.calls:
        rule = bound.get(call.output.name)
        store.note = _note(call)
        if rule is not None:
            _saved(store, rule)
        for equation in rule.equations[:-1] if rule is not None else ():
            assert equation.diagram is not None
            supply = partial(_supply, name=equation.name, diagram=equation.diagram, lowerings=lowerings)
            store.suppliers[equation.name] = supply
        if rule is not None and rule.forward:
            code = fill(rule.forward, store.resolve)
        elif call.by_rule:
            code = _from_formula(store, call, rule, lowerings)
        else:
            code = call_code(call, store.resolve)
        name, (kernel, work) = call.output.name, forward_work(rule)
        store.works[name] = kernel, work
        random = torch.Tag.nondeterministic_seeded in getattr(call.target, "tags", ())
        plain = not (call.by_rule or (rule is not None and rule.forward) or random)
        into = call_written_over(call, store.resolve) if plain else ()
        own = is_fresh(call) and plain
        store.add(code, call.output.shape, kernel, work, name=name, alone=random, own=own, into=into)


def _from_formula(store: Store, call: Call, rule: BoundRule | None, lowerings: tuple[Lowering, ...]) -> str:
    """Code for a call whose forward is its rule's formula."""
    diagram = rule.equations[-1].diagram if rule is not None else None
    if diagram is None:
        raise UnsupportedError(f"{call.where} has a rule without a formula: give the rule a forward.")
    return shaped(store, build(store, diagram, lowerings), call.output.shape)


def _saved(store: Store, rule: BoundRule) -> None:
    for saved in rule.saved:
        code = fill(saved.code, store.resolve)
        store.add(code, saved.shape, Kernel.NATIVE, Work(moved=((2, saved.legs),)), name=saved.name, alone=True)


def _supply(store: Store, name: str, diagram: Diagram, lowerings: tuple[Lowering, ...]) -> None:
    named(store, build(store, diagram, lowerings), name)


def names_in(output: object) -> list[str]:
    """The value names in the pytree that the model returns."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, str)]


def _note(call: Call) -> str:
    return f"{call.path or 'model'}: {op_text(call.target).removeprefix('aten.')}"
