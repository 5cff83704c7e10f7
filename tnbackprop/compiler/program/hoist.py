"""Hoist: what a loop does to its values linearly, before it adds them up, is done once, to their sum.

    Σ_v (x_v @ A) = (Σ_v x_v) @ A

It goes behind the loop where that is predicted to be faster: what is added up instead may be larger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from ...diagram.core import COLUMN, Leg
from . import functions as f
from .cost import Kernel, Work
from .expr import Call, Ref, Value, reads, replaced
from .facts import is_linear
from .store import Store

Totals = Sequence[tuple[Value, Value]]


def hoisted(
    store: Store, steps: Sequence[Value], summed: Totals, begin: Mapping[Value, Value]
) -> tuple[list[tuple[Value, Value]], list[Value], dict[Value, Value]]:
    """Pairs (value inside, total) for the loop to add up, the values behind it, and those that totals become there."""
    by_value, readers = _read(steps, [value for value, _ in summed])
    pairs: dict[Value, Value] = {}
    kept, after = [], []
    last: dict[Value, Value] = {}
    for value, total in summed:
        _, epilogue = _epilogue(store, by_value, readers, value, pairs)
        if not epilogue:
            kept.append((value, total))
            continue
        first = next(each for each in epilogue[0].inputs if store.varies(each))
        if first not in pairs:
            pairs[first] = Value(f"{total.key}:of", None, first.shape, hint=f"{total.hint}_of", floating=first.floating)
        names = {first: pairs[first]}
        for step in epilogue:
            names[step] = moved(step, names, f"{names[first].hint}_{step.hint}")
        after += [names[step] for step in epilogue]
        end = names[value]
        if total in begin:
            expr = Call(f.ADD, (begin[total], end))
            work, hint = _adding(value), total.hint
            end = Value(total.key, expr, total.shape, Kernel.ELEMENTWISE, work, hint=hint, inputs=reads(expr))
            after.append(end)
        last[total] = end
    return [*kept, *pairs.items()], after, last


def moved(step: Value, to: Mapping[Value, Value], hint: str = "") -> Value:
    """The same of other values."""
    expr = replaced(step.expr, lambda value: to.get(value, value))
    inputs = tuple(dict.fromkeys(to.get(value, value) for value in step.inputs))
    return replace(step, key=f"{step.key}:moved", expr=expr, inputs=inputs, hint=hint or step.hint)


def saved(trial: Store, *refs: Ref) -> float:
    """Predicted seconds that a loop which sums the values saves where what a trial does linearly at last is hoisted."""
    return sum(seconds for seconds, _ in _epilogues(trial, refs))


def epilogues(trial: Store, *refs: Ref) -> frozenset[Value]:
    """The values that are computed once, then."""
    return frozenset(step for _, epilogue in _epilogues(trial, refs) for step in epilogue)


def _epilogues(trial: Store, refs: Sequence[Ref]) -> list[tuple[float, tuple[Value, ...]]]:
    if trial.rounds == 1:
        return []
    values = [ref.value for ref in refs if not any(leg.name == COLUMN for leg in ref.order)]
    by_value, readers = _read([step for step in trial.steps if trial.varies(step)], values)
    return [_epilogue(trial, by_value, readers, value, ()) for value in values]


def _read(steps: Sequence[Value], values: Sequence[Value]) -> tuple[set[Value], Counter[Value]]:
    """The steps, and how often each value is read, by steps or as a result."""
    return set(steps), Counter([*(value for s in steps for value in s.inputs), *values])


def _epilogue(
    store: Store, steps: Container[Value], readers: Mapping[Value, int], value: Value, added: Container[Value]
) -> tuple[float, tuple[Value, ...]]:
    """The last steps to a value that are best done once, with the seconds saved; none if the loop does them all.

    What is added up for another value already costs nothing to add up.
    """
    epilogue: list[Value] = []
    rounds = store.rounds
    whole = rounds * _seconds(store, _adding(value))
    best: tuple[float, tuple[Value, ...]] = (whole, ())
    done = 0.0
    while value in steps and readers[value] == 1:
        own = [each for each in value.inputs if store.varies(each)]
        if len(own) != 1 or own[0] not in steps or not (value.linear is own[0] or is_linear(value.expr, own[0])):
            break
        epilogue.insert(0, value)
        done += store.seconds_of(value)
        value = own[0]
        adding = 0.0 if value in added else _seconds(store, _adding(value))
        seconds = done + rounds * (adding - done)
        best = min(best, (seconds, tuple(epilogue)), key=lambda found: found[0])
    return whole - best[0], best[1]


def _adding(value: Value) -> Work:
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(value.shape))
    return Work(flops=((1, legs),), moved=((3, legs),))


def _seconds(store: Store, work: Work) -> float:
    return store.rates.seconds(Kernel.ELEMENTWISE, work, store.batch, store.itemsize)
