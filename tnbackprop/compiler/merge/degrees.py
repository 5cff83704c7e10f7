"""Degrees: how a value answers to the number of samples, read off diagrams.

A value of the degree (power, loss, sums) is N^power · s^loss times what depends on single samples alone, of which it
has `sums` sums over the batch. s is the scale that the loss gives each sample, 1/N for a mean and 1 for a sum.
Cotangents have loss 1, columns of a root 1/2, and everything else follows from the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import sympy
import torch

from ...diagram.algebra import tensor
from ...diagram.core import BATCH, Diagram, Leg, Map, N, Operand, Part, Product, Selection, Tensor, hint_of, leaves
from ..sweep.derived import Backward, Basis, Columns, Derived, Extraction, Formula, Individual, Native, Phase, Schedule
from ..sweep.roots import LossRoot
from ..translate.graph import Call, Graph, Value
from ..translate.operators import Same, row_of

aten = torch.ops.aten
MADE = "what is made of its totals depends on the whole batch"
ZERO, HALF = sympy.Integer(0), sympy.Rational(1, 2)


class Undecided(Exception):
    """What a value's degree is cannot be told, and why."""


@dataclass(frozen=True)
class Degree:
    """See above; `even`: only while the loss gives the samples of every batch the same multiple of N^…."""

    power: sympy.Expr = ZERO
    loss: sympy.Expr = ZERO
    sums: int = 0
    even: bool = False

    def __mul__(self, other: Degree) -> Degree:
        return Degree(
            self.power + other.power, self.loss + other.loss, self.sums + other.sums, self.even or other.even
        )

    def to(self, exponent: sympy.Expr) -> Degree:
        """The degree of a power of the value; of a sum it is no sum any more."""
        sums = self.sums if exponent == 1 else 2 * self.sums
        return replace(self, power=self.power * exponent, loss=self.loss * exponent, sums=sums)


NONE = Degree()


@lru_cache(2**10)  # a program has few of them
def power_of(scale: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """c and k of a scale c·N^k. Raises `Undecided` for any other."""
    if not scale.free_symbols:
        return scale, ZERO
    number, rest = sympy.factor(scale).as_independent(N, as_Add=False)
    base, exponent = rest.as_base_exp()
    if rest == 1:
        return number, ZERO
    if base != N or exponent.free_symbols:
        raise Undecided(f"its scale {scale} is no power of the number of samples")
    return number, exponent


def powers_in(product: Product) -> sympy.Expr:
    """k of the factor N^k in the scale and the formulas of a product. Raises `Undecided` where it is not one."""
    found = power_of(product.scale)[1]
    for operand in product.operands:
        if isinstance(operand, Map) and operand.expr.has(N):
            others = sympy.Mul(*(each for each in sympy.Mul.make_args(operand.expr) if each.has(N)))
            found = found + power_of(others)[1]
    return found


def batch_legs(legs: Iterable[Leg]) -> list[Leg]:
    """Those that count samples. Raises `Undecided` where one counts some of them."""
    found = [leg for leg in legs if not isinstance(leg.size, int) and leg.size.free_symbols]
    for leg in found:
        if leg.size != N:
            raise Undecided(f"it has an axis of {leg.size} samples")
    return found


class Degrees:
    """Of all values that a program's diagrams read.

    scale  the power of N in the scale of the loss
    whole  the values that are one for all samples of a batch
    even   whether the loss adds a mean over what is kept to other sums over samples: they have one scale only where the
           same part of every batch is kept
    """

    def __init__(self, graph: Graph, derived: Derived) -> None:
        self.graph, self.derived = graph, derived
        self.scale = power_of(derived.scale)[1]
        self.whole = _of_the_batch(graph, derived)
        self.even = bool(derived.divisors) and _sums(graph) > 1
        self.known: dict[str, Degree | Undecided] = {}
        phased = {name: phase for phase in derived.phases for name in phase.outcome}
        self._sweep(derived.schedule, of_loss=True)
        for columns in derived.columns:
            self._columns(columns)
            self._sweep(columns.schedule)
        self._diagrams = _by_result(derived)
        for name, phase in phased.items():
            self.known[name] = self._attempt(lambda phase=phase: self._outcome(phase))

    def of(self, diagram: Diagram) -> Degree | None:
        """Of a diagram's value; None: it is zero. Raises `Undecided`."""
        found = {degree for p in diagram.products if (degree := self._product(p, diagram.legs)) is not None}
        if len(found) > 1:
            raise Undecided("it adds terms with different powers of the number of samples")
        return found.pop() if found else None

    def _product(self, product: Product, output: tuple[Leg, ...]) -> Degree | None:
        every = [leg for leg in product.legs if leg not in output]
        found = Degree(powers_in(product), sums=len(batch_legs(every)))
        for operand in product.operands:
            degree = self._operand(operand)
            if degree is None:
                return None
            found = found * degree
        return found

    def _operand(self, operand: Operand) -> Degree | None:
        match operand:
            case Tensor():
                return self._tensor(operand)
            case Map(expr=expr, args=args):
                return self._map(expr, [self._tensor(each) for each in args])
            case Selection(index=index):
                return self._tensor(index)
            case Part(diagram=inner):
                return self.of(inner)
        return NONE

    def _tensor(self, read: Tensor) -> Degree:
        found = self.known.get(read.name, NONE)
        if isinstance(found, Undecided):
            raise found
        if read.name in self.whole and not batch_legs(read.legs):
            raise Undecided(f"it reads {hint_of(read.name)}, one value for all samples of a batch")
        return found

    @staticmethod
    def _map(expr: sympy.Expr, degrees: list[Degree]) -> Degree:
        """Of an elementwise formula: a product of powers of all arguments that have a degree."""
        found = NONE
        scaled = {sympy.Symbol(f"x{k}", real=True): degree for k, degree in enumerate(degrees) if degree != NONE}
        for factor in sympy.Mul.make_args(expr):
            mine = [symbol for symbol in scaled if factor.has(symbol)]
            if not mine:
                continue
            base, exponent = factor.as_base_exp()
            inside = base.args[0] if isinstance(base, sympy.Abs | sympy.sign) else base
            plain = inside == mine[0] and len(mine) == 1 and not exponent.free_symbols
            if not plain or (base != inside and scaled[mine[0]].sums):
                raise Undecided(f"it is no product of powers of what is propagated: {factor}")
            found = found * scaled[mine[0]].to(ZERO if isinstance(base, sympy.sign) else exponent)
        return found

    # What sweeps propagate.

    def _attempt(self, degree: object) -> Degree | Undecided:
        try:
            found: Degree = degree()  # type: ignore[operator]
        except Undecided as why:
            return why
        return found

    def _columns(self, columns: Columns) -> None:
        start = columns.start
        mine, weight = NONE, NONE
        if isinstance(start, LossRoot):
            mine = Degree(loss=HALF, even=self.even)
        elif isinstance(start, Basis) and start.weight is not None:
            found = self._attempt(lambda: self._weight(start.weight))
            if isinstance(found, Undecided):
                self.known[columns.weight] = found
                return
            whole = found if found.loss else self._at_loss(found)
            # columns that arrive have a part of the scale in themselves: only the product with the weight is told
            own = sympy.Symbol("u") if start.arriving else ZERO
            mine, weight = Degree(loss=own), replace(whole, loss=whole.loss - 2 * own)
        if not isinstance(start, Formula):
            self.known[columns.variable] = mine
            self.known[columns.weight] = weight

    def _weight(self, weight: Diagram) -> Degree:
        """Of the weights of one-hot columns: of what is propagated, or second derivatives of the loss."""
        found = self.of(weight) if set(leaves(weight)) & set(self.known) else self._of_loss(weight)
        return found or self._at_loss(Degree(self.scale))

    def _at_loss(self, degree: Degree) -> Degree:
        """Of what comes right from the loss: its scale is N^scale."""
        return replace(degree, power=degree.power - self.scale, loss=sympy.Integer(1), even=degree.even or self.even)

    def _sweep(self, schedule: Schedule, of_loss: bool = False) -> None:
        for item in schedule:
            if isinstance(item, Backward):
                self.known[item.name] = self._attempt(lambda item=item: self._backward(item, of_loss))
            elif isinstance(item, Individual):
                self.known[item.name] = self.known.get(item.native.cotangent, NONE)

    def _backward(self, item: Backward, of_loss: bool) -> Degree:
        found = {degree for term in item.terms if (degree := self._term(term, of_loss)) is not None}
        if len(found) > 1:
            raise Undecided(f"what is propagated to {hint_of(item.value)} has several powers of the number of samples")
        return found.pop() if found else NONE

    def _term(self, term: Diagram | Native, of_loss: bool) -> Degree | None:
        if isinstance(term, Native):
            return self.of(tensor(term.cotangent, ()))
        return self.of(term) if not of_loss or set(leaves(term)) & set(self.known) else self._of_loss(term)

    def _of_loss(self, term: Diagram) -> Degree | None:
        """Of a derivative of the loss, a divisor of which may be of the batch."""
        divisors, powers = set(self.derived.divisors), {powers_in(p) for p in term.products}
        if set(leaves(term)) & self.whole - divisors or len(powers) > 1 or len(divisors) > 1:
            raise Undecided("the loss is divided by what depends on the whole batch")
        return self._at_loss(Degree(powers.pop())) if powers else None

    def _outcome(self, phase: Phase) -> Degree:
        """Of what is made of totals: told where each sample has its own, of what N does not change."""
        even = False
        for result, _ in phase.totals.values():
            for diagram in self._diagrams[result]:
                degree = self.of(diagram) or NONE
                if len(batch_legs(diagram.legs)) != 1 or degree.sums or degree.power + self.scale * degree.loss != 0:
                    raise Undecided(MADE)
                even = even or degree.even or bool(degree.loss and self.derived.divisors)
        for call in phase.calls:
            sized = any(isinstance(each, sympy.Expr) and each.free_symbols for each in call.arguments.values())
            if sized or not _of_each_sample(call.target):
                raise Undecided(MADE)
        return Degree(even=even)


UNTAGGED = (aten.log_sigmoid.default, aten.detach.default)
"""Pointwise operators that torch does not call so."""


def _of_each_sample(target: Any) -> bool:
    """Whether every element of an operator's result depends on what stands in its place alone."""
    packet, row = getattr(target, "overloadpacket", None), row_of(target)
    overloads = [target] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    pointwise = any(torch.Tag.pointwise in getattr(each, "tags", ()) for each in overloads)  # some of where() lack it
    return pointwise or row.uniform or row.same in (Same.ALWAYS, Same.CAST) or target in UNTAGGED


def _by_result(derived: Derived) -> Mapping[object, list[Diagram]]:
    found: dict[object, list[Diagram]] = {}
    for item in derived.items:
        for result, diagram in item.diagrams.items() if isinstance(item, Extraction) else ():
            found.setdefault(result, []).append(diagram)
    return found


def _of_the_batch(graph: Graph, derived: Derived) -> frozenset[str]:
    """The values that have no batch and depend on it: sums, counts, averages of a batch."""
    reads = {name: name in graph.inputs for name in graph.values}
    batch = {name: _sampled(value) for name, value in graph.values.items()}
    rules = {call.output.name: rule for call, rule in derived.bound}
    for call in graph.calls:
        name = call.output.name
        reads[name] = any(reads[value.name] for value in call.tensors.values())
        rule = rules.get(name)
        for saved in rule.saved if rule is not None else ():
            reads[saved.name] = any(reads.get(read, True) for read in saved.code.numbers)
            batch[saved.name] = bool(batch_legs(saved.legs))
        for equation in rule.equations[:-1] if rule is not None else ():
            read = leaves(equation.diagram) if equation.diagram is not None else ()
            reads[equation.name] = any(reads.get(each, True) for each in read)
            batch[equation.name] = bool(batch_legs(equation.legs))
    return frozenset(name for name, found in reads.items() if found and not batch.get(name))


def _sums(graph: Graph) -> int:
    """How many calls sum something of the samples that has derivatives."""
    def sums(call: Call) -> bool:
        return any(value.differentiable and _sampled(value) for value in call.tensors.values())

    return sum(sums(call) and not _sampled(call.output) for call in graph.calls)


def _sampled(value: Value) -> bool:
    return any(N in axis for axis in value.axes)


def depends_on_batch(graph: Graph, derived: Derived) -> str:
    """What makes a sample's values depend on the batch, beyond the loss's scale; "" for nothing."""
    whole = _whole_values(graph)
    for call in graph.calls:
        batch = _sampled(call.output)
        read = [value.name for value in call.tensors.values() if value.name in whole and not value.differentiable]
        if batch and read:
            return f"{call.where} reads {read[0]}, which is computed of the whole batch"
    for call, rule in derived.bound:
        for equation in rule.equations:
            products = equation.diagram.products if equation.diagram is not None else ()
            if BATCH in equation.legs and any(map(_sized, products)):
                return f"{call.where} computes with the number of samples"
    return ""


def _whole_values(graph: Graph) -> set[str]:
    reads, found = set(graph.inputs), set()
    for call in graph.calls:
        if reads & {value.name for value in call.tensors.values()}:
            reads.add(call.output.name)
            if not _sampled(call.output):
                found.add(call.output.name)
    return found


def _sized(product: Product) -> bool:
    exprs = (op.expr for op in product.operands if isinstance(op, Map))
    return product.scale.has(N) or any(expr.has(N) for expr in exprs)
