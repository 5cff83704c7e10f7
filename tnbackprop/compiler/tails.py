"""Linear tails: what a loop does to its values linearly, before it adds them up, is done once, to their sum.

    Σ_v (x_v @ A) = (Σ_v x_v) @ A

A tail is moved behind the loop where that is predicted to be faster: what is added up instead may be larger.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from ..diagram import COLUMN, Leg
from .cost import Kernel, Work
from .store import Ref, Step, Store

Totals = Sequence[tuple[str, str]]
_MATMULS = ("torch.mm", "torch.bmm", "torch.mv")
_LINEAR = frozenset(
    ("contiguous", "expand", "mT", "narrow", "permute", "reshape", "squeeze", "sum", "t", "transpose", "unsqueeze")
)


def behind(
    store: Store, steps: Sequence[Step], summed: Totals, begin: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[Step]]:
    """Pairs (value inside, total) for the loop to add up, and the steps behind it that lead to the totals asked for."""
    by_name, readers = _read(steps, [value for value, _ in summed])
    pairs: dict[str, str] = {}
    kept, after = [], []
    for value, total in summed:
        _, tail = _tail(store, by_name, readers, value, pairs)
        if not tail:
            kept.append((value, total))
            continue
        first = next(name for name in tail[0].inputs if name in store.varying)
        names = {first: pairs.setdefault(first, f"{total}_of")}
        for step in tail:
            names[step.name] = f"{names[first]}_{step.name}"
        if total not in begin:
            names[value] = total
        after += [renamed(step, names) for step in tail]
        if total in begin:
            code = f"{begin[total]} + {names[value]}"
            after.append(Step(total, code, (begin[total], names[value]), Kernel.ELEMENTWISE, _adding(store, value)))
        store.shapes |= {new: store.shapes[old] for old, new in names.items()} | {total: store.shapes[value]}
    return [*kept, *pairs.items()], after


def saved(store: Store, start: int, *refs: Ref) -> float:
    """Predicted seconds that a loop which sums the values saves where tails of the steps from `start` on run once."""
    return sum(seconds for seconds, _ in _tails(store, start, refs))


def tails(store: Store, start: int, *refs: Ref) -> frozenset[str]:
    """The names of those steps."""
    return frozenset(step.name for _, tail in _tails(store, start, refs) for step in tail)


def _tails(store: Store, start: int, refs: Sequence[Ref]) -> list[tuple[float, tuple[Step, ...]]]:
    values = [store.resolve(ref.name) for ref in refs if not any(leg.name == COLUMN for leg in ref.order)]
    by_name, readers = _read([step for step in store.steps[start:] if step.name in store.varying], values)
    return [_tail(store, by_name, readers, value, ()) for value in values] if store.rounds > 1 else []


def _read(steps: Sequence[Step], values: Sequence[str]) -> tuple[dict[str, Step], Counter[str]]:
    """The steps by name, and how often each value is read, by steps or as a result."""
    return {step.name: step for step in steps}, Counter([*(name for s in steps for name in s.inputs), *values])


def _tail(
    store: Store, by_name: Mapping[str, Step], readers: Mapping[str, int], value: str, added: Container[str]
) -> tuple[float, tuple[Step, ...]]:
    """The last steps to a value that are best done once, with the seconds saved; none if the loop does them all.

    What is added up for another value already costs nothing to add up.
    """
    tail: list[Step] = []
    inside, rounds = store.varying, store.rounds
    whole = rounds * _seconds(store, _adding(store, value))
    best: tuple[float, tuple[Step, ...]] = (whole, ())
    done = 0.0
    while (step := by_name.get(value)) is not None and readers[value] == 1:
        own = [name for name in step.inputs if name in inside]
        if len(own) != 1 or own[0] not in by_name or not (step.linear == own[0] or is_linear(step.code, own[0])):
            break
        tail.insert(0, step)
        value = own[0]
        done += store.seconds_of(step)
        adding = 0.0 if value in added else _seconds(store, _adding(store, value))
        seconds = done + rounds * (adding - done)
        best = min(best, (seconds, tuple(tail)), key=lambda found: found[0])
    return whole - best[0], best[1]


def _adding(store: Store, value: str) -> Work:
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(store.shapes[value]))
    return Work(flops=((1, legs),), moved=((3, legs),))


def _seconds(store: Store, work: Work) -> float:
    return store.rates.seconds(Kernel.ELEMENTWISE, work, store.batch, store.itemsize)


def renamed(step: Step, names: Mapping[str, str]) -> Step:
    """The step with other names for what it reads, and for itself."""
    if not names:
        return step
    pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, names)) + r")\b")

    def code_with(code: str) -> str:
        return pattern.sub(lambda match: names[match.group(1)], code)

    inputs = tuple(names.get(name, name) for name in step.inputs)
    into = tuple((names.get(name, name), code_with(code)) for name, code in step.into)
    return replace(step, name=names.get(step.name, step.name), code=code_with(step.code), inputs=inputs, into=into)


def is_linear(code: str, name: str) -> bool:
    """Whether code is a matmul, a product, a sum over axes or another view of `name`, and linear in it."""
    return _linear(ast.parse(code, mode="eval").body, name)


def _linear(node: ast.expr, name: str) -> bool:
    match node:
        case ast.Name(id=found):
            return found == name
        case ast.Attribute(value=inner, attr=attribute):
            return attribute in _LINEAR and _linear(inner, name)
        case ast.Call(func=ast.Attribute() as function, args=arguments):
            if ast.unparse(function) in _MATMULS:
                return _one_of(arguments, name)
            return not any(_reads(argument, name) for argument in arguments) and _linear(function, name)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _one_of([left, right], name)
    return False


def _one_of(factors: Sequence[ast.expr], name: str) -> bool:
    reading = [factor for factor in factors if _reads(factor, name)]
    return len(reading) == 1 and _linear(reading[0], name)


def _reads(node: ast.expr, name: str) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node))
