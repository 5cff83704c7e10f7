"""Plan: what is built once, what is put back in its place, and in which order everything is contracted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ...diagram.core import COLUMN, Diagram, Size, hint_of
from ...errors import UnsupportedError
from ...notation.bind import BoundRule
from ..entered.forward import called, fill, forward_work, seen_in
from ..entered.own_forward import own_forward
from ..entered.root_steps import root_steps
from ..lower.arrange import added, reshaped
from ..lower.candidate import Lowering
from ..lower.contract import build
from ..lower.table import LOWERINGS
from ..program.cost import Kernel, Rates, Work, bytes_of
from ..program.expr import Expr, Rounds, Value
from ..program.lines import alive
from ..program.memory import peak_of
from ..program.store import LIKE, Store, Supplier
from ..running.drawing_calls import draws
from ..sweep.derived import Columns, Derived, Extraction, Result
from ..translate.graph import Call, Graph, op_text
from ..translate.operators import Memory, row_of
from ..translate.torch_internals import overload
from .choose import Choice
from .items import named, scheduled, shaped
from .joint import JointSweep
from .loops import Results, over_columns
from .phases import enter_phases
from .relative import make_relative
from .samples import sample_by_sample
from .slices import columns_first


@dataclass(frozen=True)
class Plan:
    """Straight-line steps and where the results are."""

    steps: tuple[Value, ...]
    results: Mapping[Result, Mapping[str, Value]]  # by result and parameter
    checks: Mapping[str, Value]  # that a loss Hessian is positive semi-definite
    loss: Value | None
    output: Mapping[str, Value]  # by name in the model's output
    choices: tuple[Choice, ...]
    batch: int
    itemsize: int
    rates: Rates
    given: Mapping[str, Value]  # what the program reads: tensors of the model, constants, inputs, noise
    noises: Mapping[str, Value]  # those that are random
    like: Value
    columns: Mapping[str, Value]  # variable of a sweep -> all its columns, or those that are drawn in a round
    forward: Mapping[str, Value]  # what the calls of the model give, and what rules save of them
    operands: tuple[str, ...] = ()  # what of it is handed in for quantities
    divisor: Value | None = None  # what the loss is divided by besides N

    @property
    def timed(self) -> Iterator[tuple[Value, int]]:
        """Every step with the number of times that it runs: in place of rounds of columns their own."""
        for step in self.steps:
            if isinstance(step.expr, Rounds) and step.expr.of_columns:
                yield from ((each, step.expr.count) for each in step.expr.body.steps)
            elif step.kernel is not Kernel.ROUNDS:
                yield step, 1

    @property
    def loops(self) -> tuple[Rounds, ...]:
        """The rounds of columns."""
        every = (step.expr for step in self.steps if isinstance(step.expr, Rounds))
        return tuple(rounds for rounds in every if rounds.of_columns)

    @property
    def kept(self) -> set[Value]:
        """The values that it is for."""
        found = {*self.output.values(), *self.checks.values()}
        found |= {value for by in self.results.values() for value in by.values()}
        return found | {value for value in (self.loss, self.divisor) if value is not None}

    def is_large(self, value: Value) -> bool:
        """Whether the system would give its memory page by page."""
        return bytes_of(value.shape, self.batch, self.itemsize) > self.rates.fresh_threshold

    @property
    def seconds(self) -> float:
        """Predicted, at the example's batch size."""
        return sum(self.rates.seconds(step.kernel, step.work, self.batch, self.itemsize) for step in self.steps)

    @property
    def kept_bytes(self) -> float:
        """Of the values that it is for."""
        return sum(bytes_of(value.shape, self.batch, self.itemsize) for value in self.kept)

    @property
    def peak_bytes(self) -> float:
        """The most that it holds at once, results included, inputs and parameters not.

        Of results that are one value each but the first is a copy in the end.
        """
        times = Counter(value for by in self.results.values() for value in by.values())
        sizes = ((count - 1, bytes_of(value.shape, self.batch, self.itemsize)) for value, count in times.items())
        copies = sum(more * each for more, each in sizes)
        return peak_of(self.steps, self.kept, self.batch, self.itemsize, copies)


def plan(
    graph: Graph,
    derived: Derived,
    rates: Rates,
    itemsize: int,
    memory_limit: int | None = None,
    lowerings: tuple[Lowering, ...] = LOWERINGS,
    accumulate: torch.dtype | None = None,
) -> Plan:
    """The fastest plan whose peak is within `memory_limit` bytes, met by slicing the batch into ever smaller pieces.

    accumulate  the dtype of squares and factors, where that is not the model's
    """
    best = _plan(graph, derived, rates, itemsize, None, lowerings, accumulate)
    chunk = graph.example_batch
    while memory_limit is not None and best.peak_bytes > memory_limit:
        if chunk == 1:
            raise UnsupportedError(
                f"memory_limit={memory_limit} bytes cannot be met: one sample at a time still takes "
                f"{best.peak_bytes:.0f} bytes.\n  Results and forward values count, too: ask for fewer quantities, "
                "or compile with a smaller example batch."
            )
        chunk = (chunk + 1) // 2
        best = _plan(graph, derived, rates, itemsize, chunk, lowerings, accumulate)
    return best


def _plan(
    graph: Graph,
    derived: Derived,
    rates: Rates,
    itemsize: int,
    chunk: int | None,
    lowerings: tuple[Lowering, ...],
    accumulate: torch.dtype | None,
) -> Plan:
    """Steps for the forward, the cotangents and every result, cheapest first, dead ones dropped."""
    store = Store(rates, graph.example_batch, itemsize)
    store.lowerings, store.outermost = lowerings, (columns_first,)
    store.accumulate = accumulate
    _inputs(store, graph)
    operands = _operands(store, derived)
    _forward(store, graph, {call.output.name: rule for call, rule in derived.bound})
    choices: list[Choice] = []
    results: dict[Result, dict[str, Value]] = {}
    checks: dict[str, Value] = {}
    begun: dict[int, Mapping[str, Value]] = {}
    for level in range(derived.last + 1):
        enter_phases(store, derived, level, results)
        now = derived.at(level) if derived.last else derived
        ahead = next((columns.joint for columns in now.columns if columns.joint), len(now.schedule))
        _gather(results, scheduled(store, graph, now.schedule[:ahead], chunk, choices))
        _sweeps(store, graph, now, chunk, choices, results, checks, begun)
    make_relative(store, graph, derived, results)
    for quantity, by in derived.inputs.items():
        results[Result(quantity)] = {name: _in_shape(store, g, graph.values[name].shape) for name, g in by.items()}
    results = {q: by for q, by in results.items() if q.quantity not in derived.hidden}
    output = {name: store.find(name) for name in names_in(graph.output)}
    loss = store.find(graph.loss) if graph.loss else None
    wanted = {*output.values(), *(value for by in results.values() for value in by.values()), *checks.values()}
    divisor = store.find(derived.divisors[0]) if loss and len(derived.divisors) == 1 else None
    wanted |= {value for value in (loss, divisor) if value is not None}
    steps = alive(store.steps, wanted)
    given = {name: value for name, value in store.names.items() if value.expr is None and name != LIKE}
    return Plan(
        steps, _in_order(results, graph), checks, loss, output, tuple(choices), graph.example_batch, itemsize, rates,
        given, store.noises, store.like, {c.variable: _start(store, c, begun[c.number]) for c in derived.columns},
        _forward_values(store, graph, derived), operands, divisor,
    )  # fmt: skip


def _start(store: Store, columns: Columns, rows: Mapping[str, Value]) -> Value:
    return rows.get(columns.variable) or store.find(columns.variable)


def _in_shape(store: Store, name: str, shape: tuple[Size, ...]) -> Value:
    """A cotangent with all axes of size 1."""
    value = store.find(name)
    expr = reshaped(value, value.shape, shape)
    return expr if isinstance(expr, Value) else store.add(expr, shape, Kernel.VIEW)


def _operands(store: Store, derived: Derived) -> tuple[str, ...]:
    """What is read beside the model's tensors: what quantities are handed, and what they have computed reads."""
    for name, reading in derived.handed.items():
        store.given(name, reading.sizes, store.one_dtype)
    constants = derived.constants
    for name, tensor in constants.items():
        store.given(name, tuple(tensor.shape), store.one_dtype and tensor.is_floating_point())
    return (*derived.handed, *constants)


def _forward_values(store: Store, graph: Graph, derived: Derived) -> dict[str, Value]:
    saved = [each.name for _, rule in derived.bound for each in rule.saved]
    return {name: store.find(name) for name in (*saved, *(call.output.name for call in graph.calls))}


def _sweeps(
    store: Store,
    graph: Graph,
    derived: Derived,
    chunk: int | None,
    choices: list[Choice],
    results: dict[Result, dict[str, Value]],
    checks: dict[str, Value],
    begun: dict[int, Mapping[str, Value]],
) -> None:
    """All sweeps of columns. Those in a loop come last: what it sums may go on from results of the others."""
    looped: list[tuple[Columns, Mapping[str, Value]]] = []
    for columns in sorted(derived.columns, key=lambda each: not each.joint):  # what is left of the gradient first
        if columns.number not in begun:
            begun[columns.number] = root_steps(store, graph, columns, checks)
        rows = begun[columns.number]
        swept = sample_by_sample(store, graph, columns, rows) if columns.per_sample else None
        if swept is not None:
            choices += swept.choices
            _gather(results, _together(store, swept.results, results))
        elif columns.joint:
            both = JointSweep(store, graph, columns, derived.swept)
            for found in both.build(derived.schedule[columns.joint :], chunk, choices):
                _gather(results, found)
        elif columns.looped:
            looped.append((columns, rows))
        else:
            mine = scheduled(store, graph, columns.schedule, chunk, choices, columns.carried)
            _gather(results, _together(store, mine, results))
    for columns, rows in looped:
        varying = {store.find(name): value for name, value in rows.items()}
        store.in_rounds(columns.rounds, varying)
        mine = scheduled(store, graph, columns.schedule, chunk, choices, columns.carried)
        stacked = {q for item in columns.schedule if isinstance(item, Extraction) for q in _with_columns(item)}
        sums = over_columns(store, varying, columns, mine, stacked, results)
        store.in_rounds(1)
        _gather(results, sums)


def _gather(results: dict[Result, dict[str, Value]], mine: Results) -> None:
    for quantity, by in mine.items():
        results.setdefault(quantity, {}).update(by)


def _together(store: Store, mine: Results, earlier: Results) -> dict[Result, dict[str, Value]]:
    """The results of a sweep added to what earlier sweeps have contributed."""
    return {
        quantity: {name: _sum(store, earlier.get(quantity, {}).get(name), value) for name, value in by.items()}
        for quantity, by in mine.items()
    }


def _sum(store: Store, one: Value | None, other: Value) -> Value:
    return other if one is None else added(store, one, other)


def _with_columns(item: Extraction) -> set[Result]:
    """The results that keep the column leg."""
    return {q for q, diagram in item.diagrams.items() if any(leg.name == COLUMN for leg in diagram.legs)}


def _in_order(results: dict[Result, dict[str, Value]], graph: Graph) -> dict[Result, dict[str, Value]]:
    """Parameters in the order of the model, not of the sweep; all factors of a quantity before their means."""
    names = [dotted[0] for dotted in graph.parameters.values()]
    ordered = sorted(results.items(), key=lambda each: each[0].mean)  # parameters differ in how many factors they have
    return {q: {name: by[name] for name in (*names, *by) if name in by} for q, by in ordered}


def _inputs(store: Store, graph: Graph) -> None:
    dtypes = {value.dtype for value in graph.values.values() if value.dtype.is_floating_point}
    store.several = len(dtypes) > 1
    dtypes |= set() if store.accumulate is None else {store.accumulate}
    store.one_dtype, store.mixed = len(dtypes) == 1, len(dtypes) > 1
    for name in (*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs):
        value = graph.values[name]
        store.given(name, value.shape, store.one_dtype and value.dtype in dtypes)
    store.like = store.given(LIKE, ())
    kinds = ((name, value.dtype) for name, value in graph.values.items())
    store.integers = frozenset(name for name, kind in kinds if not (kind.is_floating_point or kind.is_complex))


def _forward(store: Store, graph: Graph, bound: Mapping[str, BoundRule]) -> None:
    """The model's own calls. Inner lines of a rule are built when a derivative reads them."""
    for call in graph.calls:
        rule = bound.get(call.output.name)
        store.note = _note(call)
        ahead = rule is not None and (bool(rule.forward) or call.by_rule)  # what the call itself may read
        if rule is not None and ahead:
            _saved(store, rule)
        native = {saved.name for saved in rule.saved} if rule is not None else set()
        for equation in rule.equations[:-1] if rule is not None else ():
            assert equation.diagram is not None
            if equation.name in native:
                continue
            store.suppliers[equation.name] = Supplier(equation.diagram, _supply)
        random = draws(call.target, call.arguments)
        own: bool | None = None
        if rule is not None and rule.forward:
            expr = fill(store, rule.forward, {})
        elif call.by_rule:
            expr, own = _from_formula(store, call, rule), False
        else:
            expr, own = called(store, call, random), False if random else None
        name, (kernel, work) = call.output.name, forward_work(rule)
        store.works[name] = kernel, work
        floating = store.one_dtype and call.output.dtype.is_floating_point
        kernel, work, strided = seen_in(store, call, (kernel, work))
        made = store.add(
            expr, call.output.shape, kernel, work, hint=name, alone=random, own=own, floating=floating, strided=strided
        )
        store.name(name, made)
        if rule is not None and not ahead:
            _saved(store, rule)


def _from_formula(store: Store, call: Call, rule: BoundRule | None) -> Expr:
    """A call whose forward is its rule's formula, or where that has Jacobians alone what it runs itself."""
    diagram = rule.equations[-1].diagram if rule is not None else None
    if diagram is None:
        return own_forward(store, call)
    return shaped(store, build(store, diagram), call.output.shape)


def _saved(store: Store, rule: BoundRule) -> None:
    for saved in rule.saved:
        expr, work, call = fill(store, saved.code, {}), Work(moved=((2, saved.legs),)), saved.code.call
        own = (bool(call.aten) and row_of(overload(call.aten)).memory is Memory.OWN) or None
        made = store.add(expr, saved.shape, Kernel.NATIVE, work, hint=hint_of(saved.name), alone=True, own=own)
        store.name(saved.name, made)


def _supply(store: Store, name: str, diagram: Diagram) -> None:
    named(store, build(store, diagram), name)


def names_in(output: object) -> list[str]:
    """The value names in the pytree that the model returns."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, str)]


def _note(call: Call) -> str:
    return f"{call.path or 'model'}: {op_text(call.target).removeprefix('aten.')}"
