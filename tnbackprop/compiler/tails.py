"""Linear tails: what a loop does to its values linearly, before it adds them up, is done once, to their sum.

    Σ_v (x_v @ A) = (Σ_v x_v) @ A

A tail is moved behind the loop where that is predicted to be faster: what is added up instead may be larger.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from ..diagram import Leg
from .cost import Kernel, Work
from .store import Step, Store

Totals = Sequence[tuple[str, str]]
_MATMULS = ("torch.mm", "torch.bmm", "torch.mv")
_LINEAR = frozenset(
    ("contiguous", "expand", "mT", "permute", "reshape", "squeeze", "sum", "t", "transpose", "unsqueeze")
)


def behind(
    store: Store, steps: Sequence[Step], inside: Set[str], summed: Totals, begin: Mapping[str, str], rounds: int
) -> tuple[list[tuple[str, str]], list[Step]]:
    """Pairs (value inside, total) for the loop to add up, and the steps behind it that lead to the totals asked for.

    inside  all values that are others in each round: those of the steps, and what the loop runs over
    """
    by_name = {step.name: step for step in steps}
    readers: dict[str, int] = {}
    for name in [name for step in steps for name in step.inputs] + [value for value, _ in summed]:
        readers[name] = readers.get(name, 0) + 1
    pairs: dict[str, str] = {}
    kept, after = [], []
    for value, total in summed:
        tail = _tail(store, by_name, inside, readers, value, rounds)
        if not tail:
            kept.append((value, total))
            continue
        first = next(name for name in tail[0].inputs if name in inside)
        names = {first: pairs.setdefault(first, f"{total}_of")}
        for step in tail:
            names[step.name] = f"{names[first]}_{step.name}"
        if total not in begin:
            names[value] = total
        after += [_renamed(step, names) for step in tail]
        if total in begin:
            code = f"{begin[total]} + {names[value]}"
            after.append(Step(total, code, (begin[total], names[value]), Kernel.ELEMENTWISE, _adding(store, value)))
        store.shapes |= {new: store.shapes[old] for old, new in names.items()} | {total: store.shapes[value]}
    return [*kept, *pairs.items()], after


def _tail(
    store: Store, by_name: Mapping[str, Step], inside: Set[str], readers: Mapping[str, int], value: str, rounds: int
) -> tuple[Step, ...]:
    """The last steps to a value that are best done once; none if the loop had better do them all."""
    tail: list[Step] = []
    best: tuple[float, tuple[Step, ...]] = (rounds * _seconds(store, _adding(store, value)), ())
    done = 0.0
    while (step := by_name.get(value)) is not None and readers[value] == 1:
        own = [name for name in step.inputs if name in inside]
        if len(own) != 1 or own[0] not in by_name or not is_linear(step.code, own[0]):
            break
        tail.insert(0, step)
        value = own[0]
        done += store.rates.seconds(step.kernel, step.work, store.batch, store.itemsize)
        seconds = done + rounds * (_seconds(store, _adding(store, value)) - done)
        best = min(best, (seconds, tuple(tail)), key=lambda found: found[0])
    return best[1]


def _adding(store: Store, value: str) -> Work:
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(store.shapes[value]))
    return Work(flops=((1, legs),), moved=((3, legs),))


def _seconds(store: Store, work: Work) -> float:
    return store.rates.seconds(Kernel.ELEMENTWISE, work, store.batch, store.itemsize)


def _renamed(step: Step, names: Mapping[str, str]) -> Step:
    pattern = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, names)) + r")\b")
    code = pattern.sub(lambda match: names[match.group(1)], step.code)
    inputs = tuple(names.get(name, name) for name in step.inputs)
    return replace(step, name=names[step.name], code=code, inputs=inputs, into=())


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
