"""Loop: the steps that depend on a column run once for every column; all others run once, before.

A result that keeps the column leg is the concatenation of what the columns give, every other one is their sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from ..diagram import Size
from .arrange import text, tuple_text
from .cost import Kernel
from .derived import Columns
from .listing import alive, captured_by, freed, lines_of
from .outs import ADDING, empty, function_of, handed, written_to
from .store import Step, Store, is_rearranged
from .tails import behind


@dataclass(frozen=True)
class Loop:
    """For each variable in its rows, `width` at a time: `steps`; `outputs` are pairs (value inside, total outside)."""

    rows: Mapping[str, str]  # variable -> the value whose rows it takes
    columns: int
    width: int
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, str], ...]
    stacked: frozenset[str]  # those of the totals that are concatenated
    begin: Mapping[str, str]  # those of the totals that go on from a value
    after: tuple[Step, ...] = ()  # what is done to the totals, once

    @property
    def count(self) -> int:
        """How often the loop runs."""
        return -(-self.columns // self.width)

    @property
    def reads(self) -> tuple[str, ...]:
        """The values from outside that the loop reads."""
        own = {step.name for step in (*self.steps, *self.after)} | set(self.rows) | {total for _, total in self.outputs}
        inputs = [name for step in (*self.steps, *self.after) for name in step.inputs]
        inputs += [*(value for value, _ in self.outputs), *self.rows.values(), *self.begin.values()]
        return tuple(dict.fromkeys(name for name in inputs if name not in own))


Results = Mapping[str, Mapping[str, str]]


def over_columns(
    store: Store, rows: Mapping[str, str], columns: Columns, results: Results, stacked: set[str], earlier: Results
) -> tuple[Loop, dict[str, dict[str, str]]]:
    """The loop, and the results with the names of the totals in place of the values inside.

    A result that an earlier sweep has contributed to goes on from there.
    """
    inside = store.varying
    totals: dict[tuple[str, bool, str], str] = {}
    renamed: dict[str, dict[str, str]] = {}
    for quantity, by in results.items():
        for name, value in by.items():
            key = (value, quantity in stacked, earlier.get(quantity, {}).get(name, ""))
            if value in inside or key[1] or key[2]:
                totals.setdefault(key, f"total_{columns.number}_{len(totals)}")
            renamed.setdefault(quantity, {})[name] = totals.get(key, value)
    steps = alive((s for s in store.steps if s.name in inside), {value for value, _, _ in totals})
    concatenated = [(value, total) for (value, stack, _), total in totals.items() if stack]
    begin = {total: start for (_, _, start), total in totals.items() if start}
    loop = Loop(rows, int(columns.count), int(columns.width), steps, (), frozenset(t for _, t in concatenated), begin)
    summed = [(value, total) for (value, stack, _), total in totals.items() if not stack]
    pairs, after = behind(store, steps, summed, begin)
    outputs = (*pairs, *concatenated)
    added = {total for _, total in pairs}
    begin = {total: start for total, start in begin.items() if total in added}
    steps = alive(steps, {value for value, _ in outputs})
    return replace(loop, steps=steps, outputs=outputs, begin=begin, after=tuple(after)), renamed


def loop_lines(
    loop: Loop, shapes: Mapping[str, tuple[Size, ...]], wanted: set[str], large: Container[str] = ()
) -> list[str]:
    """The loop as source, and what is done after it; `wanted` are the values that are read later.

    Totals are allocated once: sums are added up in place, a concatenation is filled in. A value that no column
    changes is added once, to what its total goes on from: as a sweep without a loop adds it.
    """
    changing = {*loop.rows, *(step.name for step in loop.steps)}
    alike = [(value, total) for value, total in loop.outputs if total not in loop.stacked and value not in changing]
    summed = [pair for pair in loop.outputs if pair[1] not in loop.stacked and pair not in alike]
    stacked = [(value, total) for value, total in loop.outputs if total in loop.stacked]
    slots = {total: f"slot{total.removeprefix('total')}" for _, total in stacked}
    cut = f"split({loop.width})" if loop.width > 1 else "unbind(0)"
    lines = [f"    # {loop.columns} columns, {loop.width} at a time"]
    lines += [f"    {total} = {loop.begin[total]} + {value}" for value, total in alike]
    for value, total in summed:
        zeros = f"like.new_zeros({tuple_text(shapes[value])})"
        lines.append(f"    {total} = {f'{loop.begin[total]}.clone()' if total in loop.begin else zeros}")
    for value, total in stacked:
        shape = (loop.count * loop.width, *shapes[value][1:])
        lines.append(f"    {total} = {empty(shape, total in large)}")
    rows = ", ".join(f"{name}.{cut}" for name in (*loop.rows.values(), *slots))
    targets = ", ".join([*loop.rows, *slots.values()])
    lines.append(f"    for {targets} in progress({f'zip({rows}, strict=True)' if ',' in targets else rows}):")
    steps, copied = _filling(loop, stacked, slots, shapes)
    steps, added = _adding(loop, steps, summed, shapes)
    kept = {value for value, _ in (*copied, *added)} | {value for value, _ in stacked}
    lines += [f"    {line}" for line in lines_of(handed(steps, shapes, large), kept)]
    squeezed = "" if loop.width > 1 else ".squeeze(0)"
    lines += [f"        {slots[total]}[:] = {value}{squeezed}" for value, total in copied]
    lines += [f"        {total} = {total}.add_({value})" for value, total in added]
    own = {step.name for step in steps}
    left = [value for value in dict.fromkeys(value for value, _ in loop.outputs) if value in own and value in kept]
    lines += freed([*loop.rows, *slots.values(), *left], captured_by(steps))
    if loop.count * loop.width > loop.columns:
        lines += [f"    {total} = {total}[:{loop.columns}]" for _, total in stacked]
    lines += lines_of(handed(loop.after, shapes, large), wanted)
    spent = [total for _, total in summed if total not in wanted]
    return [*lines, *freed(spent, captured_by(loop.after))]


def _adding(
    loop: Loop, steps: tuple[Step, ...], summed: list[tuple[str, str]], shapes: Mapping[str, tuple[Size, ...]]
) -> tuple[tuple[Step, ...], list[tuple[str, str]]]:
    """Matmuls that add to a total themselves, where nothing else reads them, and the values that are added after."""
    by_name = {step.name: step for step in steps}
    readers = Counter(name for step in steps for name in step.inputs) + Counter(value for value, _ in loop.outputs)
    replaced: dict[str, Step | None] = {}
    added = []
    for value, total in summed:
        chain = [by_name.get(value)]
        while (step := chain[-1]) is not None and _is_view(step):
            chain.append(by_name.get(step.inputs[0]))
        base = chain[-1]
        alone = all(step is not None and readers[step.name] == 1 for step in chain)
        function = function_of(base.code) if base is not None else ""
        if base is None or not alone or function not in ADDING:
            added.append((value, total))
            continue
        shown = total if shapes[base.name] == shapes[value] else f"{total}.view({text(shapes[base.name])})"
        replaced |= {step.name: None for step in chain if step is not None}
        code = f"{total}.view({text(shapes[value])})"
        own = f"{shown}.{ADDING[function]}{base.code.removeprefix(function)}{code.removeprefix(total)}"
        replaced[base.name] = replace(base, name=total, code=own, own=False, into=())
    kept = (replaced.get(step.name, step) for step in steps)
    return tuple(step for step in kept if step is not None), added


def _is_view(step: Step) -> bool:
    """Whether it only sees its first input in another shape."""
    return step.kernel is Kernel.VIEW and bool(step.inputs) and is_rearranged(step.code, step.inputs[0])


def _filling(
    loop: Loop, stacked: list[tuple[str, str]], slots: Mapping[str, str], shapes: Mapping[str, tuple[Size, ...]]
) -> tuple[tuple[Step, ...], list[tuple[str, str]]]:
    """Steps that write straight into a slot where a product or matmul can, and the outputs that must be copied."""
    by_name = {step.name: step for step in loop.steps}
    written: dict[str, Step] = {}
    copied = []
    for value, total in stacked:
        base = by_name.get(value)
        while base is not None and base.kernel is Kernel.VIEW:
            base = by_name.get(base.inputs[0]) if _is_view(base) else None
        out = f"{slots[total]}.view({text(shapes[base.name])})" if base is not None else ""
        code = written_to(out, base.code) if base is not None and base.name not in written else None
        if base is None or code is None:
            copied.append((value, total))
        else:
            written[base.name] = replace(base, code=code, own=False, into=())
    return tuple(written.get(step.name, step) for step in loop.steps), copied
