"""Loop: the steps that depend on a column run once for every column; all others run once, before.

A result that keeps the column leg is the concatenation of what the columns give, every other one is their sum.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..diagram import Size
from .arrange import text
from .cost import Kernel
from .derived import Columns
from .listing import alive, lines_of
from .store import Step, Store


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

    @property
    def count(self) -> int:
        """How often the loop runs."""
        return -(-self.columns // self.width)

    @property
    def reads(self) -> tuple[str, ...]:
        """The values from outside that the loop reads."""
        own = {step.name for step in self.steps} | set(self.rows)
        inputs = [name for step in self.steps for name in step.inputs]
        inputs += [*(value for value, _ in self.outputs), *self.rows.values(), *self.begin.values()]
        return tuple(dict.fromkeys(name for name in inputs if name not in own))


Results = Mapping[str, Mapping[str, str]]


def over_columns(
    store: Store, rows: Mapping[str, str], columns: Columns, results: Results, stacked: set[str], earlier: Results
) -> tuple[Loop, dict[str, dict[str, str]]]:
    """The loop, and the results with the names of the totals in place of the values inside.

    A result that an earlier sweep has contributed to goes on from there.
    """
    inside = set(rows)
    for step in store.steps:
        if inside & set(step.inputs):
            inside.add(step.name)
    totals: dict[tuple[str, bool, str], str] = {}
    renamed: dict[str, dict[str, str]] = {}
    for quantity, by in results.items():
        for name, value in by.items():
            key = (value, quantity in stacked, earlier.get(quantity, {}).get(name, ""))
            if value in inside or key[1] or key[2]:
                totals.setdefault(key, f"total_{columns.number}_{len(totals)}")
            renamed.setdefault(quantity, {})[name] = totals.get(key, value)
    steps = alive((s for s in store.steps if s.name in inside), {value for value, _, _ in totals})
    outputs = tuple((value, total) for (value, _, _), total in totals.items())
    concatenated = frozenset(total for (_, stack, _), total in totals.items() if stack)
    begin = {total: start for (_, _, start), total in totals.items() if start}
    return Loop(rows, columns.count, columns.width, steps, outputs, concatenated, begin), renamed


def loop_lines(loop: Loop, shapes: Mapping[str, tuple[Size, ...]]) -> list[str]:
    """The loop as source. Sums are added up as they come; a concatenation is allocated once and filled in place."""
    summed = [(value, total) for value, total in loop.outputs if total not in loop.stacked]
    stacked = [(value, total) for value, total in loop.outputs if total in loop.stacked]
    number = next(iter(loop.rows)).rsplit("_", 1)[-1]
    slots = {total: f"slot{total.removeprefix('total')}" for _, total in stacked}
    cut = f"split({loop.width})" if loop.width > 1 else "unbind(0)"
    start = ", ".join(loop.begin.get(total, "0") for _, total in summed)
    lines = [f"    # {loop.columns} columns, {loop.width} at a time", f"    sums_{number} = [{start}]"]
    for value, total in stacked:
        lines.append(f"    {total} = like.new_empty(({text((loop.count * loop.width, *shapes[value][1:]))},))")
    rows = ", ".join(f"{name}.{cut}" for name in (*loop.rows.values(), *slots))
    targets = ", ".join([*loop.rows, *slots.values()])
    lines.append(f"    for {targets} in progress({f'zip({rows})' if ',' in targets else rows}):")
    steps, copied = _filling(loop, stacked, slots, shapes)
    lines += [f"    {line}" for line in lines_of(steps, {value for value, _ in loop.outputs})]
    squeezed = "" if loop.width > 1 else ".squeeze(0)"
    lines += [f"        {slots[total]}[:] = {value}{squeezed}" for value, total in copied]
    values = ", ".join(value for value, _ in summed)
    lines.append(f"        sums_{number} = [a + b for a, b in zip(sums_{number}, [{values}])]")
    own = {step.name for step in loop.steps}
    left = [value for value in dict.fromkeys(value for value, _ in loop.outputs) if value in own]
    lines.append(f"    del {', '.join([*loop.rows, *slots.values(), *left])}")
    lines += [f"    {total} = sums_{number}[{k}]" for k, (_, total) in enumerate(summed)]
    if loop.count * loop.width > loop.columns:
        lines += [f"    {total} = {total}[:{loop.columns}]" for _, total in stacked]
    return [*lines, f"    del sums_{number}"]


_VIEWS = re.compile(r"(\.(reshape|unsqueeze|squeeze|expand|contiguous)\([^()]*\))+")


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
            source = base.inputs[0] if base.inputs else ""
            base = by_name.get(source) if _VIEWS.fullmatch(base.code.removeprefix(source)) else None
        out = f"{slots[total]}.view({text(shapes[base.name])})" if base is not None else ""
        code = _into(base.code, out) if base is not None and base.name not in written else None
        if base is None or code is None:
            copied.append((value, total))
        else:
            written[base.name] = replace(base, code=code)
    return tuple(written.get(step.name, step) for step in loop.steps), copied


def _into(code: str, out: str) -> str | None:
    """The same product or matmul with out=; None for other code."""
    node = ast.parse(code, mode="eval").body
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return f"torch.mul({ast.unparse(node.left)}, {ast.unparse(node.right)}, out={out})"
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.mm", "torch.bmm"):
        return f"{code[:-1]}, out={out})"
    return None
