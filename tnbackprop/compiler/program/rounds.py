"""Rounds of columns as lines: what is there before the first, what each of them does, and what is done at the end.

Sums are added up in place, by the matmul that gives a summand where that can; a concatenation is filled in, by the
product that gives a row where that can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from . import functions as f
from .cost import Kernel
from .expr import Call, Expr, Join, Rounds, Slice, Value
from .facts import base_of
from .lines import Block, Line, Lines, lines_of, with_out

ADDING = {name: f.method(name) for name in ("addmm_", "baddbmm_", "add_", "copy_")}
Pairs = tuple[tuple[Value, Value], ...]


Memory = Callable[[Value], Expr | None]
Passes = Callable[[Lines, frozenset[Value], frozenset[Value]], Lines]


def block_of(rounds: Rounds, totals: Mapping[int, Value], like: Value, memory: Memory, passed: Passes) -> Block:
    """The loop of some rounds.

    totals  result -> the value that it is called in the program
    memory  where a concatenation is filled in, if there is memory already
    passed  what the passes make of the lines of a round, given what is kept and what is another value in each
    """
    body, whole = rounds.body, rounds.count * rounds.width
    results = [(body.values[k], total, rounds.joins[k], rounds.begin[k]) for k, total in totals.items()]
    summed = tuple((value, total) for value, total, join, _ in results if join is Join.SUM)
    filled = tuple((value, total) for value, total, join, _ in results if join is Join.CAT)
    slots = {t: Value(f"slot:{t.key}", None, v.shape, hint=t.hint.replace("total", "slot")) for v, t in filled}
    begin = [
        Line(t, _empty((whole, *v.shape[1:]), t, like, memory) if j is Join.CAT else _start(v, start, like), False, ())
        for v, t, j, start in results
    ]
    lines = adding(summed, filling(filled, lines_of(body.steps), slots, rounds.width))
    rows = (*rounds.rows, *((slot, total) for total, slot in slots.items()))
    lines = passed(lines, frozenset(totals.values()), frozenset(variable for variable, _ in rows))
    cut = Slice(stop=rounds.size)
    end = [Line(t, Call(f.ITEM, (t, cut)), False, ()) for _, t in filled] if whole > int(rounds.size) else []
    return Block(tuple(begin), rows, rounds.width, lines, tuple(end), totals, int(rounds.size))


def _start(value: Value, start: Expr | None, like: Value) -> Expr:
    own = (("dtype", value.dtype),) if value.dtype is not None else ()
    return Call(f.NEW_ZEROS, (like, value.shape), own) if start is None else Call(f.CLONE, (start,))


def _empty(shape: tuple[object, ...], total: Value, like: Value, memory: Memory) -> Expr:
    """A value that is filled in later."""
    there = memory(replace(total, shape=shape)) if total.dtype is None else None  # that is of the program's dtype
    dtype = total.dtype if total.dtype is not None else Call(f.DTYPE, (like,))
    options = (("dtype", dtype), ("device", Call(f.DEVICE, (like,))))
    return Call(f.EMPTY, (shape,), (*options, *((("out", there),) if there is not None else ())))


def adding(summed: Pairs, lines: Lines) -> Lines:
    """Matmuls that nothing else reads add to a total themselves; any other value is added as soon as it is there."""
    by_value = {line.value: line for line in lines}
    read = [value for line in lines for value in line.inputs]
    readers = Counter([*read, *(value for value, _ in summed)])
    replacing: dict[Value, Line | None] = {}
    added: list[Line] = []
    for value, total in summed:
        chain = _views(by_value, value)
        line = by_value.get(chain[-1])
        alone = all(each in by_value and readers[each] == 1 for each in chain)
        fn = line.expr.fn if line is not None and isinstance(line.expr, Call) else None
        if line is None or not alone or fn is None or not fn.adding:
            added.append(Line(total, Call(ADDING["add_"], (total, value)), False, (value,)))
            continue
        replacing |= dict.fromkeys(chain)
        assert isinstance(line.expr, Call)
        expr: Expr = Call(ADDING[fn.adding], (viewed(total, line.value.shape), *line.expr.args))
        expr = Call(f.VIEW, (expr, *value.shape))
        replacing[line.value] = Line(total, expr, False, line.inputs, note=line.note)
    kept = (replacing.get(line.value, line) for line in lines)
    return _inserted([line for line in kept if line is not None], added)


def _inserted(lines: Sequence[Line], more: Sequence[Line]) -> Lines:
    """The lines, each with those of the others behind it that read its value."""
    found: list[Line] = []
    own = {line.value for line in lines}
    for line in lines:
        found += [line, *(replace(each, note=line.note) for each in more if each.inputs[-1] == line.value)]
    return (*found, *(each for each in more if each.inputs[-1] not in own))


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


def filling(filled: Pairs, lines: Lines, slots: Mapping[Value, Value], width: int) -> Lines:
    """Lines that write straight into a slot where a product or matmul can; what else there is, is copied there."""
    by_value = {line.value: line for line in lines}
    written: dict[Value, Line] = {}
    copied = []
    for value, total in filled:
        base, slot = by_value.get(_views(by_value, value)[-1]), slots[total]
        plain = base is not None and base.value not in written and base.value.kernel is not Kernel.VIEW
        expr = with_out(base.expr, Call(f.VIEW, (slot, *base.value.shape))) if base and plain else None
        if base is None or expr is None:
            row = value if width > 1 else Call(f.SQUEEZE, (value, 0))
            copied.append(Line(slot, Call(ADDING["copy_"], (slot, row)), False, (slot, value)))
        else:
            written[base.value] = replace(base, expr=expr, own=False, inputs=(*base.inputs, slot))
    return _inserted([written.get(line.value, line) for line in lines], copied)
