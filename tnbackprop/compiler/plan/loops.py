"""Loop: the values that depend on a column are computed once for every column; all others once, before.

A result that keeps the column leg is the concatenation of what the columns give, every other one is their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...diagram.core import Leg
from ..lower.arrange import added, legs_of
from ..program import functions as f
from ..program.cost import Kernel, Terms, Work
from ..program.expr import Body, Call, Expr, Join, Rounds, Value
from ..program.hoist import hoisted, moved
from ..program.lines import alive
from ..program.memory import peak_of
from ..program.store import Store
from ..sweep.derived import Columns, Result

Results = Mapping[Result, Mapping[str, Value]]
Pairs = tuple[tuple[Value, Value], ...]


def over_columns(
    store: Store,
    rows: Mapping[Value, Value],
    columns: Columns,
    results: Results,
    stacked: set[Result],
    earlier: Results,
) -> dict[Result, dict[str, Value]]:
    """The results, with what the rounds leave in place of the values inside.

    rows  variable -> the value whose rows it takes
    A result that an earlier sweep has contributed to goes on from there.
    """
    inside = store.varying
    totals: dict[tuple[Value, bool, Value | None], Value] = {}
    last: dict[Value, Value] = {}
    renamed: dict[Result, dict[str, Value]] = {}
    for quantity, by in results.items():
        for name, value in by.items():
            start = earlier.get(quantity, {}).get(name)
            key = (value, quantity in stacked, start)
            if (value in inside or key[1] or start is not None) and key not in totals:
                totals[key] = _total(value, columns, len(totals), key[1])
                if value not in inside and not key[1] and start is not None:  # no column changes it: added once
                    last[totals[key]] = added(store, start, value)
            renamed.setdefault(quantity, {})[name] = totals.get(key, value)
    open_ = {key: total for key, total in totals.items() if total not in last}
    begin = {total: start for (_, _, start), total in open_.items() if start is not None}
    steps = alive((s for s in store.steps if s in inside), {value for value, _, _ in open_})
    concatenated = tuple((value, total) for (value, stack, _), total in open_.items() if stack)
    summed = [(value, total) for (value, stack, _), total in open_.items() if not stack]
    pairs, after, ends = hoisted(store, steps, summed, begin)
    left = _rounds(store, rows, columns, steps, (*pairs, *concatenated), {t for _, t in concatenated}, begin)
    for step in after:  # the totals that it reads are what the rounds leave
        left[step] = moved(step, left, step.hint)
        store.steps.append(left[step])
    last |= left | {total: left[end] for total, end in ends.items()}
    return {q: {name: last.get(v, v) for name, v in by.items()} for q, by in renamed.items()}


def _rounds(
    store: Store,
    rows: Mapping[Value, Value],
    columns: Columns,
    steps: tuple[Value, ...],
    outputs: Pairs,
    stacked: set[Value],
    begin: Mapping[Value, Value],
) -> dict[Value, Value]:
    """Total -> what the rounds leave for it; `outputs` are pairs (value inside, total)."""
    if not outputs:
        return {}
    steps = alive(steps, {value for value, _ in outputs})
    read = [*(value for step in steps for value in step.inputs), *(value for value, _ in outputs)]
    used = {variable: whole for variable, whole in rows.items() if variable in read} or dict(rows)
    outside = dict.fromkeys(value for value in read if value not in {*steps, *used})
    body = Body((*used, *outside), steps, tuple(value for value, _ in outputs), None, "round", several=True)
    args: list[tuple[Expr, int | None]] = [(whole, 0) for whole in used.values()]
    args += [(value, None) for value in outside]
    joins = tuple(Join.CAT if total in stacked else Join.SUM for _, total in outputs)
    starts = tuple(begin.get(total) for _, total in outputs)
    rounds = Rounds(body, tuple(args), int(columns.count), int(columns.width), joins, begin=starts)
    store.note = f"{columns}: {columns.count} columns, {columns.width} at a time"
    made = store.add(rounds, (), Kernel.ROUNDS, _work(store, rounds, [total for _, total in outputs]), hint="rounds")
    return {
        total: store.add(
            Call(f.ITEM, (made, k)), total.shape, Kernel.ROUNDS, hint=total.hint, floating=total.floating,
            dtype=total.dtype,
        )
        for k, (_, total) in enumerate(outputs)
    }  # fmt: skip


def _total(value: Value, columns: Columns, number: int, stacked: bool) -> Value:
    """A concatenation has a row for each column."""
    shape = (int(columns.count), *value.shape[1:]) if stacked else value.shape
    hint = f"total_{columns.number}_{number}"
    return Value(hint.replace("_", ":"), None, shape, hint=hint, floating=value.floating, dtype=value.dtype)


def _work(store: Store, rounds: Rounds, totals: list[Value]) -> Work:
    """That of all rounds; the memory while they run is that of one, and what they leave."""
    body = rounds.body
    peak = int(peak_of(body.steps, (), store.batch, store.itemsize) / store.itemsize)
    each = tuple((step.kernel, step.work) for step in body.steps)
    times = rounds.count
    return Work(
        tuple(_times(times, (step.work.flops for step in body.steps))),
        tuple(_times(times, (step.work.moved for step in body.steps))),
        inside=((peak, ()), *((1, legs_of(total)) for total in totals)),
        each=each, turns=times,
    )  # fmt: skip


def _times(times: int, every: Iterator[Terms]) -> Iterator[tuple[int, tuple[Leg, ...]]]:
    yield from ((times * c, legs) for terms in every for c, legs in terms)
