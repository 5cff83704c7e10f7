"""Merging: how the results of several batches join, read off the diagrams of a program.

What happens to the batch leg says which way, and the powers of N and of the loss's scale say with which factors: a sum
over samples N^k Σ_n φ_n of batch b is N_b^-k of the sum that all batches add up to. Nothing is declared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import sympy
from torch.utils import _pytree as pytree

from ...diagram.algebra import inline, tensor
from ...diagram.canonical import key
from ...diagram.core import BATCH, Diagram, Map, N, Part, Product, is_head
from ...notation.bind import Equation
from ..emit.compiled import Compiled
from ..sweep.derived import Extraction, Result, Streamed
from ..translate.graph import Value
from .degrees import NONE, Degrees, Undecided, batch_legs, depends_on_batch, power_of, powers_in
from .join import Join, Mean, Merging, Way, refused


def merging(compiled: Compiled) -> Merging:
    """How the results of a program's batches join."""
    graph, derived = compiled.graph, compiled.derived
    mixed = depends_on_batch(graph, derived)
    try:
        degrees = Degrees(graph, derived)
    except Undecided as why:
        degrees, mixed = None, mixed or f"the loss: {why}"
    places = _places(compiled)
    if degrees is None or mixed:
        joins = {q: {k: (refused(mixed),) * len(each[0]) for k, each in by.items()} for q, by in places.items()}
        joins |= {q: dict.fromkeys(by, (refused(mixed),)) for q, by in derived.inputs.items()}
        return Merging(joins, refused(mixed), (), 0.0, False)
    joins = {q: {k: _common(degrees, rows) for k, rows in by.items()} for q, by in places.items()}
    _moments(degrees, places, joins)
    joins |= {q: {name: (_pulled(degrees, name, g),) for name, g in by.items()} for q, by in derived.inputs.items()}
    outputs = tuple(_output(degrees, leaf) for leaf in pytree.tree_leaves(graph.output))
    return Merging(joins, _loss(degrees), outputs, float(degrees.scale), bool(derived.divisors))


@dataclass(frozen=True)
class Extracted:
    """One tensor of a result: its diagram; whether it is relative to another one's, or read by torch code in slices."""

    diagram: Diagram
    relative: bool = False
    stream: Streamed | None = None


Rows = list[tuple[Extracted, ...]]
Places = dict[str, dict[str, Rows]]


def _places(compiled: Compiled) -> Places:
    """By quantity and parameter or group: every time that it is extracted."""
    graph, found = compiled.graph, Places()
    for item in compiled.derived.items:
        if not isinstance(item, Extraction):
            continue
        for quantity in item.quantities:
            if quantity not in compiled.derived.hidden:
                name = item.groups.get(quantity, graph.parameters[item.parameter][0])
                found.setdefault(quantity, {}).setdefault(name, []).append(_tensors(item, quantity))
    return found


def _tensors(item: Extraction, quantity: str) -> tuple[Extracted, ...]:
    """Of one extraction: the value, or the factors and then the means."""
    factors = item.factors.get(quantity)
    if factors is None:
        return (Extracted(item.diagrams[Result(quantity)], stream=item.streams.get(quantity)),)
    means = (Extracted(mean) for mean in factors.means if mean is not None)
    return (*map(Extracted, factors.diagrams, factors.relative), *means)


def _common(degrees: Degrees, rows: Rows) -> tuple[Join, ...]:
    """What all extractions of one result have in common, tensor by tensor."""
    found = []
    for each in zip(*rows, strict=True):
        joins = {join for one in each if (join := _join(degrees, one)) is not None}
        no = next((join for join in joins if join.way is Way.REFUSED), None)
        if no is None and len(joins) > 1:
            no = refused("it adds up terms with different powers of the number of samples")
        found.append(no or (joins.pop() if joins else _of_zero(each[0].diagram)))
    return tuple(found)


def _of_zero(diagram: Diagram) -> Join:
    axis = _axis(diagram)
    return Join(Way.SUM) if axis is None else Join(Way.ROWS, axis=axis)


def _axis(diagram: Diagram) -> int | None:
    """Where the samples are among the axes of a value: samples and columns come first."""
    heads = [leg for leg in diagram.legs if is_head(leg)]
    return next((k for k, leg in enumerate(heads) if leg.size == N), None)


def _join(degrees: Degrees, one: Extracted) -> Join | None:
    """Of one tensor; None: it is zero."""
    diagram = one.diagram
    if one.relative:
        return refused("it is an axis that was cut out of another factor, over the mean of its own diagonal")
    if one.stream is not None:
        return _of_stream(degrees, diagram, one.stream)
    try:
        rows, degree = batch_legs(diagram.legs), degrees.of(diagram)
    except Undecided as why:
        return refused(str(why))
    if len(rows) > 1:
        return refused("it has every pair of samples, and none of two samples of different batches")
    if degree is None:
        return None
    if degree.sums + len(rows) > 1:
        what = "the value of a sample depends on the others" if rows else "it multiplies sums over the batch"
        return refused(f"{what}, and those of two batches do not tell it")
    power = degree.power if degree.sums or rows else degree.power - 1
    if power.free_symbols or degree.loss.free_symbols:
        return refused("its columns have scales of several kinds")
    way, axis = (Way.ROWS, _axis(diagram) or 0) if rows else (Way.SUM, 0)
    return Join(way, float(power), float(degree.loss), axis, degree.even)


def _of_stream(degrees: Degrees, diagram: Diagram, stream: Streamed) -> Join:
    """Of torch code on samples, which may be anything: a sum over them, or rows, if the samples have no other scale."""
    try:
        degree = degrees.of(diagram) or NONE
    except Undecided as why:
        return refused(str(why))
    if degree.sums or degree.power + degrees.scale * degree.loss != 0:
        remedy = "Give the stream (J.T @ g) / g.scale"
        return refused(f"its torch code is given values that depend on the batch they are in.\n  {remedy}")
    even = degree.even or (bool(degrees.derived.divisors) and degree.loss != 0)
    return Join(Way.ROWS if stream.rows else Way.SUM, even=even)


def _pulled(degrees: Degrees, name: str, cotangent: str) -> Join:
    """Of a cotangent that is a result: that of an input."""
    rows = [k for k, axis in enumerate(degrees.graph.values[name].axes) if axis == (N,)]
    try:
        degree = degrees.of(tensor(cotangent, (BATCH,))) or NONE
    except Undecided as why:
        return refused(str(why))
    if len(rows) != 1:
        return refused("an input does not have its samples on an axis of their own")
    return Join(Way.ROWS, float(degree.power), float(degree.loss), rows[0], degree.even)


# Squared deviations from the mean.


def _moments(degrees: Degrees, places: Places, joins: dict[str, dict[str, tuple[Join, ...]]]) -> None:
    """Joins of squared deviations from a mean, in the place of refusals."""
    means: dict[str, dict[str, tuple[str, Diagram]]] = {}
    todo: list[tuple[str, str, tuple[sympy.Expr, Diagram]]] = []
    for quantity, by in places.items():
        for name, rows in by.items():
            if len(rows) == 1 and len(rows[0]) == 1 and rows[0][0].stream is None:
                join, diagram = joins[quantity][name][0], rows[0][0].diagram
                if join.way is Way.SUM:
                    means.setdefault(name, {}).setdefault(quantity, (quantity, diagram))
                elif join.way is Way.REFUSED and (found := _deviation(diagram)) is not None:
                    todo.append((quantity, name, found))
    for quantity, name, (scale, x) in todo:
        joins[quantity][name] = (_with_mean(degrees, scale, x, list(means.get(name, {}).values())),)


def _deviation(diagram: Diagram) -> tuple[sympy.Expr, Diagram] | None:
    """c and x of c Σ_n (x_n - (1/N) Σ_m x_m)²; None for any other diagram."""
    if len(diagram.products) != 1 or BATCH in diagram.legs:
        return None
    (product,) = diagram.products
    first, *others = product.operands
    if not isinstance(first, Part) or others != [first] or BATCH not in first.legs:
        return None
    inner = first.diagram.rename(dict(zip(first.diagram.legs, first.legs, strict=True)))
    if len(inner.products) != 2:
        return None
    own = tuple(leg for leg in inner.legs if leg != BATCH)
    if diagram.legs != own:  # it is summed over more, or has its axes in another order than the mean
        return None
    for x, mean in (inner.products, inner.products[::-1]):
        whole = Diagram(inner.legs, (x,))
        total = whole.sum("n") * (-1 / N)
        if BATCH in x.legs and key(inline(total)) == key(inline(Diagram(own, (mean,)))):
            return product.scale, whole
    return None


def _with_mean(degrees: Degrees, scale: sympy.Expr, x: Diagram, means: list[tuple[str, Diagram]]) -> Join:
    """How scale Σ_n (x_n - x̄)² joins, with a sum over the batch that is a multiple of the mean x̄."""
    try:
        degree = degrees.of(x)
        factor, power = power_of(scale)
        if degree is None or degree.sums or degree.power.free_symbols or degree.loss.free_symbols:
            raise Undecided("its deviations are from no mean over the batch")
        wanted = _unscaled(x.sum("n"))
        for name, each in means:
            other = _unscaled(each)
            if wanted[1] == other[1]:
                over, exponent = power_of(_ratio(wanted[0], other[0] * N))
                own = (float(degree.power), float(degree.loss))
                mean = Mean(name, float(factor), float(power), float(over), float(-exponent), own)
                return Join(Way.MOMENTS, even=degree.even, mean=mean)
    except Undecided as why:
        return refused(str(why))
    return refused(
        "deviations are from the mean of a batch, and that is no result.\n  Ask for it in the same program, tn.Grad(): "
        "two join with it"
    )


def _unscaled(diagram: Diagram) -> tuple[sympy.Expr, object]:
    """The scale of a diagram's first term, and the key of what it is times that."""
    flat = inline(diagram)
    first = flat.products[0].scale if flat.products else sympy.Integer(1)
    products = tuple(Product(_ratio(p.scale, first), p.operands) for p in flat.products)
    return first, key(Diagram(flat.legs, products))


@lru_cache(2**10)  # a program has few of them
def _ratio(one: sympy.Expr, other: sympy.Expr) -> sympy.Expr:
    return sympy.simplify(one / other)


# The loss and the output.


def _loss(degrees: Degrees) -> Join:
    """A loss is N^scale Σ_n ℓ_n; what it adds to that must be the same for every batch, and be a mean as well."""
    graph, derived = degrees.graph, degrees.derived
    if graph.loss is None:
        return Join(Way.SAME)
    lines = {equation.name: equation for _, rule in derived.bound for equation in rule.equations}
    try:
        powers = set(_powers(degrees, lines, graph.loss))
    except Undecided as why:
        return refused(str(why))
    if powers - {degrees.scale}:
        return refused("the loss has terms that belong to no sample, or differ in their power of the number of samples")
    return Join(Way.SUM, loss=1.0, even=degrees.even)


def _powers(degrees: Degrees, lines: Mapping[str, Equation], name: str) -> list[sympy.Expr]:
    """Of N, in every term of a scalar of the loss. What has no sample in it counts as a sum of equal parts."""
    graph, equation = degrees.graph, lines.get(name)
    if equation is None:
        raise Undecided(f"the loss reads {name}, of which no formula is known")
    if equation.diagram is None:
        slopes = [p for jacobian in equation.jacobians.values() for p in jacobian.diagram.products]
        if not slopes:
            raise Undecided(f"the loss reads {name}, of which no formula is known")
        return [power_of(p.scale)[1] for p in slopes]
    found: list[sympy.Expr] = []
    for product in equation.diagram.products:
        own = powers_in(product)
        if batch_legs(product.legs):
            found.append(own)
            continue
        read = {tensor for op in product.operands for tensor in _names(op) if _scalar(degrees, lines, tensor)}
        if not read:
            found.append(own - 1)
            continue
        plain = [op for op in product.operands if not isinstance(op, Map)]
        if len(read) > 1 or not any(_names(op) == (*read,) for op in plain):
            raise Undecided("the loss is not linear in the sum over its samples")
        found += [own + each for each in _powers(degrees, lines, read.pop())]
    return found if graph.loss else []


def _names(operand: object) -> tuple[str, ...]:
    if isinstance(operand, Map):
        return tuple(each.name for each in operand.args)
    name = getattr(operand, "name", None)
    return () if name is None else (name,)


def _scalar(degrees: Degrees, lines: Mapping[str, Equation], name: str) -> bool:
    """Whether it is a scalar of the loss."""
    if name in degrees.derived.divisors:
        return False
    if name in lines and name not in degrees.graph.values:
        return True
    return name in degrees.whole


def _output(degrees: Degrees, leaf: object) -> Join | None:
    if not isinstance(leaf, str):
        return None
    value = degrees.graph.values[leaf]
    axes = [(k, axis) for k, axis in enumerate(value.axes) if N in axis]
    if not axes:
        return refused(f"{_of(value)} is one for the whole batch") if leaf in degrees.whole else Join(Way.SAME)
    if len(axes) > 1 or axes[0][1][0] != N:
        return refused(f"{_of(value)} does not have its samples one after the other")
    return Join(Way.ROWS, axis=axes[0][0])


def _of(value: Value) -> str:
    return f"an output {value.axes_text}"


def told(merging: Merging) -> Iterator[str]:
    """How each quantity joins, for people; s is the scale that the loss gives a sample."""
    for quantity, by in merging.joins.items():
        rows = dict.fromkeys(tuple(map(_told, each)) for each in by.values())
        yield f"{quantity}: {'; or '.join(', '.join(dict.fromkeys(row)) for row in rows)}"


def _told(join: Join) -> str:
    if join.way is Way.REFUSED:
        return f"not merged: {join.why.splitlines()[0].rstrip('.')}"
    if join.mean is not None:
        return f"by moments, with the mean that {join.mean.of} has"
    powers = {"N": join.power, "s": join.loss}
    factors = [f"{base}^{power:g}" if power != 1 else base for base, power in powers.items() if power]
    what = "one after the other" if join.way is Way.ROWS else "added"
    return f"{what}, each with its {' '.join(factors)}" if factors else what
