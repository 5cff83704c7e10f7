"""Slice the batch: a term that needs its individual gradients is computed a few samples at a time.

The slice is a function of its own in the source; the term is the sum of the slices (n summed) or their
concatenation (n open). Exact: a product of operands is cut along n whatever the operands are.
Behind a loop over columns such functions are tiles: of few samples, so that what they look up stays in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy

from ...diagram.canonical import key
from ...diagram.core import (
    BATCH,
    COLUMN,
    Diagram,
    Leg,
    Map,
    N,
    Operand,
    Part,
    Product,
    Selection,
    Tensor,
    ordered_union,
)
from ..lower.arrange import arranged, in_order, sizes_of
from ..lower.candidate import Candidate
from ..lower.contract import as_tensor, build, indices
from ..program.cost import Kernel, Terms, Work, number
from ..program.expr import Body, Expr, Join, Ref, Rounds, Value, reads, sizes_in
from ..program.lines import alive
from ..program.numbers import TOTAL
from ..program.store import LIKE, Store

Legs = tuple[Leg, ...]


LARGE = 2
"""A term is sliced if it allocates this many times its result."""


def build_sliced(store: Store, diagram: Diagram, chunk: int) -> Ref:
    """Like `build`, with every term that has parts along the batch computed `chunk` samples at a time."""
    products = []
    for product in diagram.products:
        if _sliceable(product, diagram.legs) and _large(store, product, diagram.legs):
            value = _sliced(store, product, diagram.legs, chunk)
            products.append(Product(product.scale, (as_tensor(store, value),)))
        else:
            products.append(product)
    return build(store, Diagram(diagram.legs, tuple(products)))


def _sliceable(product: Product, legs: Legs) -> bool:
    """Whether n runs through a product that is more than its value, and nothing pairs samples with each other."""
    reduced = BATCH not in legs or len(product.operands) > 1
    return BATCH in product.legs and reduced and not pairs_samples(product, legs)


def _large(store: Store, product: Product, legs: Legs) -> bool:
    """Whether some value on the way is much larger than the result."""
    trial = store.fork()
    ref = build(trial, Diagram(legs, (product,)))
    largest = max((number(step.work.fresh, store.batch) for step in trial.steps), default=0.0)
    return largest > LARGE * number(((1, ref.order),), store.batch)


def pairs_samples(product: Product, legs: Legs) -> bool:
    """Whether samples meet each other in it."""
    if BATCH in product.legs and any(leg.size == N and leg != BATCH for leg in (*product.legs, *legs)):
        return True
    inner = [_renamed(op) for op in product.operands if isinstance(op, Part)]
    return any(pairs_samples(p, d.legs) for d in inner for p in d.products)


def _renamed(part: Part) -> Diagram:
    return part.diagram.rename(dict(zip(part.diagram.legs, part.legs, strict=True)))


def columns_first(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """In a loop over columns their sum first, and the rest, which is linear in it, in tiles that stay in the cache.

    Without tiles, only where the sum is there already.
    """
    summed = [op for op in product.operands if isinstance(op, Tensor) and store.varies(store.find(op.name))]
    rest = [op for op in product.operands if op not in summed]
    if store.rounds == 1 or len(summed) < 2 or not rest or any(leg.name == COLUMN for leg in legs):
        return []
    needed = {*legs, *(leg for op in rest for leg in op.legs)}
    between = tuple(leg for leg in ordered_union(*(op.legs for op in summed)) if leg in needed)
    inner = Diagram(between, (Product(sympy.Integer(1), tuple(summed)),))
    chunk = _tile(store, between, legs)
    tiled = chunk < store.batch and _sliceable(Product(sympy.Integer(1), (Part(inner, between), *rest)), legs)
    if not tiled and store.built(key(inner)) is None:
        return []

    def plan(store: Store) -> Ref:
        total = as_tensor(store, build(store, inner, inside=True))
        product = Product(sympy.Integer(1), (total, *rest))
        if tiled:
            return _sliced(store, product, legs, chunk, tiled=True)
        return build(store, Diagram(legs, (product,)), inside=True)

    return [Candidate(plan)]


def _tile(store: Store, between: Legs, legs: Legs) -> int:
    """How many samples at a time keep in the cache what has one of two legs each that are summed, and the result's."""
    twice = number(((1, tuple(leg for leg in between if leg not in (*legs, BATCH))),), store.batch)
    each = twice**0.5 * number(((1, tuple(leg for leg in legs if leg != BATCH)),), store.batch) * store.itemsize
    return min(store.batch, max(1, int(store.rates.tile / each)))


def _sliced(
    store: Store, product: Product, legs: Legs, chunk: int, tiled: bool = False
) -> Ref:
    """The term as calls of a function of `chunk` samples; tiled, where it has one operand that varies in a loop."""
    own = tuple(leg for leg in legs if leg in set(product.legs))
    operands = tuple(_open(store, op) for op in product.operands)
    inner = Diagram(own, (Product(sympy.Integer(1), operands),))
    identity = (*key(inner), "sliced", chunk, tiled)
    if (known := store.built(identity)) is not None:
        return known.renamed(own)
    small, inputs = inside(store, inner, chunk)
    body = body_of(small, inputs, in_order(small, build(small, inner)), "slice")
    axis = own.index(BATCH) if BATCH in own else None
    join = Join.SUM if axis is None else Join.CAT
    calls = Rounds(body, arguments(store, body, inputs), N, chunk, (join,), axis or 0, followed=not tiled)
    work = work_of(body.steps, chunk)
    if tiled:
        moved = tuple((1, tensor.legs) for tensor in inputs.values())
        launches = len(body.steps) * -(-store.batch // chunk)
        work = replace(work, moved=(*moved, (1, own)), launches=launches)
        (linear,) = (value for value in reads(calls) if store.varies(value))
        ref = Ref(store.add(calls, sizes_of(own), Kernel.TILED, work, linear=linear), own, own)
    else:
        ref = Ref(store.add(calls, sizes_of(own), Kernel.SLICED, work), own, own)
    store.keep(identity, ref)
    return ref


def inside(store: Store, inner: Diagram, chunk: int) -> tuple[Store, dict[str, Tensor]]:
    """The values of a function of `chunk` samples, with the tensors that it is given, and these."""
    small, leaves = store.separate(chunk), leaves_of(inner)
    for name, tensor in leaves.items():
        small.given(name, sizes_of(tensor.legs), store.find(name).floating)
    small.like = small.given(LIKE, ())
    return small, leaves


def body_of(small: Store, leaves: Mapping[str, Tensor], result: Expr, name: str, fixed: Sequence[str] = ()) -> Body:
    """The function: a parameter for each tensor, and behind them `like` and what is `fixed`, where it reads them."""
    steps = alive(small.steps, set(reads(result)))
    read = {value for step in steps for value in step.inputs} | set(reads(result))
    more = [value for value in (small.like, *map(small.find, fixed)) if value in read]
    first = next(leaf for leaf, tensor in leaves.items() if BATCH in tensor.legs)
    batch = small.find(first), leaves[first].legs.index(BATCH)
    total = any(TOTAL in sizes_in(step.expr) for step in steps)
    return Body((*map(small.find, leaves), *more), steps, (result,), batch, name, total=total)


def arguments(
    store: Store, body: Body, leaves: Mapping[str, Tensor], fixed: Sequence[str] = ()
) -> tuple[tuple[Expr, int | None], ...]:
    """What the parameters of a function are given, and the axes along which that is cut."""
    more = {LIKE: store.like} | {name: store.find(name) for name in fixed}
    args = [_argument(store, tensor) for tensor in leaves.values()]
    args += [(more[param.key], None) for param in body.params[len(leaves) :]]
    return (*args, (N, None)) if body.total else tuple(args)


def _open(store: Store, op: Operand) -> Operand:
    """A part without the batch is computed once, outside; in the others a scale's N becomes the total."""
    if not isinstance(op, Part):
        return op
    if BATCH not in op.legs:
        built = as_tensor(store, build(store, op.diagram))
        return built.rename(dict(zip(op.diagram.legs, op.legs, strict=True)))
    diagram = _renamed(op)
    products = tuple(opened(store, p, diagram.legs) for p in diagram.products)
    return Part(Diagram(diagram.legs, products), op.legs)


def opened(store: Store, product: Product, legs: Legs) -> Product:
    if BATCH not in product.legs:
        own = tuple(leg for leg in legs if leg in set(product.legs))
        value = build(store, Diagram(own, (product,)))
        return Product(sympy.Integer(1), (as_tensor(store, value),))
    return Product(product.scale.xreplace({N: TOTAL}), tuple(_open(store, op) for op in product.operands))


def leaves_of(diagram: Diagram) -> dict[str, Tensor]:
    """The runtime tensors that the slice reads, each as it is read first."""
    found: dict[str, Tensor] = {}
    for product in diagram.products:
        for op in product.operands:
            match op:
                case Tensor():
                    found.setdefault(op.name, op)
                case Map():
                    found |= {a.name: a for a in op.args if a.name not in found}
                case Selection():
                    found.setdefault(op.index.name, op.index)
                case Part():
                    inner = leaves_of(_renamed(op))
                    found |= {name: t for name, t in inner.items() if name not in found}
                case _:
                    pass
    return found


def _argument(store: Store, tensor: Tensor) -> tuple[Expr, int | None]:
    """What a parameter is given, and the axis along which it is cut."""
    ref = indices(store, tensor)
    expr = arranged(store, ref, tuple((leg,) for leg in tensor.legs))
    return expr, tensor.legs.index(BATCH) if BATCH in tensor.legs else None


def work_of(steps: tuple[Value, ...], chunk: int) -> Work:
    """All slices together: the polynomials of one slice hold with n running over the whole batch."""
    flops: Terms = ()
    moved: Terms = ()
    fresh: Terms = ()
    for step in steps:
        work = step.work
        flops, moved = (*flops, *work.flops), (*moved, *work.moved)
        fresh = (*fresh, *((c, _cut(legs, chunk)) for c, legs in work.fresh))
    return Work(flops, moved, fresh, inside=fresh)


def _cut(legs: Legs, chunk: int) -> Legs:
    return tuple(replace(leg, size=chunk) if leg.size == N else leg for leg in legs)

