"""Samples: columns that are many for each sample are propagated sample by sample, all those of one together.

Filled up with zeros to even matrices, they are one sweep that is planned for a batch of one: a function of a sample in
the source, whose results are summed over its calls. What depends on parameters alone is computed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...diagram.core import BATCH, Diagram, N, Part, Product, is_head
from ..lower.arrange import legs_of
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import Body, Call, Expr, Join, Rounds, Value, replaced, sizes_in
from ..program.lines import alive
from ..program.memory import peak_of
from ..program.numbers import TOTAL
from ..program.store import Store
from ..sweep.derived import Backward, Columns, Derived, Extraction, Individual, Native, Result, Schedule
from ..translate.graph import Graph
from .choose import Choice
from .items import scheduled
from .slices import pairs_samples

Results = dict[Result, dict[str, Value]]


@dataclass(frozen=True)
class Swept:
    """What came of a sweep: its results, and what was chosen for them."""

    results: Results
    choices: tuple[Choice, ...]


def separable(derived: Derived) -> bool:
    """Whether all sweeps that should go sample by sample can: their results are sums over samples."""
    return all(_separable(columns.schedule) for columns in derived.columns if columns.per_sample)


def _separable(schedule: Schedule) -> bool:
    """Kronecker factors stay together: those of the input are one tensor for all sweeps."""
    found = [diagram for item in schedule if isinstance(item, Extraction) for diagram in item.diagrams.values()]
    found += [diagram for item in schedule if isinstance(item, Extraction) for diagram in item.condensed.values()]
    extracted = (item for item in schedule if not isinstance(item, Backward))
    plain = all(isinstance(item, Extraction) and not (item.factors or item.streams) for item in extracted)
    return plain and all(_sums(diagram) for diagram in found)


def _sums(diagram: Diagram) -> bool:
    """Whether it is a sum over samples, and inside of it each has its own."""
    separate = all(BATCH in p.legs and not pairs_samples(p, diagram.legs) and _each(p) for p in diagram.products)
    return separate and not any(is_head(leg) for leg in diagram.legs)


def _each(product: Product) -> bool:
    parts = [op for op in product.operands if isinstance(op, Part)]
    return all(BATCH in part.legs and all(map(_each, part.diagram.products)) for part in parts)


def sample_by_sample(
    store: Store,
    graph: Graph,
    columns: Columns,
    rows: Mapping[str, Value],
) -> Swept | None:
    """A sweep as the sum over calls of a function of one sample; None if it reads what has no samples.

    rows  the columns and their weights: variable -> value
    """
    small, outside = _small(store, rows)
    small.in_rounds(1, [small.find(name) for name in rows])
    made: list[Choice] = []
    results = scheduled(small, graph, _in_total(columns.schedule), None, made, columns.carried)
    values = tuple(dict.fromkeys(value for by in results.values() for value in by.values()))
    plain = {store.find(name) for name in (*graph.parameters, *graph.buffers, *graph.constants)} | {store.like}
    fixed = {inner for inner, outer in outside.items() if outer in plain and inner.key not in rows}
    steps = _without_samples(store, alive(small.steps, set(values)), values, fixed, outside)
    own = set(steps)
    begin = [*map(small.find, rows)]  # one-hot columns may be alike for all samples
    inputs = dict.fromkeys([*begin, *(v for step in steps for v in step.inputs if v not in own)])
    args = [(outside[inner], _axis(inner)) for inner in inputs]
    if not all(_axis(inner) is not None or inner in fixed or inner in begin for inner in inputs):
        return None
    first = next(inner for inner in inputs if _axis(inner) is not None)
    total = any(TOTAL in sizes_in(step.expr) for step in steps)
    batch = first, first.shape.index(N)
    body = Body(tuple(inputs), steps, values, batch, "slice", several=True, total=total)
    args += [(N, None)] if total else []
    store.note = str(columns)
    joins = (Join.SUM,) * len(values)
    sums = store.add(Rounds(body, tuple(args), N, 1, joins), (), Kernel.PER_SAMPLE, _work(body, small.itemsize))
    names = {
        v: store.add(Call(f.ITEM, (sums, k)), v.shape, Kernel.NATIVE, strided=True) for k, v in enumerate(values)
    }
    asked = (item for item in columns.schedule if isinstance(item, Extraction))
    choices = tuple(replace(choice, item=item) for choice, item in zip(made, asked, strict=True))
    summed = {quantity: {key: names[value] for key, value in by.items()} for quantity, by in results.items()}
    return Swept(summed, choices)


def _small(store: Store, rows: Mapping[str, Value]) -> tuple[Store, dict[Value, Value]]:
    """A store for one sample, that knows what the forward has computed, and what each of its values is outside."""
    small = store.separate(1, one_sample=True)
    small.suppliers, small.works = store.suppliers, store.works
    outside: dict[Value, Value] = {}
    inside: dict[Value, Value] = {}
    for name, outer in store.names.items():
        if outer not in inside:
            inside[outer] = small.given(name, outer.shape, outer.floating, outer.strided)
            outside[inside[outer]] = outer
        small.name(name, inside[outer])
    small.like = inside[store.like]
    for name, outer in rows.items():
        inner = small.given(name, store.find(name).shape, store.one_dtype)
        outside[inner] = outer
    return small, outside


def _in_total(schedule: Schedule) -> Schedule:
    """In the scales the batch size is a number: there is one sample."""
    return tuple(_item_in_total(item) for item in schedule)


def _item_in_total(item: Backward | Individual | Extraction) -> Backward | Individual | Extraction:
    match item:
        case Backward():
            terms = tuple(term if isinstance(term, Native) else _scaled(term) for term in item.terms)
            condensed = None if item.condensed is None else _scaled(item.condensed)
            return replace(item, terms=terms, condensed=condensed)
        case Extraction():
            every = ({name: _scaled(d) for name, d in each.items()} for each in (item.diagrams, item.condensed))
            diagrams, before = every
            return replace(item, diagrams=diagrams, condensed=before)
    return item


def _scaled(diagram: Diagram) -> Diagram:
    return Diagram(diagram.legs, tuple(_product_scaled(product) for product in diagram.products))


def _product_scaled(product: Product) -> Product:
    operands = (replace(op, diagram=_scaled(op.diagram)) if isinstance(op, Part) else op for op in product.operands)
    return Product(product.scale.xreplace({N: TOTAL}), tuple(operands))


def _without_samples(
    store: Store, steps: tuple[Value, ...], values: tuple[Value, ...], fixed: set[Value], outside: dict[Value, Value]
) -> tuple[Value, ...]:
    """The steps that read a sample. All others are computed once, before; they are among what is `fixed` then."""
    left = []
    for step in steps:
        if set(step.inputs) <= fixed and step not in values and not sizes_in(step.expr) & {N, TOTAL}:
            expr: Expr = replaced(step.expr, lambda value: outside[value])
            outside[step] = store.add(
                expr, step.shape, step.kernel, step.work, own=step.own, strided=step.strided
            )
            fixed.add(step)
        else:
            left.append(step)
    return tuple(left)


def _axis(value: Value) -> int | None:
    """The axis that counts the samples."""
    return value.shape.index(N) if N in value.shape else None


def _work(body: Body, itemsize: int) -> Work:
    """That of all samples; the memory while it runs is that of one, and the sums so far."""
    values = body.values
    flops = tuple(term for step in body.steps for term in step.work.flops)
    moved = tuple(term for step in body.steps for term in step.work.moved)
    peak = int(peak_of(body.steps, values, 1, itemsize) / itemsize)
    inside = ((peak, ()), *((1, legs_of(value)) for value in values))
    each = tuple((step.kernel, step.work) for step in body.steps)
    return Work(flops, moved, inside=inside, launches=len(body.steps), each=each)
