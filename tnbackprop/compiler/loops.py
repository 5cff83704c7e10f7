"""Loop: the steps that depend on a column run once for every column; all others run once, before.

A result that keeps the column leg is the concatenation of what the columns give, every other one is their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .listing import alive, lines_of
from .store import Step, Store


@dataclass(frozen=True)
class Loop:
    """for `variable` in `root`: `steps`; `outputs` are pairs (value inside, its total outside)."""

    variable: str
    root: str
    count: int
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, str], ...]
    stacked: frozenset[str]  # those of the totals that are concatenated

    @property
    def reads(self) -> tuple[str, ...]:
        """The values from outside that the loop reads."""
        own = {step.name for step in self.steps} | {self.variable}
        inputs = [*(name for step in self.steps for name in step.inputs), *(value for value, _ in self.outputs)]
        return tuple(dict.fromkeys(name for name in inputs if name not in own))


Results = Mapping[str, Mapping[str, str]]


def over_columns(
    store: Store, variable: str, root: str, count: int, results: Results, stacked: set[str]
) -> tuple[Loop, dict[str, dict[str, str]]]:
    """The loop, and the results with the names of the totals in place of the values inside."""
    inside = {variable}
    for step in store.steps:
        if inside & set(step.inputs):
            inside.add(step.name)
    totals: dict[tuple[str, bool], str] = {}
    renamed: dict[str, dict[str, str]] = {}
    for quantity, by in results.items():
        for name, value in by.items():
            key = (value, quantity in stacked)
            if value in inside or key[1]:
                totals.setdefault(key, f"total_{variable.rsplit('_', 1)[-1]}_{len(totals)}")
            renamed.setdefault(quantity, {})[name] = totals.get(key, value)
    steps = alive((s for s in store.steps if s.name in inside), {value for value, _ in totals})
    outputs = tuple((value, total) for (value, _), total in totals.items())
    concatenated = frozenset(total for (_, stack), total in totals.items() if stack)
    return Loop(variable, root, count, steps, outputs, concatenated), renamed


def loop_lines(loop: Loop) -> list[str]:
    """The loop as source. Sums are accumulated as they come, concatenations at the end."""
    kept = {value for value, _ in loop.outputs}
    summed = [(value, total) for value, total in loop.outputs if total not in loop.stacked]
    stacked = [(value, total) for value, total in loop.outputs if total in loop.stacked]
    name = loop.variable.rsplit("_", 1)[-1]
    lines = [f"    # {loop.count} columns, one at a time", f"    sums_{name}, lists_{name} = [0] * {len(summed)}, []"]
    lines.append(f"    for {loop.variable} in {loop.root}.unbind(0):")
    lines += [f"    {line}" for line in lines_of(loop.steps, kept)]
    values = ", ".join(value for value, _ in summed)
    lines.append(f"        sums_{name} = [a + b for a, b in zip(sums_{name}, [{values}])]")
    if stacked:
        lines.append(f"        lists_{name} = [*lists_{name}, [{', '.join(value for value, _ in stacked)}]]")
    lines.append(f"    del {', '.join([loop.variable, *kept_names(loop)])}")
    lines += [f"    {total} = sums_{name}[{k}]" for k, (_, total) in enumerate(summed)]
    lines += [f"    {total} = torch.cat([each[{k}] for each in lists_{name}])" for k, (_, total) in enumerate(stacked)]
    return [*lines, f"    del sums_{name}, lists_{name}"]


def kept_names(loop: Loop) -> list[str]:
    """Values of the last turn that would stay alive."""
    own = {step.name for step in loop.steps}
    return [value for value in dict.fromkeys(value for value, _ in loop.outputs) if value in own]
