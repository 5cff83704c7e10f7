"""Memory: the most that steps hold at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cost import Kernel, bytes_of, number
from .expr import Rounds, Value
from .lines import in_place, lines_of


def peak_of(
    steps: Sequence[Value], kept: Iterable[Value], batch: int, itemsize: int, copies: float = 0.0
) -> float:
    """The peak when every step frees what nobody reads any more; what is `kept` is there in the end.

    A view keeps its base alive and takes nothing, nor does what is written over an operand; a call takes its own values
    for as long as it runs. Results that are one value, but for the first, are `copies`: each has memory of its own in
    the end.
    """
    kept = set(kept)
    owner: dict[Value, Value] = {}
    for line in in_place(lines_of(steps), kept):
        base = line.over or _base(line.value)
        owner[line.value] = line.value if base is None else owner.get(base, base)
    last = {owner.get(value, value): k for k, step in enumerate(steps) for value in (*step.inputs, step)}
    last |= {owner.get(value, value): len(steps) for value in kept}
    live: dict[Value, float] = {}
    peak = 0.0
    for k, step in enumerate(steps):
        if owner.get(step) is step:
            own = step.dtype.itemsize if step.dtype is not None else itemsize
            live[step] = 0.0 if _several(step) else bytes_of(step.shape, batch, own)
        peak = max(peak, sum(live.values()) + itemsize * number(step.work.inside, batch))
        for value in [value for value in live if last.get(value, len(steps)) == k]:
            del live[value]
    return max(peak, sum(live.values()) + copies)


def _base(value: Value) -> Value | None:
    """The value whose memory a view reads; None for a value of its own."""
    return value.inputs[0] if value.kernel is Kernel.VIEW and value.inputs else None


def _several(value: Value) -> bool:
    """Whether it is a tuple, whose items are values of their own."""
    return isinstance(value.expr, Rounds) and value.expr.body.several
