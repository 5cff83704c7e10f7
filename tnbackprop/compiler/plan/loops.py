"""Loop: the values that depend on a column are computed once for every column; all others once, before.

A result that keeps the column leg is the concatenation of what the columns give, every other one is their sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..derive.derived import Columns
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Expr, Value
from ..program.facts import base_of
from ..program.lines import Line, alive, lines_of, with_out
from ..program.store import Store
from ..program.tails import behind

Pairs = tuple[tuple[Value, Value], ...]
ADDING = {name: f.method(name) for name in ("addmm_", "baddbmm_")}


@dataclass(frozen=True)
class Loop:
    """For each variable in its rows, `width` at a time: `steps`; `outputs` are pairs (value inside, total outside)."""

    rows: Mapping[Value, Value]  # variable -> the value whose rows it takes
    columns: int
    width: int
    steps: tuple[Value, ...]
    outputs: Pairs
    stacked: frozenset[Value]  # those of the totals that are concatenated
    begin: Mapping[Value, Value]  # those of the totals that go on from a value
    after: tuple[Value, ...] = ()  # what is done to the totals, once

    @property
    def count(self) -> int:
        """How often the loop runs."""
        return -(-self.columns // self.width)

    @property
    def reads(self) -> tuple[Value, ...]:
        """The values from outside that the loop reads."""
        own = {*self.steps, *self.after, *self.rows, *(total for _, total in self.outputs)}
        inputs = [value for step in (*self.steps, *self.after) for value in step.inputs]
        inputs += [*(value for value, _ in self.outputs), *self.rows.values(), *self.begin.values()]
        return tuple(dict.fromkeys(value for value in inputs if value not in own))

    @property
    def alike(self) -> Pairs:
        """The sums of values that no column changes: each is added once, as a sweep without a loop adds it."""
        changing = {*self.rows, *self.steps}
        return tuple((v, total) for v, total in self.outputs if total not in self.stacked and v not in changing)

    @property
    def summed(self) -> Pairs:
        """All other sums."""
        return tuple(pair for pair in self.outputs if pair[1] not in self.stacked and pair not in self.alike)

    @property
    def filled(self) -> Pairs:
        """What is concatenated."""
        return tuple(pair for pair in self.outputs if pair[1] in self.stacked)


Results = Mapping[str, Mapping[str, Value]]


def over_columns(
    store: Store, rows: Mapping[Value, Value], columns: Columns, results: Results, stacked: set[str], earlier: Results
) -> tuple[Loop, dict[str, dict[str, Value]]]:
    """The loop, and the results with the totals in place of the values inside.

    A result that an earlier sweep has contributed to goes on from there.
    """
    inside = store.varying
    totals: dict[tuple[Value, bool, Value | None], Value] = {}
    renamed: dict[str, dict[str, Value]] = {}
    for quantity, by in results.items():
        for name, value in by.items():
            key = (value, quantity in stacked, earlier.get(quantity, {}).get(name))
            if (value in inside or key[1] or key[2]) and key not in totals:
                totals[key] = _total(value, columns, len(totals), key[1])
            renamed.setdefault(quantity, {})[name] = totals.get(key, value)
    steps = alive((s for s in store.steps if s in inside), {value for value, _, _ in totals})
    concatenated = [(value, total) for (value, stack, _), total in totals.items() if stack]
    begin = {total: start for (_, _, start), total in totals.items() if start is not None}
    summed = [(value, total) for (value, stack, _), total in totals.items() if not stack]
    pairs, after, last = behind(store, steps, summed, begin)
    outputs = (*pairs, *concatenated)
    added = {total for _, total in pairs}
    begin = {total: start for total, start in begin.items() if total in added}
    steps = alive(steps, {value for value, _ in outputs})
    together = frozenset(total for _, total in concatenated)
    loop = Loop(rows, int(columns.count), int(columns.width), steps, outputs, together, begin, tuple(after))
    return loop, {q: {name: last.get(v, v) for name, v in by.items()} for q, by in renamed.items()}


def _total(value: Value, columns: Columns, number: int, stacked: bool) -> Value:
    """A concatenation has a row for each column."""
    shape = (int(columns.count), *value.shape[1:]) if stacked else value.shape
    hint = f"total_{columns.number}_{number}"
    return Value(hint.replace("_", ":"), None, shape, hint=hint, floating=value.floating)


def adding(loop: Loop, lines: tuple[Line, ...]) -> tuple[tuple[Line, ...], list[tuple[Value, Value]]]:
    """Matmuls that add to a total themselves, where nothing else reads them, and the values that are added after."""
    by_value = {line.value: line for line in lines}
    readers = Counter(value for line in lines for value in line.inputs) + Counter(value for value, _ in loop.outputs)
    replacing: dict[Value, Line | None] = {}
    added = []
    for value, total in loop.summed:
        chain = _views(by_value, value)
        line = by_value.get(chain[-1])
        alone = all(each in by_value and readers[each] == 1 for each in chain)
        fn = line.expr.fn if line is not None and isinstance(line.expr, Call) else None
        if line is None or not alone or fn is None or not fn.adding:
            added.append((value, total))
            continue
        replacing |= dict.fromkeys(chain)
        assert isinstance(line.expr, Call)
        expr: Expr = Call(ADDING[fn.adding], (viewed(total, line.value.shape), *line.expr.args))
        expr = Call(f.VIEW, (expr, *value.shape))
        replacing[line.value] = Line(total, expr, False, line.inputs, note=line.note)
    kept = (replacing.get(line.value, line) for line in lines)
    return tuple(line for line in kept if line is not None), added


def viewed(total: Value, shape: Sequence[object]) -> Expr:
    """A total in the shape of what is added to it."""
    return total if total.shape == shape else Call(f.VIEW, (total, *shape))


def _views(by_value: Mapping[Value, Line], value: Value) -> list[Value]:
    """A value, and those that it is only a view of."""
    chain = [value]
    while (line := by_value.get(chain[-1])) is not None and line.value.kernel is Kernel.VIEW:
        base = base_of(line.value.expr)
        if base is None:
            break
        chain.append(base)
    return chain


def filling(
    loop: Loop, lines: tuple[Line, ...], slots: Mapping[Value, Value]
) -> tuple[tuple[Line, ...], list[tuple[Value, Value]]]:
    """Lines that write straight into a slot where a product or matmul can, and the outputs that must be copied."""
    by_value = {line.value: line for line in lines}
    written: dict[Value, Line] = {}
    copied = []
    for value, total in loop.filled:
        base = by_value.get(_views(by_value, value)[-1])
        plain = base is not None and base.value not in written and base.value.kernel is not Kernel.VIEW
        expr = with_out(base.expr, Call(f.VIEW, (slots[total], *base.value.shape))) if base and plain else None
        if base is None or expr is None:
            copied.append((value, total))
        else:
            written[base.value] = replace(base, expr=expr, own=False)
    return tuple(written.get(line.value, line) for line in lines), copied


def loop_lines(loop: Loop, slots: Mapping[Value, Value]) -> tuple[tuple[Line, ...], list[tuple[Value, Value]], Pairs]:
    """The lines of a round, what is copied to slots, and what is added to totals after them."""
    lines, copied = filling(loop, lines_of(loop.steps), slots)
    lines, added = adding(loop, lines)
    return lines, copied, tuple(added)
