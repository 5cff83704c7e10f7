"""Columns: the sweeps that carry more than the gradient. Each starts somewhere with columns and ends in results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import sympy

from ..algebra import Cotangents, pull_back, tensor
from ..bind import BoundRule
from ..diagram import BATCH, COLUMN, Delta, Diagram, Leg, N, Product, Tensor
from ..jacobian import Jacobian
from ..quantities import Propagation, Quantity, Source
from .derived import Backward, Basis, Columns, column_leg
from .graph import Call, Graph
from .residual import Paired, Weighted, residuals
from .roots import LossRoot, loss_root, output_of
from .sweep import Sweep, all_uses, extraction, run

Bound = tuple[tuple[Call, BoundRule], ...]
ONE = sympy.Integer(1)
EVERY = 2**62


@dataclass(frozen=True)
class Setting:
    """What all sweeps of columns have in common; `width` is the most columns that may ride together."""

    graph: Graph
    bound: Bound
    scale: sympy.Expr
    width: int
    gradient: Sweep


def columns_of(
    setting: Setting, quantities: Sequence[Quantity], propagation: Propagation, first: int
) -> Iterator[Columns]:
    """The sweeps that quantities with this propagation need, numbered from `first`."""
    if propagation.together:
        setting = replace(setting, width=EVERY)
    if propagation.source is Source.IDENTITY:
        yield _from_output(setting, quantities, first)
        return
    if propagation.source is not Source.HESSIAN:
        samples = propagation.samples if propagation.source is Source.SAMPLE else 0
        yield _from_loss(setting, quantities, loss_root(setting.graph, setting.bound), samples, first)
        return
    root = loss_root(setting.graph, setting.bound, signed=True)
    if root.curvature is None:
        yield _from_loss(setting, quantities, root, 0, first)
    else:
        at_loss = Weighted(root.value, root.curvature.legs, root.curvature)
        yield _from_basis(setting, quantities, at_loss, first, partial=False)
    behind = _behind(setting.graph, root.value)
    for number, found in enumerate(residuals(setting.gradient, setting.bound, behind), start=first + 1):
        if isinstance(found, Weighted):
            yield _from_basis(setting, quantities, found, number, partial=True)
        else:
            yield _from_pair(setting, quantities, found, number)


def _from_output(setting: Setting, quantities: Sequence[Quantity], number: int) -> Columns:
    """One-hot columns at the model's output."""
    output = output_of(setting.graph, "Jacobians")
    legs = next((r.equations[-1].legs for c, r in setting.bound if c.output == output), ())
    return _from_basis(setting, quantities, Weighted(output.name, legs, None), number, partial=False)


def _behind(graph: Graph, output: str) -> set[str]:
    """The values that are computed from the model's output: those of the loss."""
    found = {output}
    for call in graph.calls:
        if found & {value.name for value in call.tensors.values()}:
            found.add(call.output.name)
    return found - {output}


def _from_loss(
    setting: Setting, quantities: Sequence[Quantity], root: LossRoot, samples: int, number: int
) -> Columns:
    """Columns of the root, at the model's output: cotangents like the gradient."""
    legs = next((r.equations[-1].legs for c, r in setting.bound if c.output == root.output), ())
    width = _divisor(samples, setting.width) if samples else _even(root.columns, setting.width)
    lead = column_leg(width)
    variable, weight = f"column_{number}", None
    if root.signed:
        weight = tensor(f"weight_{number}", (*lead, BATCH))
    sweep = _sweep(setting, quantities, number, width, weight)
    sweep.terms[root.value] = [tensor(variable, (*lead, *legs))]
    run(sweep, setting.bound)
    return Columns(variable, root, samples, (*lead, *legs), tuple(sweep.schedule), width)


def _from_basis(
    setting: Setting, quantities: Sequence[Quantity], found: Weighted, number: int, partial: bool
) -> Columns:
    """One-hot columns with a weight for each sample."""
    own = _own(found.legs)
    rows = None if found.weight is None else Diagram((*own, BATCH), found.weight.products)
    start = Basis(found.value, own, rows)
    lead = column_leg(width := _even(start.columns, setting.width))
    weight = None if rows is None else tensor(f"weight_{number}", (*lead, BATCH))
    sweep = _sweep(setting, quantities, number, width, weight, partial)
    _start(sweep, found.value, found.legs)
    run(sweep, setting.bound)
    return Columns(sweep.variable, start, 0, (*lead, *own), tuple(sweep.schedule), width)


def _own(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """Without the batch."""
    return tuple(leg for leg in legs if leg.size != N)


def _from_pair(setting: Setting, quantities: Sequence[Quantity], found: Paired, number: int) -> Columns:
    """One-hot columns and where the residual leads with them: two sweeps in one, with results of both."""
    own = _own(found.residual.out)
    start = Basis(found.value, own)
    lead = column_leg(width := _even(start.columns, setting.width))
    one = _sweep(setting, (), number, width)
    sampled = setting.gradient.samples
    _start(one, found.value, found.residual.out if sampled[found.value] else own)
    run(one, setting.bound)
    other = _sweep(setting, (), number, width, prefix="r")
    into = tuple(BATCH if leg.size == N else leg for leg in found.residual.into)
    keep = lead if sampled[found.other] else (*lead, BATCH)
    led = pull_back(found.residual, tensor(one.variable, (*lead, *own)), keep, into)
    _begin(other, found.other, led * found.factor, sampled[found.other])
    run(other, setting.bound)
    schedule = [*one.schedule, *other.schedule]
    for name in setting.graph.parameters:
        if one.uses.get(name) and other.uses.get(name):
            both = _sweep(setting, quantities, number, width)
            both.uses[name] = [*one.uses[name], *other.uses[name]]
            uses, g = all_uses(both, name)
            schedule.append(extraction(both, name, uses, _split(g, len(one.uses[name]))))
    return Columns(one.variable, start, 0, (*lead, *own), tuple(schedule), width)


def _split(g: Cotangents, count: int) -> Cotangents:
    """The first `count` uses belong to the columns, the others to their partners."""
    zero = [Diagram(each.legs, ()) for each in g.each]
    return Cotangents(
        (*g.each[:count], *zero[count:]), g.scale, g.kept, g.names, None, (*zero[:count], *g.each[count:])
    )


def _sweep(
    setting: Setting,
    quantities: Sequence[Quantity],
    number: int,
    width: int,
    weight: Diagram | None = None,
    partial: bool = True,
    prefix: str = "s",
) -> Sweep:
    kept = (Leg(COLUMN, width), BATCH)
    return Sweep(
        setting.graph, quantities, scales={setting.scale}, prefix=f"{prefix}{number}", variable=f"column_{number}",
        lead=column_leg(width), kept=kept, weight=weight, partial=partial,
    )  # fmt: skip


def _start(sweep: Sweep, value: str, legs: tuple[Leg, ...]) -> None:
    """One-hot columns at a value with these legs; they are the same for every sample."""
    column = Product(ONE, (Tensor(sweep.variable, (*sweep.lead, *_own(legs))),))
    sampled = any(leg.size == N for leg in legs)
    batched = tuple(BATCH if leg.size == N else leg for leg in legs) if sampled else (BATCH, *legs)
    _begin(sweep, value, Diagram((*sweep.lead, *batched), (column,)), sampled)


def _begin(sweep: Sweep, value: str, term: Diagram, sampled: bool) -> None:
    """Propagate from a value with a batch, or from one that is made of parameters."""
    if sampled:
        sweep.terms[value] = [term]
        return
    name = f"{sweep.prefix}_{value}"
    sweep.schedule.append(Backward(name, value, (term,), "the start of columns"))
    own = tuple(leg for leg in term.legs if leg not in sweep.lead and leg != BATCH)
    primed = tuple(Leg(f"{leg.name}'", leg.size) for leg in own)
    deltas = tuple(Delta(pair) for pair in zip(own, primed, strict=True))
    identity = Jacobian(Diagram((*own, *primed), (Product(ONE, deltas),)), own, primed)
    sweep.uses[value] = [(identity, tensor(name, term.legs))]


def _divisor(count: int, width: int) -> int:
    """The most at a time that come out even: a draw cannot be filled up."""
    return next(k for k in range(min(width, count), 0, -1) if count % k == 0)


def _even(count: int, width: int) -> int:
    """At most `width` columns at a time, so that all rounds have as many as possible."""
    rounds = -(-count // min(width, count))
    return -(-count // rounds)
