"""Between: what quantities compute from totals before their own extraction, captured once as calls on values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from ..diagram.core import N, Size
from ..diagram.reading import Reading
from ..errors import InputError
from ..quantities import Quantity
from ..quantities.stream import Stream
from ..quantities.total import ALL, Needed, level_of
from .labels import with_labels
from .program.inputs import parameter_shapes
from .sweep.derived import Derived, Extraction, Phase, Result, Schedule, Streamed
from .traced import Given, traced
from .translate.graph import Graph, Value

Names = dict[str, dict[str, tuple[Result, tuple[Size, ...]]]]
"""Key of a total -> group -> what it is the sum of, and its shape."""


def with_phases(
    graph: Graph, derived: Derived, quantities: Sequence[Quantity], known: Derived | None = None
) -> Derived:
    """What is derived, with what comes between its phases; `known`: the same for other widths, traced before."""
    later = [quantity for quantity in sorted(quantities, key=level_of) if quantity.needs]
    phases = tuple(_phase(graph, derived, q, quantities) for q in later) if known is None else known.phases
    made = {name for phase in phases for name in phase.outcome}
    readings = {name: each if name in made else replace(each, of="") for name, each in derived.readings.items()}
    derived = with_labels(graph, replace(derived, readings=readings, phases=phases), known)
    return with_streams(graph, derived, known)


def _phase(graph: Graph, derived: Derived, quantity: Quantity, quantities: Sequence[Quantity]) -> Phase:
    needed = [each for each in quantities if isinstance(each, Needed) and each.of == quantity.name]
    totals = {each.key: _totals(derived, each) for each in needed}
    dtype = _dtype(graph, derived, needed)
    device = next((graph.values[name].device for name in graph.parameters), "cpu")
    example = {k: {group: Given(shape, dtype, device) for group, (_, shape) in by.items()} for k, by in totals.items()}
    shown = {key: by[ALL] if list(by) == [ALL] else by for key, by in example.items()}
    found = traced(quantity.between, shown, _where(quantity), f"between:{quantity.name}")
    given = [(result, group) for by in totals.values() for group, (result, _) in by.items()]
    outcome = _outcome(graph, quantity, derived, found.made, dtype)
    level, named = level_of(quantity), dict(zip((each.name for each in found.inputs), given, strict=True))
    return Phase(quantity.name, named, found.calls, outcome, found.constants, dtype, level)


def _dtype(graph: Graph, derived: Derived, needed: Sequence[Needed]) -> torch.dtype:
    """Of totals: that of their sum, where the parameters have several."""
    names = [each.name for each in needed]
    summed = (i for i in derived.items if isinstance(i, Extraction) and any(Result(n) in i.diagrams for n in names))
    dtypes = {graph.values[item.parameter].dtype for item in summed}
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _totals(derived: Derived, needed: Needed) -> dict[str, tuple[Result, tuple[Size, ...]]]:
    """The groups of a total, and its shape: the legs that are left are samples and columns."""
    result, found = Result(needed.name), {}
    for item in derived.items:
        if isinstance(item, Extraction) and result in item.diagrams:
            shape = tuple(leg.size for leg in item.diagrams[result].legs)
            found[item.groups[needed.name]] = result, shape
    return found


def _where(quantity: Quantity) -> str:
    return f"between() of quantity {quantity.name!r}"


def _outcome(graph: Graph, quantity: Quantity, derived: Derived, made: Any, dtype: torch.dtype) -> dict[str, str]:
    """The operands that it makes, each with its value, for what the quantity reads."""
    if not isinstance(made, Mapping):
        raise InputError(f"{_where(quantity)} returns {type(made).__name__}: give {{key: tensor}}")
    mine = {name: each for name, each in derived.readings.items() if each.of == quantity.name}
    unread = [key for key in made if key not in {each.key for each in mine.values()}]
    if unread:
        raise InputError(
            f"{_where(quantity)} makes {unread[0]!r}, which extract does not read: g.operand({unread[0]!r}), "
            f"or J.operand({unread[0]!r}) where it is {{parameter: tensor}}"
        )
    shapes = parameter_shapes(graph)
    found = {name: _read(quantity, each, made, shapes) for name, each in mine.items() if each.key in made}
    for name, value in found.items():
        if value.dtype != dtype:
            raise InputError(
                f"{_where(quantity)} makes {mine[name].key!r} in {value.dtype}, and totals are in {dtype}: convert it, "
                ".to(total.dtype)"
            )
    return {name: value.name for name, value in found.items()}


def _read(
    quantity: Quantity, reading: Reading, made: Mapping[str, Any], shapes: Mapping[str, tuple[Size, ...]]
) -> Value:
    found, where = made[reading.key], f"{_where(quantity)} makes"
    if isinstance(found, Mapping) != bool(reading.parameter):
        has, reads = ("one tensor", "J.operand") if reading.parameter else ("one of each parameter", "g.operand")
        raise InputError(f"{where} {has} of {reading.key!r}, and extract reads it as {reads}")
    if isinstance(found, Mapping) and reading.parameter not in found:
        raise InputError(f"{where} nothing for parameter {reading.parameter!r} of {reading.key!r}")
    value = found[reading.parameter] if isinstance(found, Mapping) else found
    if not isinstance(value, Value):
        raise InputError(f"{where} {type(value).__name__} of {reading.key!r}, not a tensor")
    shape = reading.shape(shapes.get(reading.parameter, ()))
    if value.shape not in (shape, reading.sizes):
        told, wanted = (", ".join(map(str, each)) for each in (value.shape, shape))
        raise InputError(f"{where} {reading.key!r} as [{told}], and extract reads it as [{wanted}]")
    return value


def with_streams(graph: Graph, derived: Derived, known: Derived | None) -> Derived:
    """What is derived, with the torch code of streams traced: once for each function and shape of a parameter."""
    if not any(isinstance(item, Extraction) and item.streams for item in derived.items):
        return derived
    made = {} if known is None else {_kind(each.quantity, each.given): each for each in known.traced}

    def traced_in(schedule: Schedule) -> Schedule:
        return tuple(_with_streams(graph, item, made) if isinstance(item, Extraction) else item for item in schedule)

    columns = tuple(replace(each, schedule=traced_in(each.schedule)) for each in derived.columns)
    return replace(derived, schedule=traced_in(derived.schedule), columns=columns, traced=tuple(made.values()))


def _kind(quantity: str, given: Value | Given) -> tuple[str, tuple[Size, ...], torch.dtype]:
    return quantity, tuple(given.shape), given.dtype


def _with_streams(graph: Graph, item: Extraction, known: dict[Any, Streamed]) -> Extraction:
    own, found = graph.values[item.parameter], dict[str, Streamed]()
    for name, stream in item.streams.items():
        given = Given((N, *own.shape), own.dtype, own.device)
        where = f"the stream of quantity {name!r} for {graph.parameters[item.parameter][0]!r}"
        if (kind := _kind(name, given)) not in known:
            known[kind] = _streamed(name, stream, given, where, f"stream:{name}:{len(known)}")
        found[name] = known[kind]
    return replace(item, streams=found) if found else item


def _streamed(quantity: str, stream: Stream, given: Given, where: str, prefix: str) -> Streamed:
    made = traced(stream.function, given, where, prefix)
    if not isinstance(made.made, Value):
        raise InputError(f"{where} makes {type(made.made).__name__}, not a tensor")
    if stream.rows != (made.made.shape[:1] == (N,)):
        told = ", ".join(map(str, made.made.shape))
        raise InputError(f"{where} makes [{told}]: a row for each sample goes with rows=True, all else without")
    return Streamed(quantity, made.inputs[0], made.calls, made.made, made.constants, stream.rows)
