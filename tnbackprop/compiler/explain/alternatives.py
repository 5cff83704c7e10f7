"""The ways to compute a quantity of a parameter, as the planner tried them: explicit or Gram, with costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import sympy

from ...diagram.algebra import all_parts, inline
from ...diagram.core import Diagram, Part
from ..plan.choose import Choice
from ..plan.plan import Plan
from ..program.cost import Rates, Terms, number
from ..program.expr import Value
from ..program.lines import alive
from ..sweep.derived import Result
from .polynomials import Symbols, number_text, without_common_factor

BATCHES = 4096
"""Up to this batch size it is said which alternative is predicted to be faster."""
SMALL = 0.02
"""Terms that are a smaller share of the FLOPs are left out of a condition."""


class Way(Enum):
    """How a quantity comes about."""

    EXPLICIT = "explicit"  # reads a part that is built, or is one itself
    GRAM = "Gram"  # the halves are multiplied out and contracted across
    DIRECT = "direct"  # linear in the individual gradients, which are never built


@dataclass(frozen=True)
class Alternative:
    """One way to compute one quantity of one parameter, and what it takes when nothing else is asked for."""

    way: Way
    diagram: Diagram
    reads: tuple[str, ...]  # names of the parts that are built for it
    steps: tuple[Value, ...]
    chosen: bool
    rounds: Mapping[Value, int]  # of the steps that run in each round of a loop, how often

    @property
    def flops(self) -> Terms:
        return tuple((c * self.rounds.get(s, 1), legs) for s in self.steps for c, legs in s.work.flops)

    def seconds(self, plan: Plan, batch: int) -> float:
        each = ((seconds((step,), plan.rates, batch, plan.itemsize), step) for step in self.steps)
        return sum(once * self.rounds.get(step, 1) for once, step in each)


def seconds(steps: tuple[Value, ...], rates: Rates, batch: int, itemsize: int) -> float:
    """Predicted seconds of some steps."""
    return sum(rates.seconds(step.kernel, step.work, batch, itemsize) for step in steps)


def part_names(diagrams: Mapping[Result, Diagram], choice: Choice) -> dict[Diagram, str]:
    """A name for every part: G for the individual gradients, D for what is made of other parts."""
    before = (diagram for quantity, diagram in choice.item.condensed.items() if quantity in diagrams)
    found = dict.fromkeys(part.diagram for diagram in (*diagrams.values(), *before) for part in all_parts(diagram))
    names: dict[Diagram, str] = {}
    for part in found:
        base = "D" if all_parts(part) else "G"
        taken = sum(name.startswith(base) for name in names.values())
        names[part] = base + (str(taken + 1) if taken else "")
    for part, name in list(names.items()):
        for option in choice.options:
            names.setdefault(inline(part, option.kept), name)
    return names


def alternatives(diagrams: Mapping[Result, Diagram], choice: Choice) -> dict[Result, tuple[Alternative, ...]]:
    """For each quantity the ways that were tried, the chosen one first."""
    names = part_names(diagrams, choice)
    found: dict[Result, tuple[Alternative, ...]] = {}
    for quantity, diagram in diagrams.items():
        ways: dict[Diagram, Alternative] = {}
        for option in (choice.chosen, *choice.options):
            form = option.forms[quantity]
            if form not in ways:
                steps = alive(option.steps, {option.results[quantity]})
                reads = tuple(dict.fromkeys(names[part.diagram] for part in all_parts(form)))
                chosen = option is choice.chosen
                ways[form] = Alternative(_way(diagram, form), form, reads, steps, chosen, option.rounds)
        found[quantity] = tuple(ways.values())
    return found


def _way(diagram: Diagram, form: Diagram) -> Way:
    if all_parts(form) or not all_parts(diagram):
        return Way.EXPLICIT
    if _degree(diagram) > 1:
        return Way.GRAM
    whole = any(
        set(part.legs) == set(diagram.legs) for p in diagram.products for part in p.operands if isinstance(part, Part)
    )
    return Way.EXPLICIT if whole else Way.DIRECT


def _degree(diagram: Diagram) -> int:
    """How many of the innermost parts a product multiplies."""
    degrees = [sum(max(1, _degree(op.diagram)) for op in p.operands if isinstance(op, Part)) for p in diagram.products]
    return max(degrees, default=0)


def conditions(plan: Plan, symbols: Symbols, ways: tuple[Alternative, ...]) -> Iterator[str]:
    """Where the best of the other ways would be better than the chosen one: by FLOPs, and by time for other N."""
    chosen = ways[0]
    others = [way for way in ways[1:] if {way.way, chosen.way} == {Way.GRAM, Way.EXPLICIT}]
    if not others:
        return
    other = min(others, key=lambda way: way.seconds(plan, plan.batch))
    first, second = (chosen, other) if chosen.way is Way.GRAM else (other, chosen)
    yield _by_flops(plan, symbols, first, second)
    yield "predicted faster: " + _by_time(plan, first, second)


def _by_flops(plan: Plan, symbols: Symbols, first: Alternative, second: Alternative) -> str:
    """Where the first takes fewer FLOPs, in leg sizes, and whether that is so here."""
    verb = f"{first.way.value} takes fewer FLOPs than {second.way.value}"
    sides = [_leading(symbols, symbols.polynomial(way.flops), plan.batch) for way in (first, second)]
    left, right = without_common_factor(*sides)
    if left == right:
        return f"{first.way.value} and {second.way.value} take the same FLOPs up to small terms"
    if left.is_number and right.is_number:
        return f"{verb} {'everywhere' if left < right else 'nowhere'}: the ratio is {left / right} up to small terms"
    numbers = [symbols.at(side, plan.batch) for side in (left, right)]
    holds = "<" if numbers[0] < numbers[1] else "≥"
    shown = [symbols.text(side, plan.batch) for side in (left, right)]
    return f"{verb} where {shown[0]} < {shown[1]}  (here {number_text(numbers[0])} {holds} {number_text(numbers[1])})"


def _leading(symbols: Symbols, polynomial: sympy.Expr, batch: int) -> sympy.Expr:
    total = symbols.at(polynomial, batch)
    terms = sympy.Add.make_args(sympy.expand(polynomial))
    return sympy.Add(*(term for term in terms if symbols.at(term, batch) >= SMALL * total))


def _by_time(plan: Plan, first: Alternative, second: Alternative) -> str:
    """Which one is predicted to be faster as the batch grows, with the first batch size at which that changes."""

    def winner(batch: int) -> Way:
        return first.way if first.seconds(plan, batch) <= second.seconds(plan, batch) else second.way

    batch, shown, start = 1, [], winner(1)
    while batch < BATCHES:
        after = winner(2 * batch)
        if after is not start:
            low, high = batch, 2 * batch
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if winner(middle) is start else (low, middle)
            shown.append(f"{start.value} up to N = {low}")
            start = after
        batch *= 2
    return ", ".join([*shown, f"{start.value} {'from there' if shown else 'for every N'} up to {BATCHES}"])


def work_numbers(way: Alternative, plan: Plan) -> tuple[float, float]:
    """Seconds and FLOPs at the plan's batch size."""
    return way.seconds(plan, plan.batch), number(way.flops, plan.batch)
