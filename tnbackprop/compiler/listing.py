"""Steps as lines of Python: a comment where the subject changes, and `del` after the last use."""

from __future__ import annotations

from collections.abc import Iterable

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
    """One line per step; values in `kept` are not deleted."""
    last = {name: k for k, step in enumerate(steps) for name in step.inputs}
    own = {step.name for step in steps}
    lines, note = [], ""
    for k, step in enumerate(steps):
        if step.note != note:
            note = step.note
            lines.append(f"    # {note}")
        lines.append(f"    {step.name} = {step.code}")
        dead = [name for name in step.inputs if last[name] == k and name in own and name not in kept]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    return lines
