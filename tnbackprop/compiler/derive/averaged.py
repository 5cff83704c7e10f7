"""KFRA's recursion: one matrix for the whole batch at every value, Ḡ_u = (1/N) Σ_n J_nᵀ Ḡ_z J_n.

Botev et al. 2017, arXiv:1706.03662. On any graph: where several values are alive, the blocks between them are kept as
well, and where paths merge they add. A block is dense, features times features; it is named K_{a}_{b}.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement

from ...diagram.algebra import pull_back, tensor
from ...diagram.core import BATCH, Diagram, Leg, N, Product
from ...diagram.jacobian import Jacobian
from ...diagram.simplify import simplify
from ...errors import FormulaError
from ...notation.bind import BoundRule, Equation
from ..sweep.derived import Backward
from ..sweep.extract import extraction
from ..sweep.lines import jacobian_of, operands_of
from ..sweep.state import Sweep, all_uses
from ..sweep.sweep import classify, cotangent_of
from ..translate.graph import Call

Legs = tuple[Leg, ...]
Bound = tuple[tuple[Call, BoundRule], ...]


@dataclass
class Averages:
    """The blocks between values that are alive: terms [*first, *second'], each in the order of `place`."""

    sweep: Sweep
    blocks: dict[tuple[str, str], list[Diagram]] = field(default_factory=dict)
    legs: dict[str, Legs] = field(default_factory=dict)  # of the values that have been met, without the batch
    place: dict[str, int] = field(default_factory=dict)  # in the order of computation

    def add(self, one: str, other: str, first: Legs, second: Legs, products: tuple[Product, ...]) -> None:
        """Enter a term with these legs; the block of a pair is kept once, the later value first."""
        if self.place[one] < self.place[other]:
            one, other, first, second = other, one, second, first
        self.blocks.setdefault((one, other), []).append(simplify(Diagram((*first, *second), products)))

    def named(self, one: str, other: str) -> Diagram:
        """The block as a value, with legs [*one, *other~]; scheduled when it is first read."""
        first, second = (one, other) if self.place[one] >= self.place[other] else (other, one)
        name = block_name(first, second)
        if not any(item.name == name for item in self.sweep.schedule if isinstance(item, Backward)):
            terms, of = tuple(self.blocks[first, second]), first if first == second else ""
            self.sweep.schedule.append(Backward(name, "", terms, f"{first} and {second}", matrix_of=of))
        legs = {one: self.legs[one], other: copied(self.legs[other])}
        if one == other:
            return tensor(name, (*self.legs[one], *copied(self.legs[one])))
        return Diagram((*legs[one], *legs[other]), tensor(name, (*legs[first], *legs[second])).products)


def block_name(one: str, other: str) -> str:
    return f":K:{one}" if one == other else f":K::{one}:{other}"


def copied(legs: Legs) -> Legs:
    """The legs of the second side of a block."""
    return tuple(Leg(f"{leg.name}~", leg.size) for leg in legs)


def run_averaged(sweep: Sweep, bound: Bound, output: str, start: Diagram) -> None:
    """All blocks from that of the model's output back, and the quantities of every parameter."""
    classify(sweep, bound)
    lines = [(call, rule, equation) for call, rule in bound for equation in rule.equations]
    averages = Averages(sweep, place={equation.name: k for k, (_, _, equation) in enumerate(lines)})
    averages.place |= {name: -1 - k for k, name in enumerate(sweep.graph.inputs)}
    averages.legs |= {e.name: tuple(leg for leg in e.legs if leg.size != N) for _, _, e in lines}
    averages.blocks[output, output] = [start]
    for call, rule, equation in reversed(lines):
        if (equation.name, equation.name) in averages.blocks:
            _through(averages, call, rule, equation)
        elif sweep.uses.get(equation.name):
            _through_parameters(sweep, equation)
    for name in sweep.graph.parameters:
        if sweep.graph.values[name].depends_on:
            uses, g = all_uses(sweep, name)
            sweep.schedule.append(extraction(sweep, name, uses, replace(g, averaged=True)))
    for name in sweep.graph.inputs:  # of a layer on its own
        if (name, name) in averages.blocks:
            averages.named(name, name)


def _through(averages: Averages, call: Call, rule: BoundRule, equation: Equation) -> None:
    """Every block of one value back to its operands."""
    sweep, name = averages.sweep, equation.name
    if rule.fallback:
        raise FormulaError(
            f"{call.where} has no rule, and KFRA needs its Jacobian.\n  Declare one (README), or ask for KFLR."
        )
    moved: dict[str, Jacobian] = {}
    for operand in operands_of(equation):
        jacobian = jacobian_of(equation, operand) if sweep.depends.get(operand) else None
        if jacobian is None or not jacobian.diagram.products:
            continue
        if sweep.samples[operand]:
            moved[operand] = jacobian
            averages.legs.setdefault(operand, tuple(leg for leg in jacobian.into if leg.size != N))
        else:
            averages.named(name, name)
            sweep.uses.setdefault(operand, []).append((jacobian, tensor(block_name(name, name), equation.legs)))
    others = [o for pair in averages.blocks if name in pair and pair != (name, name) for o in pair if o != name]
    for operand, jacobian in moved.items():
        for other in others:
            _one_side(averages, operand, jacobian, name, other)
    for one, other in combinations_with_replacement(moved, 2):
        _both_sides(averages, (one, moved[one]), (other, moved[other]), name)
    averages.blocks = {pair: terms for pair, terms in averages.blocks.items() if name not in pair}


def _through_parameters(sweep: Sweep, equation: Equation) -> None:
    """A value made of parameters: its uses are uses of what it is made of."""
    for operand in operands_of(equation):
        jacobian = jacobian_of(equation, operand) if sweep.depends.get(operand) else None
        if jacobian is not None and jacobian.diagram.products:
            sweep.uses.setdefault(operand, []).append(cotangent_of(sweep, equation, jacobian))


def _one_side(averages: Averages, operand: str, jacobian: Jacobian, name: str, other: str) -> None:
    """(1/N) Σ_n J_nᵀ K between an operand and another value."""
    side, into = copied(averages.legs[other]), _batched(jacobian.into)
    pulled = pull_back(jacobian, averages.named(name, other), (*side, BATCH), into)
    own, products = tuple(leg for leg in into if leg != BATCH), _mean(pulled)
    averages.add(operand, other, own, side, products)
    if operand == other:  # where paths merge: the block between them stands for its transpose, too
        averages.add(operand, other, side, own, products)


def _both_sides(averages: Averages, one: tuple[str, Jacobian], two: tuple[str, Jacobian], name: str) -> None:
    """(1/N) Σ_n J_nᵀ K J'_n between two operands of one line."""
    legs, into = averages.legs[name], _batched(one[1].into)
    side = copied(legs)
    half = pull_back(one[1], averages.named(name, name), (*side, BATCH), into)
    own = tuple(leg for leg in into if leg != BATCH)
    separate = tuple(Leg(f"{leg.name}^", leg.size) for leg in own)  # out of the way of the second Jacobian's legs
    half = half.rename(dict(zip(own, separate, strict=True))).rename(dict(zip(side, legs, strict=True)))
    end = _batched(tuple(Leg(f"{leg.name}~", leg.size) for leg in two[1].into))
    whole = pull_back(two[1], half, (*separate, BATCH), end)
    averages.add(one[0], two[0], separate, tuple(leg for leg in end if leg != BATCH), _mean(whole))


def _batched(legs: Legs) -> Legs:
    return tuple(BATCH if leg.size == N else leg for leg in legs)


def _mean(diagram: Diagram) -> tuple[Product, ...]:
    """Σ_n of the products, over N."""
    return tuple(Product(p.scale / N, p.operands) for p in diagram.products)
