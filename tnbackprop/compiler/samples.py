"""Samples: columns that are many for each sample ride through the layers sample by sample, all those of one at once.

Filled up with zeros to even matrices, they are one sweep that is planned for a batch of one: a function of a sample in
the source, whose results are summed over its calls. What depends on parameters alone is computed before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..diagram import BATCH, Diagram, Leg, N, Part, Product, Size, is_head
from .choose import Choice
from .contract import Lowering
from .cost import Kernel, Work
from .derived import Backward, Columns, Derived, Extraction, Individual, Native, Schedule
from .graph import Graph
from .items import scheduled
from .listing import alive, lines_of
from .memory import Piece, peak_bytes
from .slices import TOTAL, function_of, pairs_samples
from .store import Step, Store
from .tails import renamed

Results = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Swept:
    """What came of a sweep: its results, what was chosen for them, and the step that calls `piece` for each sample."""

    results: Results
    choices: tuple[Choice, ...]
    call: str
    piece: Piece


ADDED = """\
def added(samples):
    # Σ over samples of tuples of tensors.
    total = next(samples)
    for one in samples:
        total = [before + each for before, each in zip(total, one, strict=True)]
    return total"""


def separable(derived: Derived) -> bool:
    """Whether all sweeps that should go sample by sample can: their results are sums over samples."""
    return all(_separable(columns.schedule) for columns in derived.columns if columns.alone)


def _separable(schedule: Schedule) -> bool:
    """Kronecker factors stay together: those of the input are one tensor for all sweeps."""
    found = [diagram for item in schedule if isinstance(item, Extraction) for diagram in item.diagrams.values()]
    found += [diagram for item in schedule if isinstance(item, Extraction) for diagram in item.condensed.values()]
    plain = all(isinstance(item, Backward) or (isinstance(item, Extraction) and not item.factors) for item in schedule)
    return plain and all(_sums(diagram) for diagram in found)


def _sums(diagram: Diagram) -> bool:
    """Whether it is a sum over samples, and inside of it each has its own."""
    apart = all(BATCH in p.legs and not pairs_samples(p, diagram.legs) and _each(p) for p in diagram.products)
    return apart and not any(is_head(leg) for leg in diagram.legs)


def _each(product: Product) -> bool:
    parts = [op for op in product.operands if isinstance(op, Part)]
    return all(BATCH in part.legs and all(map(_each, part.diagram.products)) for part in parts)


def sample_by_sample(
    store: Store,
    graph: Graph,
    columns: Columns,
    saved: Iterable[str],
    rows: Mapping[str, str],
    lowerings: tuple[Lowering, ...],
) -> Swept | None:
    """A sweep as the sum over calls of a function of one sample; None if it reads what has no samples.

    rows  the columns and their weights: variable -> value
    """
    small = _small(store, graph, saved, rows)
    small.in_rounds(1, rows)
    made: list[Choice] = []
    schedule = _in_total(columns.schedule)
    results = scheduled(small, graph, schedule, lowerings, None, made, columns.carried)
    store.functions |= small.functions | {"added": ADDED}
    values = tuple(dict.fromkeys(value for by in results.values() for value in by.values()))
    fixed = {*graph.parameters, *graph.buffers, *graph.constants, *rows, "like"}  # one-hot columns may be alike for all
    steps, before = _without_samples(store, small, alive(small.steps, set(values)), values, fixed - set(rows))
    fixed |= before
    own = {step.name for step in steps}
    inputs = tuple(dict.fromkeys([*rows, *(name for step in steps for name in step.inputs if name not in own)]))
    arguments = {name: _argument(rows.get(name, name), small.shapes[name]) for name in inputs}
    if not all(name in fixed or code is not None for name, code in arguments.items()):
        return None
    total = [TOTAL.name] if any(TOTAL.name in step.code for step in steps) else []
    first = next(name for name, code in arguments.items() if code is not None)
    batch = f"{first}.shape[{small.shapes[first].index(N)}]"
    name = function_of(store, [*inputs, *total], lines_of(steps, set(values)), ", ".join((*values, "")), batch)
    given = ", ".join([*(code or rows.get(name, name) for name, code in arguments.items()), *("N" for _ in total)])
    store.note = str(columns)
    piece = Piece(steps, values, small.shapes, 1, small.itemsize)
    sums = store.add(f"added({name}({given}) for i in progress(range(N)))", (), Kernel.ALONE, _work(piece))
    names = {v: store.add(f"{sums}[{k}]", small.shapes[v], Kernel.NATIVE, strided=True) for k, v in enumerate(values)}
    asked = (item for item in columns.schedule if isinstance(item, Extraction))
    choices = tuple(replace(choice, item=item) for choice, item in zip(made, asked, strict=True))
    summed = {quantity: {key: names[value] for key, value in by.items()} for quantity, by in results.items()}
    return Swept(summed, choices, sums, piece)


def _small(store: Store, graph: Graph, saved: Iterable[str], rows: Mapping[str, str]) -> Store:
    """A store for one sample, that knows what the forward has computed."""
    known = {*graph.values, *saved, *rows, "like"} & set(store.shapes)
    return Store(
        store.rates, 1, store.itemsize, note=store.note, prefix="u", functions=store.functions, alone=True,
        shapes={name: store.shapes[name] for name in known},
        strided=store.strided & known,
        floating=(store.floating & known) | (set(rows) if store.floating else set()),
        alias={name: value for name, value in store.alias.items() if store.resolve(name) in known},
        suppliers=store.suppliers,
        works=store.works,
    )  # fmt: skip


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
    store: Store, small: Store, steps: tuple[Step, ...], values: tuple[str, ...], fixed: set[str]
) -> tuple[tuple[Step, ...], set[str]]:
    """The steps that read a sample, and the names of all others, which run once, before."""
    names: dict[str, str] = {}
    left = []
    for step in steps:
        step = renamed(step, names)
        if set(step.inputs) <= fixed and step.name not in values and not _SAMPLES.search(step.code):
            strided = step.name in small.strided
            name = store.add(step.code, small.shapes[step.name], step.kernel, step.work, strided=strided, own=step.own)
            names[step.name] = name
            small.shapes[name] = store.shapes[name]
            fixed.add(name)
        else:
            left.append(step)
    return tuple(left), fixed


_SAMPLES = re.compile(rf"\b(N|{TOTAL.name})\b")


def _argument(value: str, shape: tuple[Size, ...]) -> str | None:
    """Sample i of a value; None if no axis counts the samples."""
    return f"{value}[{':, ' * shape.index(N)}i : i + 1]" if N in shape else None


def _work(piece: Piece) -> Work:
    """That of all samples; what is held while it runs is that of one, and the sums so far."""
    flops = tuple(term for step in piece.steps for term in step.work.flops)
    moved = tuple(term for step in piece.steps for term in step.work.moved)
    sums = tuple((1, tuple(Leg(f"a{k}", size) for k, size in enumerate(piece.shapes[v]))) for v in piece.values)
    inside = ((int(peak_bytes(piece) / piece.itemsize), ()), *sums)
    each = tuple((step.kernel, step.work) for step in piece.steps)
    return Work(flops, moved, inside=inside, launches=len(piece.steps), each=each)
