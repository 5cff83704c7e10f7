"""Columns: the sweeps that carry more than the gradient. Each starts somewhere with columns and ends in results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import sympy

from ...diagram.algebra import Cotangents, pull_back, tensor
from ...diagram.core import BATCH, COLUMN, Diagram, Leg, N, Product, Size, Tensor
from ...errors import UnsupportedError
from ...notation.bind import BoundRule
from ...quantities import Handed, Propagation, Quantity, Residual
from ..sweep.derived import Arriving, Backward, Basis, Columns, Extraction, Formula, Given, PerSample, column_leg
from ..sweep.extract import extraction, key_of
from ..sweep.roots import LossRoot, output_of
from ..sweep.state import Sweep, all_uses
from ..sweep.sweep import add, run, schedule
from ..translate.graph import Call, Graph
from .averaged import copied, run_averaged
from .output import AtOutput, Start, along, output_legs, start_of
from .residual import Paired, Weighted, residual_diagonal, residuals

Bound = tuple[tuple[Call, BoundRule], ...]
ONE = sympy.Integer(1)
EVERY = 2**62
MOST_ROWS = 2**22
"""Columns join others that are one-hot at a value while these, written out for every sample, have so many elements."""


@dataclass(frozen=True)
class Setting:
    """What all sweeps of columns have in common; `width` is the most columns that may be propagated together.

    per_sample  which of them go sample by sample
    joint       whether the gradient is propagated with the columns of a root that leave room for it
    """

    graph: Graph
    bound: Bound
    scale: sympy.Expr
    width: int
    gradient: Sweep
    propagation: Propagation
    roots: bool  # whether the columns of the root go through all layers anyway, for other quantities
    per_sample: PerSample | None = None
    joint: bool = False
    done: dict[Propagation, list[Sweep]] = field(default_factory=dict)  # the sweeps of each propagation so far

    def by_sample(self, count: int) -> bool:
        """Whether so many columns go sample by sample."""
        return self.per_sample is not None and count >= self.per_sample.least

    def together(self, count: int) -> int:
        """How many of them are propagated together."""
        if self.per_sample is not None and self.by_sample(count):
            return -(-count // self.per_sample.even) * self.per_sample.even
        return _even(count, self.width)


def columns_of(setting: Setting, quantities: Sequence[Quantity], first: int) -> Iterator[Columns]:
    """The sweeps that quantities with this propagation need, numbered from `first`."""
    graph, propagation, what = setting.graph, setting.propagation, _classes(quantities)
    if propagation.together:
        setting = replace(setting, width=EVERY)
    if graph.cotangent and propagation.handed is not None:
        yield from _given(setting, quantities, propagation.handed, first)
        return
    if graph.cotangent and propagation.needs_loss:
        raise UnsupportedError(
            f"{what} for a layer on its own: it has no loss, and {type(propagation).__name__} does not say what it is "
            "handed in in place of its start.\n  Let its `alone` return another, tn.Exact() for columns, or generate a "
            "model with its loss."
        )
    at = AtOutput(graph, setting.bound, setting.gradient, setting.scale, what, first)
    start = start_of(propagation, at, output_of(graph, what).name)
    if start.diagram is None:
        yield from _as_they_are(setting, quantities, start, first)
    else:
        yield _made(setting, quantities, start, start.diagram, first)


def _classes(quantities: Sequence[Quantity]) -> str:
    """What was asked for, for messages: "DiagGGN and KFLR"."""
    return " and ".join(dict.fromkeys(type(quantity).__name__ for quantity in quantities))


def _as_they_are(setting: Setting, quantities: Sequence[Quantity], start: Start, first: int) -> Iterator[Columns]:
    """Columns as they are at the output; with the residual of every line before it, where that is propagated."""
    more = setting.propagation.residual is Residual.COLUMNS
    found = _found(setting, start.output) if more else []
    meetings = () if setting.roots or start.samples else _meetings(setting, found)
    if isinstance(start.source, Weighted):
        ahead = _from_basis(setting, quantities, start.source, first, inside=False, meetings=meetings)
    else:
        assert start.source is not None
        ahead = _from_loss(setting, quantities, start.source, start.samples, first, meetings)
    yield replace(ahead, noises=start.noises)
    yield from _residuals(setting, quantities, found, first, [ahead])


def _found(setting: Setting, output: str) -> list[Weighted | Paired]:
    """The residuals of the lines before the output, in the order in which a sweep comes to them."""
    found = residuals(setting.gradient, setting.bound, _behind(setting.graph, output))
    return sorted(found, key=lambda each: _position(setting, each.value), reverse=True)


def _position(setting: Setting, value: str) -> int:
    """Of the call that computes the value, or a line of which does."""
    calls = setting.graph.calls
    return calls.index(setting.gradient.owner[value]) if value in setting.gradient.owner else -1


def _residuals(
    setting: Setting,
    quantities: Sequence[Quantity],
    found: Sequence[Weighted | Paired],
    first: int,
    ahead: Sequence[Columns] = (),
) -> Iterator[Columns]:
    """Columns of the residuals. Those that go together stop where others are one-hot, and go on with them."""
    waiting = list(ahead)
    for number, each in enumerate(found, start=first + 1):
        if isinstance(each, Paired):
            yield _from_pair(setting, quantities, each, number)
            continue
        here = [columns for columns in waiting if columns.until == each.value]
        later = [other for other in found if _position(setting, other.value) < _position(setting, each.value)]
        made = _from_basis(setting, quantities, each, number, True, here, _meetings(setting, later) if ahead else ())
        waiting = [*(columns for columns in waiting if columns not in here), made]
        yield made


def _meetings(setting: Setting, found: Sequence[Weighted | Paired]) -> tuple[str, ...]:
    """The values where one-hot columns may take along what comes from behind, all of which must pass there."""
    each = (w for w in found if isinstance(w, Weighted) and setting.gradient.samples[w.value])
    return tuple(w.value for w in each if _rows(setting, w) <= MOST_ROWS and setting.graph.is_bottleneck(w.value))


def _rows(setting: Setting, found: Weighted) -> int:
    """Elements of the one-hot columns, written out for every sample."""
    return setting.graph.example_batch * prod(int(leg.size) for leg in _own(found.legs)) ** 2


def _given(setting: Setting, quantities: Sequence[Quantity], handed: Handed, number: int) -> Iterator[Columns]:
    """What is handed in at the output of a layer on its own: columns, a diagonal, or a matrix for the whole batch."""
    output = output_of(setting.graph, "a layer on its own")
    legs, width = output_legs(setting.bound, output.name), handed.count
    lead = column_leg(width)
    weight = tensor(handed.values[1], (*lead, BATCH)) if handed.weights else None
    sweep = _sweep(setting, quantities, number, width, weight, inside=False)
    sweep.variable, sweep.kept = handed.value, (*lead, BATCH)
    whole = (*lead, *legs)
    if handed.matrix:
        whole = (*_own(legs), *copied(_own(legs)))
        run_averaged(sweep, setting.bound, output.name, tensor(handed.value, whole))
    else:
        sweep.terms[output.name] = [tensor(handed.value, whole)]
        run(sweep, setting.bound)
        for value in setting.graph.inputs if handed.pulled else ():
            if sweep.terms.get(value):
                schedule(sweep, value)
    given = Given(output.name, handed, handed.shape(output.shape))
    yield Columns(number, handed.value, given, 0, whole, tuple(sweep.schedule), width)
    if setting.propagation.residual is Residual.COLUMNS:
        yield from _residuals(replace(setting, width=EVERY), quantities, _found(setting, output.name), number)


def _made(
    setting: Setting, quantities: Sequence[Quantity], start: Start, diagram: Diagram, number: int
) -> Columns:
    """What is made of columns at the output, of the output or of noise, all of it at once."""
    source: LossRoot | Basis | Formula = Formula(start.output)
    legs = output_legs(setting.bound, start.output)
    if isinstance(start.source, Weighted):
        source = _basis(start.source)
        legs = source.legs
    elif start.source is not None:
        source = start.source
    count = start.samples or source.columns
    variable = start.output if isinstance(source, Formula) else f"column:{number}"
    sweep = _sweep(setting, quantities, number, start.carried or 1, inside=False)
    sweep.variable = "" if isinstance(source, Formula) else variable
    sweep.several = start.carried > 1 or not setting.propagation.by_vjp or start.matrix
    sweep.kept = (*((Leg(COLUMN, start.carried),) if start.carried else ()), BATCH)
    if start.matrix:
        run_averaged(sweep, setting.bound, start.output, diagram)
    else:
        sweep.terms[start.output] = [diagram]
        run(sweep, setting.bound)
    return Columns(
        number, variable, source, start.samples, (*column_leg(count), *legs), tuple(sweep.schedule), count,
        made=start.carried or 1, noises=start.noises,
    )  # fmt: skip


def _behind(graph: Graph, output: str) -> set[str]:
    """The values that are computed from the model's output: those of the loss."""
    found = {output}
    for call in graph.calls:
        if found & {value.name for value in call.tensors.values()}:
            found.add(call.output.name)
    return found - {output}


def _from_loss(
    setting: Setting,
    quantities: Sequence[Quantity],
    root: LossRoot,
    samples: int,
    number: int,
    meetings: tuple[str, ...] = (),
) -> Columns:
    """Columns of the root, at the model's output: cotangents like the gradient."""
    legs = output_legs(setting.bound, root.value)
    width = _divisor(samples, setting.width) if samples else setting.together(root.columns)
    by_sample = not samples and setting.by_sample(root.columns)
    lead = column_leg(width)
    variable, weight = f"column:{number}", None
    if root.signed:
        weight = tensor(f"weight:{number}", (*lead, BATCH))
    count = samples or root.columns
    sweep = _sweep(setting, quantities, number, width, weight, inside=False)
    sweep.meetings = meetings if width == root.columns and not by_sample else ()
    fits = width == count < setting.width and not by_sample and not sweep.meetings
    joint = _gradient_at(setting, root.value) if fits else 0
    sweep.several = count > 1 or bool(joint)
    sweep.terms[root.value] = [tensor(variable, (*lead, *legs))]
    run(sweep, setting.bound)
    return Columns(
        number, variable, root, samples, (*lead, *legs), tuple(sweep.schedule), width,
        until=sweep.until, per_sample=by_sample, joint=joint,
    )  # fmt: skip


def _gradient_at(setting: Setting, value: str) -> int:
    """How many items of the gradient's sweep lead to the value, if it should go with the columns from there; else 0."""
    items = setting.gradient.schedule
    found = (k for k, item in enumerate(items) if isinstance(item, Backward) and item.value == value)
    position = next(found, None) if setting.joint else None
    goes_on = position is not None and any(isinstance(item, Extraction) for item in items[position + 1 :])
    return position + 1 if position is not None and goes_on else 0


def _from_basis(
    setting: Setting,
    quantities: Sequence[Quantity],
    found: Weighted,
    number: int,
    inside: bool,
    arriving: Sequence[Columns] = (),
    meetings: tuple[str, ...] = (),
) -> Columns:
    """One-hot columns with a weight for each sample, and the columns that arrive where they are."""
    start = replace(_basis(found), arriving=tuple(_arriving(columns) for columns in arriving))
    lead, by_sample = column_leg(width := setting.together(start.columns)), setting.by_sample(start.columns)
    weight = None if start.weight is None else tensor(f"weight:{number}", (*lead, BATCH))
    sweep = _sweep(setting, quantities, number, width, weight, inside)
    sweep.since = found.value if arriving else ""
    sweep.meetings = meetings if width == start.columns and not by_sample else ()
    own = _start(sweep, found.value, found.legs, written_out=bool(arriving))
    run(sweep, setting.bound)
    schedule, legs = tuple(sweep.schedule), (*lead, *own)
    return Columns(number, sweep.variable, start, 0, legs, schedule, width, until=sweep.until, per_sample=by_sample)


def _arriving(columns: Columns) -> Arriving:
    weight = columns.weight if columns.weighted else ""
    return Arriving(f"{_prefix(Propagation.letter, columns.number)}:{columns.until}", int(columns.count), weight)


def _prefix(letter: str, number: int) -> str:
    """Of the names of what columns propagate, which no line of a rule has."""
    return f":{letter}{number}"


def _basis(found: Weighted) -> Basis:
    own = _own(found.legs)
    return Basis(found.value, own, None if found.weight is None else Diagram((*own, BATCH), found.weight.products))


def _own(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """Without the batch."""
    return tuple(leg for leg in legs if leg.size != N)


def _from_pair(setting: Setting, quantities: Sequence[Quantity], found: Paired, number: int) -> Columns:
    """One-hot columns and where the residual leads with them: two sweeps in one, with results of both."""
    own = _own(found.residual.out)
    start = Basis(found.value, own)
    lead = column_leg(width := _even(start.columns, setting.width))
    one = _sweep(setting, (), number, width)
    sampled = setting.gradient.samples
    _start(one, found.value, found.residual.out if sampled[found.value] else own)
    run(one, setting.bound)
    other = _sweep(setting, (), number, width, letter="r")
    into = tuple(BATCH if leg.size == N else leg for leg in found.residual.into)
    keep = lead if sampled[found.other] else (*lead, BATCH)
    led = pull_back(found.residual, tensor(one.variable, (*lead, *own)), keep, into)
    add(other, found.other, led * found.factor, sampled[found.other])
    run(other, setting.bound)
    joint = [*one.schedule, *other.schedule]
    for name in setting.graph.parameters:
        if one.uses.get(name) and other.uses.get(name):
            both = _sweep(setting, quantities, number, width)
            both.uses[name] = [*one.uses[name], *other.uses[name]]
            uses, g = all_uses(both, name)
            joint.append(extraction(both, name, uses, _split(g, len(one.uses[name]))))
    return Columns(number, one.variable, start, 0, (*lead, *own), tuple(joint), width)


def _split(g: Cotangents, count: int) -> Cotangents:
    """The first `count` uses belong to the columns, the others to their partners."""
    zero = [Diagram(each.legs, ()) for each in g.each]
    return replace(g, each=(*g.each[:count], *zero[count:]), partner=(*zero[:count], *g.each[count:]))


def _sweep(
    setting: Setting,
    quantities: Sequence[Quantity],
    number: int,
    width: Size,
    weight: Diagram | None = None,
    inside: bool = True,
    letter: str = "",
) -> Sweep:
    kept, propagation = (Leg(COLUMN, width), BATCH), setting.propagation
    sweep = Sweep(
        setting.graph, quantities, scales={setting.scale}, prefix=_prefix(letter or propagation.letter, number),
        variable=f"column:{number}", several=True, lead=column_leg(width), kept=kept, weight=weight, partial=inside,
        along=along(propagation), readings=setting.gradient.readings,
    )  # fmt: skip
    sweep.others = setting.done
    setting.done.setdefault(key_of(propagation), []).append(sweep)
    if propagation.residual is Residual.DIAGONAL:
        sweep.adds = partial(residual_diagonal, setting.gradient)
    return sweep


def _start(sweep: Sweep, value: str, legs: tuple[Leg, ...], written_out: bool = False) -> tuple[Leg, ...]:
    """Columns at a value with these legs; the same for every sample, if they are not written out. The legs of one."""
    sampled = any(leg.size == N for leg in legs)
    batched = tuple(BATCH if leg.size == N else leg for leg in legs) if sampled else (BATCH, *legs)
    own = batched if written_out else _own(legs)
    column = Product(ONE, (Tensor(sweep.variable, (*sweep.lead, *own)),))
    add(sweep, value, Diagram((*sweep.lead, *batched), (column,)), sampled)
    return own


def _divisor(count: int, width: int) -> int:
    """The most at a time that come out even: a draw cannot be filled up."""
    return next(k for k in range(min(width, count), 0, -1) if count % k == 0)


def _even(count: int, width: int) -> int:
    """At most `width` columns at a time, so that all rounds have as many as possible."""
    rounds = -(-count // min(width, count))
    return -(-count // rounds)
