"""Steps as lines of Python: a comment where the subject changes, values let go of, and their memory used again."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import replace

from .store import Step


def alive(steps: Iterable[Step], wanted: set[str]) -> tuple[Step, ...]:
    """The steps that some wanted value needs."""
    kept, needed = [], set(wanted)
    for step in reversed(tuple(steps)):
        if step.name in needed:
            kept.append(step)
            needed |= set(step.inputs)
    return tuple(reversed(kept))


def lines_of(steps: tuple[Step, ...], kept: set[str]) -> list[str]:
    """One line per step; values in `kept` are not deleted, nor written over."""
    steps = _in_place(steps, kept)
    last = {name: k for k, step in enumerate(steps) for name in step.inputs}
    own = {step.name for step in steps}
    captured = captured_by(steps)
    lines, note = [], ""
    for k, step in enumerate(steps):
        if step.note != note:
            note = step.note
            lines.append(f"    # {note}")
        lines.append(f"    {step.name} = {step.code}")
        dead = [name for name in step.inputs if last[name] == k and name in own and name not in kept]
        lines += freed(dead, captured)
    return lines


def functional(steps: Iterable[Step]) -> tuple[Step, ...]:
    """The same, writing over nothing: for what autograd or vmap is to see through."""
    return tuple(replace(step, into=(), own=False) for step in steps)


def _in_place(steps: tuple[Step, ...], kept: set[str]) -> tuple[Step, ...]:
    """Each step writes over an operand where nothing after it can see the operand's memory."""
    seen = _memory(steps)
    last = {memory: k for k, step in enumerate(steps) for name in step.inputs for memory in seen.get(name, ())}
    pinned = {memory for name in kept for memory in seen.get(name, ())}
    found = []
    for k, step in enumerate(steps):
        for operand, code in step.into:
            free = seen.get(operand, frozenset())
            if free and not free & pinned and all(last[memory] == k for memory in free):
                step = replace(step, code=code)
                break
        found.append(step)
    return tuple(found)


def _memory(steps: tuple[Step, ...]) -> dict[str, frozenset[str]]:
    """For each value the steps whose memory it may be: its own, or that of everything it was made from."""
    seen: dict[str, frozenset[str]] = {}
    for step in steps:
        inherited = frozenset().union(*(seen.get(name, frozenset()) for name in step.inputs))
        seen[step.name] = frozenset({step.name}) if step.own else inherited
    return seen


def captured_by(steps: Iterable[Step]) -> set[str]:
    """The values that functions and comprehensions inside the steps read."""
    inside = (node for step in steps if _MARK.search(step.code) for node in ast.walk(ast.parse(step.code)))
    scopes = (node for node in inside if isinstance(node, ast.Lambda | ast.GeneratorExp | ast.ListComp))
    return {node.id for scope in scopes for node in ast.walk(scope) if isinstance(node, ast.Name)}


_MARK = re.compile(r"\blambda\b|\bfor\b")


def freed(names: Iterable[str], captured: set[str]) -> list[str]:
    """Lines that let go of values; torch.compile knows no `del` of one that a function inside has captured."""
    plain = [name for name in names if name not in captured]
    lines = [f"    del {', '.join(plain)}"] if plain else []
    return lines + [f"    {name} = None" for name in names if name in captured]
