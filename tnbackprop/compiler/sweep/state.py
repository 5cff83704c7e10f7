"""The state of a sweep, and the uses of a value in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import sympy

from ...diagram.algebra import Cotangents, Uses
from ...diagram.core import BATCH, Diagram, Leg
from ...diagram.jacobian import Jacobian
from ...diagram.reading import Readings
from ...diagram.regroup import common, grouped, regroup
from ...errors import UnsupportedError
from ...notation.bind import BoundRule, Equation
from ...quantities import Propagation, Quantity
from ...quantities.factors import sides
from ..translate.graph import Call, Graph
from .derived import Backward, Extraction, Individual, Joint, Native


@dataclass
class Sweep:
    graph: Graph
    quantities: Sequence[Quantity]
    terms: dict[str, list[Diagram | Native]] = field(default_factory=dict)
    uses: dict[str, list[tuple[Jacobian, Diagram]]] = field(default_factory=dict)
    samples: dict[str, bool] = field(default_factory=dict)  # value -> has the batch leg
    reads: dict[str, bool] = field(default_factory=dict)  # value -> depends on the samples at all
    counts: dict[str, bool] = field(default_factory=dict)  # value -> made of sums over samples that are all alike
    depends: dict[str, frozenset[str]] = field(default_factory=dict)  # value -> the trainable parameters behind it
    owner: dict[str, Call] = field(default_factory=dict)
    schedule: list[Backward | Individual | Extraction] = field(default_factory=list)
    scheduled: set[str] = field(default_factory=set)  # the values whose cotangents are entered there
    carriers: set[str] = field(default_factory=set)  # the values that are made there, up to the item `named`
    named: int = 0
    scales: set[sympy.Expr] = field(default_factory=set)
    prefix: str = ":g"  # of names that no line of a rule has
    variable: str = ""  # the column at the model's output
    several: bool = False  # more than one column
    lead: tuple[Leg, ...] = ()  # the leg of columns that are propagated together
    kept: tuple[Leg, ...] = (BATCH,)
    weight: Diagram | None = None  # of the columns
    along: Callable[[Jacobian], Jacobian] | None = None  # what is propagated with in the place of a Jacobian
    adds: Callable[[Call, BoundRule, Equation, str], Diagram | None] | None = None  # what a line adds to an operand
    twice: bool = False  # second derivatives will read the cotangents of every line
    partial: bool = False  # it starts inside the model: what it does not reach has nothing to add
    since: str = ""  # the value where it goes on for an earlier sweep, too
    meetings: tuple[str, ...] = ()  # values where a later one may go on for it
    until: str = ""  # the first of them that it reaches: there it stops
    others: Mapping[Propagation, list[Sweep]] = field(default_factory=dict)  # by what each propagates
    kernels: dict[str, Joint] = field(default_factory=dict)  # by parameter
    readings: Readings = field(default_factory=Readings)  # what quantities read beside it

    def reached(self, name: str) -> bool:
        """Whether something is propagated to the value."""
        return bool(self.terms.get(name)) or bool(self.uses.get(name))

    def pending(self, parameter: str) -> bool:
        """Whether it gives results for a parameter even if it does not reach it."""
        if self.until and self._behind(self.until, parameter):
            return False
        return not self.partial or bool(self.since and self._behind(self.since, parameter))

    def _behind(self, value: str, parameter: str) -> bool:
        values = self.graph.values
        return values[parameter].depends_on <= values[value].depends_on


def scale_of(sweep: Sweep) -> sympy.Expr:
    if len(sweep.scales) > 1:
        raise UnsupportedError(
            f"the loss both averages and sums over samples ({sweep.scales}): split it in two losses."
        )
    return next(iter(sweep.scales), sympy.Integer(1))


def all_uses(sweep: Sweep, name: str) -> tuple[Uses, Cotangents]:
    """Every use of a value that is made of parameters, with the legs that all of them can read it with."""
    pairs = sweep.uses.get(name, [])
    shape = sweep.graph.values[name].shape if name in sweep.graph.values else ()
    dotted = sweep.graph.parameters.get(name, (name,))[0]
    sizes = tuple(size for size in shape if size != 1)
    if pairs:
        sizes = common(*(tuple(leg.size for leg in jacobian.into) for jacobian, _ in pairs))
    jacobians = [regroup(jacobian, into=sizes) for jacobian, _ in pairs]
    named = jacobians[0].into if jacobians else tuple(Leg(f"p{k}", size) for k, size in enumerate(sizes))
    legs = _distinct(tuple(Leg(leg.name.rstrip("'") or "p", leg.size) for leg in named)) or (Leg("p", 1),)
    uses = Uses(tuple(_with_legs(jacobian, legs) for jacobian in jacobians), legs, grouped(legs, shape), dotted)
    names = _cotangent_names(sweep)
    g = Cotangents(tuple(g for _, g in pairs), scale_of(sweep), sweep.kept, names, weight=sweep.weight)
    return replace(uses, separated=partial(sides, uses, g)), g


def _cotangent_names(sweep: Sweep) -> frozenset[str]:
    """The values that carry what is propagated."""
    new = sweep.schedule[sweep.named :]
    sweep.carriers |= {item.name for item in new if not isinstance(item, Extraction)} | {sweep.variable}
    sweep.named = len(sweep.schedule)
    return frozenset(sweep.carriers)


def _distinct(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    seen: list[Leg] = []
    for leg in legs:
        name = "p_n" if leg.name == BATCH.name else leg.name
        while any(other.name == name for other in seen):
            name += "_"
        seen.append(Leg(name, leg.size))
    return tuple(seen)


def _with_legs(jacobian: Jacobian, legs: tuple[Leg, ...]) -> Jacobian:
    """A parameter of one element has one leg of size 1, so that its results differ from sums over it."""
    if jacobian.into:
        return jacobian
    diagram = Diagram((*jacobian.diagram.legs, *legs), jacobian.diagram.products)
    return Jacobian(diagram, jacobian.out, legs, jacobian.units)
