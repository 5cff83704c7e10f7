"""Plan: what is built once, what is put back in its place, and in which order everything is contracted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch

from ..bind import BoundRule
from ..diagram import COLUMN, Diagram, Leg, N, Size, is_head
from ..errors import UnsupportedError
from .arrange import arranged, sizes_of, text
from .choose import Choice, choose
from .contract import Lowering, build
from .cost import Kernel, Rates, Terms, Work
from .derived import Backward, Derived, Extraction, Individual, Native, Schedule
from .forward import call_code, call_written_over, fill, forward_work, is_fresh, vjp_written_over
from .graph import Call, Graph, op_text
from .listing import alive
from .loops import Loop, Results, over_columns
from .memory import peak_bytes
from .pairs import written_over
from .root_steps import root_steps
from .store import NO_WORK, Ref, Step, Store

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

    @property
    def timed(self) -> Iterator[tuple[Step, int]]:
        """Every step with the number of times that it runs."""
        yield from ((step, 1) for step in self.steps)
        for loop in self.loops:
            yield from ((step, loop.count) for step in loop.steps)
            yield from ((step, 1) for step in loop.after)

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
    results = _scheduled(store, graph, derived.schedule, lowerings, chunk, choices)
    loops = []
    checks: dict[str, str] = {}
    # Sweeps without a loop come first: what a loop sums may go on from their results.
    for columns in sorted(derived.columns, key=lambda c: c.looped):
        rows = root_steps(store, graph, columns, lowerings, checks)
        if columns.looped:
            store.in_rounds(columns.rounds, rows)
        mine = _scheduled(store, graph, columns.schedule, lowerings, chunk, choices, columns.carried)
        if columns.looped:
            stacked = {q for item in columns.schedule if isinstance(item, Extraction) for q in _with_columns(item)}
            loop, mine = over_columns(store, rows, columns, mine, stacked, results)
            loops.append(loop)
            store.in_rounds(1)
        else:
            mine = _together(store, mine, results)
        for quantity, by in mine.items():
            results.setdefault(quantity, {}).update(by)
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
        store.functions, tuple(loops),
    )  # fmt: skip


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


def _scheduled(
    store: Store,
    graph: Graph,
    schedule: Schedule,
    lowerings: tuple[Lowering, ...],
    chunk: int | None,
    choices: list[Choice],
    lead: tuple[Leg, ...] = (),
) -> dict[str, dict[str, str]]:
    """Every item of a sweep; quantity -> parameter name -> value."""
    results: dict[str, dict[str, str]] = {}
    for item in schedule:
        if isinstance(item, Backward):
            _backward(store, graph, item, lowerings, lead)
        elif isinstance(item, Individual):
            ref = _native(store, item.native, (N, *graph.values[item.of].shape), lead)
            _name(store, ref, item.name)
        else:
            codes, choice = _extract(store, graph, item, lowerings, chunk)
            choices.append(choice)
            for quantity, code in codes.items():
                results.setdefault(quantity, {})[graph.parameters[item.parameter][0]] = code
    return results


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
    return _shaped(store, build(store, diagram, lowerings), call.output.shape)


def _saved(store: Store, rule: BoundRule) -> None:
    for saved in rule.saved:
        code = fill(saved.code, store.resolve)
        store.add(code, saved.shape, Kernel.NATIVE, Work(moved=((2, saved.legs),)), name=saved.name, alone=True)


def _supply(store: Store, name: str, diagram: Diagram, lowerings: tuple[Lowering, ...]) -> None:
    _name(store, build(store, diagram, lowerings), name)


def _name(store: Store, ref: Ref, name: str) -> None:
    """Call a built value `name`; a value in another memory order is read through a permuted view."""
    if ref.order == ref.stored:
        store.alias[name] = store.resolve(ref.name)
    else:
        code = arranged(store, ref, tuple((leg,) for leg in ref.order))
        store.add(code, sizes_of(ref.order), Kernel.VIEW, name=name, strided=True)


def _backward(
    store: Store, graph: Graph, item: Backward, lowerings: tuple[Lowering, ...], lead: tuple[Leg, ...]
) -> None:
    """One cotangent: the sum of what its users send, each by native code or by its diagram."""
    what = f"cotangent of {item.value}" if item.value else "averaged matrix"
    store.note = what + (f", {item.note}" if item.note else "")
    shape = graph.values[item.value].shape if item.value in graph.values else None
    refs = []
    for term in item.terms:
        if isinstance(term, Native):
            refs.append(_native(store, term, shape, lead))
        else:
            refs.append(build(store, term, lowerings))
    if len(refs) == 1:
        _name(store, refs[0], item.name)
        return
    shape = (*sizes_of(lead), *shape) if shape is not None else sizes_of(refs[0].order)
    codes = [_shaped(store, ref, shape) for ref in refs]
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(shape))
    work = Work(flops=((len(refs) - 1, legs),), moved=((len(refs) + 1, legs),), fresh=((1, legs),))
    in_order = [Ref(ref.name, legs, legs) if ref.order == ref.stored else None for ref in refs]
    into = written_over(store, in_order, codes, legs, "add_")
    store.add(" + ".join(codes), shape, Kernel.ELEMENTWISE, work, name=item.name, own=True, into=into)


def _native(store: Store, term: Native, shape: tuple[Size, ...] | None, lead: tuple[Leg, ...]) -> Ref:
    """Native code; over the columns that ride together by vmap, unless it takes them itself."""
    assert shape is not None
    cotangent = store.resolve(term.cotangent)
    out = store.shapes[store.resolve(term.of)]
    if not any(N in factor.free_symbols for factor in out if not isinstance(factor, int)):
        out = (N, *out)  # a value of parameters: one cotangent per sample
    out = (*sizes_of(lead), *out)
    shown = cotangent if store.shapes[cotangent] == out else f"{cotangent}.reshape({text(out)})"
    together = "{cotangents}" in term.code
    if together and shown != cotangent:
        shown = store.add(shown, out, Kernel.VIEW)
    mapped = bool(lead) and not together
    filled = term.code.replace("{cotangents}", shown).replace("{cotangent}", "each" if mapped else shown)
    code = fill(filled, store.resolve)
    code = f"torch.func.vmap(lambda each: {code})({shown})" if mapped else code
    legs = (*lead, *(Leg(f"a{k}", size) for k, size in enumerate(shape)))
    kernel, forward = store.works.get(term.of, (Kernel.NATIVE, NO_WORK))
    scaled = replace(forward, flops=_times(forward.flops, lead), moved=_times(forward.moved, lead))
    moved = (*scaled.moved, (1, legs)) if scaled.moved else ((3, legs),)
    work = Work(scaled.flops or ((2, legs),), moved, ((1, legs),))
    own = term.code.startswith("torch.ops.aten.") and "_backward(" in term.code  # others may return what they are given
    own = own or term.code.startswith("{cotangents}.new_zeros(")
    name = store.add(code, sizes_of(legs), kernel, work, own=own, into=vjp_written_over(code, shown))
    return Ref(name, legs, legs)


def _times(terms: Terms, lead: tuple[Leg, ...]) -> Terms:
    return tuple((c, (*lead, *legs)) for c, legs in terms)


def _shaped(store: Store, ref: Ref, shape: tuple[Size, ...]) -> str:
    """Code for a value in its legs' order, with the given shape."""
    now = sizes_of(ref.order)
    code = arranged(store, ref, tuple((leg,) for leg in ref.order))
    if code == store.resolve(ref.name):
        now = store.shapes[code]
    if now == shape:
        return code
    if ref.order == ref.stored:  # one reshape is enough
        name = store.resolve(ref.name)
        return name if store.shapes[name] == shape else f"{name}.reshape({text(shape) or '()'})"
    return f"{code}.reshape({text(shape) or '()'})"


def _extract(
    store: Store, graph: Graph, item: Extraction, lowerings: tuple[Lowering, ...], chunk: int | None
) -> tuple[dict[str, str], Choice]:
    """All results of one parameter, with the set of parts that makes them cheapest together."""
    dotted = graph.parameters[item.parameter][0]
    store.note = f"{dotted}"
    choice, refs = choose(store, item, dotted, lowerings, chunk)
    codes = {}
    for quantity, ref in refs.items():
        store.note = f"{quantity} of {dotted}"
        whole = "#" not in quantity
        shape = _result_shape(ref.order, graph.values[item.parameter].shape) if whole else sizes_of(ref.order)
        codes[quantity] = _final(store, _shaped(store, ref, shape), shape, ref)
    return codes, choice


def _result_shape(order: tuple[Leg, ...], shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The legs that are copies of the batch (and columns) first, then the parameter's own shape, as often as it is."""
    head = tuple(leg.size for leg in order if is_head(leg))
    rest = tuple(leg.size for leg in order if not is_head(leg))
    copies = _copies(rest, prod(int(size) for size in shape))
    return (*head, *(rest if copies is None else shape * copies))


def _copies(sizes: tuple[Size, ...], elements: int) -> int | None:
    """How many runs of legs have as many elements as the parameter; None if the legs are not made of such runs."""
    found, run = 0, 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        run *= size
        if run == elements:
            found, run = found + 1, 1
    return found if run == 1 else None


def _final(store: Store, code: str, shape: tuple[Size, ...], ref: Ref) -> str:
    """A name for the result, so that no two results share memory with each other or with an input by accident."""
    if code == store.resolve(ref.name):
        return code
    if any(step.name == store.resolve(ref.name) and ".expand(" in step.code for step in store.steps):
        code += ".contiguous()"  # a constant result must be one that can be written to
    return store.add(code, shape, Kernel.VIEW, strided=ref.order != ref.stored)


def names_in(output: object) -> list[str]:
    """The value names in the pytree that the model returns."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, str)]


def _note(call: Call) -> str:
    return f"{call.path or 'model'}: {op_text(call.target).removeprefix('aten.')}"

