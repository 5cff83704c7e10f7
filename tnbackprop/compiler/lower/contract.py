"""Contract: a diagram without halves becomes values. Paths come from opt_einsum; the rest is choosing kernels."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import cast

import opt_einsum
import sympy

from ...diagram.canonical import key
from ...diagram.core import COLUMN, Diagram, Leg, Map, Operand, Part, Product, Tensor, argument, ordered_union
from ...diagram.simplify import simplify
from ..program import functions as f
from ..program.cost import Kernel, Work, size_at
from ..program.expr import Call, Ref
from ..program.hoist import saved
from ..program.numbers import Number
from ..program.store import Store
from .arrange import arranged, as_stored, copy_work, in_order, reshaped, sizes_of
from .candidate import Candidate, Made, Then
from .pairs import contract_pair, elementwise, gated, sum_legs

Legs = tuple[Leg, ...]
Path = tuple[tuple[int, ...], ...]


def build(store: Store, diagram: Diagram, inside: bool = False) -> Ref:
    """The value of a diagram, with its legs in the diagram's order. Equal diagrams are built once.

    inside  it is a part of a candidate: what goes around whole products is not tried again
    """
    identity = key(diagram)
    if (known := store.built(identity)) is not None:
        return known.renamed(diagram.legs)
    if (tried := store.tried(identity, inside)) is not None:
        return tried.renamed(diagram.legs)
    terms = [_term(store, p, diagram.legs, inside) for p in diagram.products]
    if not terms:
        ref = _full(store, diagram.legs, sympy.Integer(0))
    elif len(terms) == 1:
        ref = terms[0]
    else:
        ref = _added(store, terms, diagram.legs)
    store.keep(identity, ref, inside)
    return ref


def _term(store: Store, product: Product, legs: Legs, inside: bool) -> Ref:
    """One product: parts and maps to tensors, then the cheapest of the lowerings that match, then the scale."""
    parts = tuple(_part(store, op, inside) for op in product.operands)
    folded = simplify(Diagram(legs, (Product(product.scale, parts),))).products
    if not folded:
        return _full(store, legs, sympy.Integer(0))
    (product,) = folded
    own = tuple(leg for leg in legs if leg in set(product.legs))
    if (found := _gated(store, product, own)) is not None:
        return found if own == legs else _expanded(store, found, legs)
    if not (len(product.operands) == 1 and set(own) != set(product.legs) and is_square(product.operands[0])):
        product = Product(product.scale, tuple(_mapped(store, op) for op in product.operands))
    ref = _multiplied(store, Product(sympy.Integer(1), product.operands), own, inside)
    if product.scale != 1:
        ref = _times(store, ref, product.scale)
    return ref.reordered(own) if own == legs else _expanded(store, ref.reordered(own), legs)


def _multiplied(store: Store, product: Product, legs: Legs, inside: bool) -> Ref:
    """The operands of a product, multiplied by the cheapest of the lowerings that match."""
    if not product.operands:
        return _full(store, (), sympy.Integer(1))
    identity = (product, legs)
    if (tried := store.tried(identity, inside)) is not None:
        return tried.renamed(legs)
    rows = store.lowerings if inside else (*store.lowerings, *store.outermost)
    plans = [partial(made, candidate=each) for row in rows for each in row(store, product, legs)]
    if all(isinstance(op, Tensor) for op in product.operands):
        plans.append(partial(contracted, product=product, legs=legs))
    ref = store.cheapest(plans).reordered(legs)
    store.keep(identity, ref, inside)
    return ref


def made(store: Store, candidate: Made) -> Ref:
    """What comes of a candidate: its parts built, and then what it makes of them."""
    found = candidate
    while not isinstance(found, Ref):
        match found:
            case Diagram():
                return build(store, found, inside=True)
            case Candidate(finish=finish, parts=parts):
                found = finish(store, *(build(store, each, inside=True) for each in parts))
            case Then(choices=choices, finish=finish):
                found = finish(store, store.cheapest([partial(made, candidate=each) for each in choices]))
    return found


def _times(store: Store, ref: Ref, scale: sympy.Expr) -> Ref:
    work = Work(flops=((1, ref.stored),), moved=((2, ref.stored),), fresh=((1, ref.stored),))
    value = as_stored(store, ref)
    expr = Call(f.NEG, (value,)) if scale == -1 else Call(f.MUL, (value, Number(scale)))
    return Ref(store.add(expr, sizes_of(ref.stored), Kernel.ELEMENTWISE, work), ref.stored, ref.order)


def _part(store: Store, op: Operand, inside: bool) -> Operand:
    if not isinstance(op, Part):
        return op
    built = as_tensor(store, build(store, op.diagram, inside))
    return built.rename(dict(zip(op.diagram.legs, op.legs, strict=True)))


def _mapped(store: Store, op: Operand) -> Operand:
    """A map as the tensor of its values; every other operand as it is, with its runtime value there."""
    if isinstance(op, Map):
        return as_tensor(store, elementwise(store, op.expr, tuple(diagonal(store, read(store, a)) for a in op.args)))
    if isinstance(op, Tensor):
        read(store, op)
    return op


def _gated(store: Store, product: Product, legs: Legs) -> Ref | None:
    """A value times a map that is 0 or one positive number; None for any other product."""
    gates = [(op, open_) for op in product.operands if isinstance(op, Map) and (open_ := _open(op.expr)) is not None]
    others = [op for op in product.operands if isinstance(op, Tensor)]
    if (len(gates), len(others), len(product.operands)) != (1, 1, 2) or set(others[0].legs) != set(legs):
        return None
    ((gate, number),) = gates
    if not set(gate.legs) <= set(legs):
        return None
    found = gated(store, diagonal(store, read(store, others[0])), read(store, cast(Tensor, _mapped(store, gate))))
    scale = product.scale * number
    return (found if scale == 1 else _times(store, found, scale)).reordered(legs)


def _open(expr: sympy.Expr) -> sympy.Expr | None:
    """The other value of a map that is 0 in parts and a positive number elsewhere."""
    zero, *others = sorted(_pieces(expr), key=lambda value: value != 0)
    number = others[0] if zero == 0 and len(others) == 1 else None
    return number if number is not None and number.is_number and number.is_positive else None


def _pieces(expr: sympy.Expr) -> set[sympy.Expr]:
    """The values that a map has in its parts."""
    return set().union(*(_pieces(each) for each, _ in expr.args)) if isinstance(expr, sympy.Piecewise) else {expr}


def is_square(op: Operand) -> bool:
    return isinstance(op, Map) and len(op.args) == 1 and op.expr == argument(0) ** 2


def read(store: Store, tensor: Tensor) -> Ref:
    """The numbers behind a tensor operand; integers and truth values as floating ones, whose products do not wrap."""
    ref = indices(store, tensor)
    if tensor.name not in store.integers:
        return ref
    expr, work = Call(f.TO, (ref.value, Call(f.DTYPE, (store.like,)))), copy_work(ref.stored)
    made = store.add(expr, ref.value.shape, Kernel.COPY, work, floating=store.one_dtype, strided=ref.value.strided)
    return Ref(made, ref.stored, ref.order)


def indices(store: Store, tensor: Tensor) -> Ref:
    """The value behind a tensor operand, built now if nothing has read it yet."""
    value = store.find(tensor.name)
    base = value.seen
    if base is not None and [leg.size for leg in base.order] == [leg.size for leg in tensor.legs]:
        return base.renamed(tensor.legs)  # a permuted view is its base, in the memory order of that
    sizes = sizes_of(tensor.legs)
    if value.strided and sum(size != 1 for size in value.shape) > sum(size != 1 for size in sizes):
        # a leg that is several axes: whoever reads it has to copy, so all of them share one copy
        value = store.add(reshaped(value, value.shape, sizes), sizes, Kernel.COPY, copy_work(tensor.legs))
    return Ref(value, tensor.legs, tensor.legs)


def as_tensor(store: Store, ref: Ref) -> Tensor:
    """An operand for a built value. A value that is stored in another order is read through a permuted view."""
    value = ref.value
    if ref.order != ref.stored:
        value = store.add(in_order(store, ref), sizes_of(ref.order), Kernel.VIEW, strided=True, seen=ref)
    return Tensor(store.key_of(value), ref.order)


def contracted(store: Store, product: Product, legs: tuple[Leg, ...]) -> Ref:
    """A product of tensors along the better of opt_einsum's paths."""
    refs = [diagonal(store, read(store, op)) for op in product.operands if isinstance(op, Tensor)]
    refs = [sum_legs(store, ref, _private(ref, k, refs, legs)) for k, ref in enumerate(refs)]
    if len(refs) == 1:
        return refs[0].reordered(legs)
    plans = [partial(_along, refs=refs, path=path, legs=legs) for path in _paths(store, refs, legs)]
    return store.cheapest(plans, saved)


def diagonal(store: Store, ref: Ref) -> Ref:
    """A tensor that has a leg twice is read along its diagonal."""
    for k, leg in enumerate(ref.stored):
        if leg in ref.stored[:k]:
            first = ref.stored.index(leg)
            numbered = _numbered(ref.stored)
            base = in_order(store, Ref(ref.value, numbered, numbered))
            rest = (*(x for i, x in enumerate(ref.stored) if i not in (first, k)), leg)
            expr = Call(f.DIAGONAL, (base,), (("dim1", first), ("dim2", k)))
            value = store.add(expr, sizes_of(rest), Kernel.VIEW, strided=True)
            return diagonal(store, Ref(value, rest, rest))
    return ref


def _numbered(legs: tuple[Leg, ...]) -> tuple[Leg, ...]:
    return tuple(Leg(f"{leg.name}_{k}", leg.size) for k, leg in enumerate(legs))


def _private(ref: Ref, position: int, refs: list[Ref], output: tuple[Leg, ...]) -> tuple[Leg, ...]:
    """Legs that only this operand has and that are not asked for."""
    others = {leg for k, other in enumerate(refs) if k != position for leg in other.order}
    return tuple(leg for leg in ref.order if leg not in others and leg not in output)


def _paths(store: Store, refs: list[Ref], legs: tuple[Leg, ...]) -> tuple[Path, ...]:
    """opt_einsum's, for all columns of a loop: what is done to their sum is done once."""
    if len(refs) == 2:
        return (((0, 1),),)
    symbols = {leg: opt_einsum.get_symbol(k) for k, leg in enumerate(ordered_union(*(r.order for r in refs), legs))}
    terms = ["".join(symbols[leg] for leg in ref.order) for ref in refs]
    equation = f"{','.join(terms)}->{''.join(symbols[leg] for leg in legs)}"
    rounds = {leg: store.rounds for leg in symbols if leg.name == COLUMN}
    return _searched(
        equation, tuple(tuple(size_at(leg.size, store.batch) * rounds.get(leg, 1) for leg in r.order) for r in refs)
    )


MANY = 12
"""Operands up to which all orders are searched: there are about three times as many with each one more."""


@lru_cache(2**12)  # the options of a parameter ask the same again and again
def _searched(equation: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[Path, ...]:
    found: dict[Path, None] = {}
    for method in ("dp", "greedy") if len(shapes) <= MANY else ("greedy",):
        some = [tuple(max(1, size) for size in shape) for shape in shapes]  # no path is best of no elements
        path, _ = opt_einsum.contract_path(equation, *some, shapes=True, optimize=method)
        found[tuple(tuple(p) for p in path)] = None
    return tuple(found)


def _along(store: Store, refs: list[Ref], path: Path, legs: tuple[Leg, ...]) -> Ref:
    remaining = list(refs)
    for step, positions in enumerate(path):
        chosen = [remaining.pop(k) for k in sorted(positions, reverse=True)][::-1]
        while len(chosen) > 1:
            a, b = chosen.pop(0), chosen.pop(0)
            needed = set(legs).union(*(r.order for r in (*remaining, *chosen)))
            last = not remaining and not chosen
            kept = tuple(leg for leg in ordered_union(a.order, b.order) if leg in needed)
            order = legs if last else _order_of(kept, _partner(remaining, path[step + 1 :])) if not chosen else ()
            chosen.insert(0, contract_pair(store, a, b, order or kept, ordered=bool(order)))
        remaining.append(chosen[0])
    return remaining[0].reordered(legs)


def _partner(remaining: list[Ref], path: tuple[tuple[int, ...], ...]) -> Ref | None:
    """What a value that comes next after `remaining` is multiplied with first, if that is so at once."""
    positions = path[0] if path else ()
    others = [k for k in positions if k != len(remaining)]
    return remaining[others[0]] if len(positions) == 2 and len(others) == 1 else None


def _order_of(legs: tuple[Leg, ...], partner: Ref | None) -> tuple[Leg, ...]:
    """The legs in the memory order of a partner that has all of them; nothing where it has not."""
    own = tuple(leg for leg in partner.stored if leg in legs) if partner is not None else ()
    return own if len(own) == len(legs) else ()


def _expanded(store: Store, ref: Ref, legs: tuple[Leg, ...]) -> Ref:
    """The value, constant along the legs that it does not have."""
    groups = tuple((leg,) if leg in ref.order else () for leg in legs)
    expr = Call(f.EXPAND, (arranged(store, ref, groups), *sizes_of(legs)))
    return Ref(store.add(expr, sizes_of(legs), Kernel.VIEW, strided=True, spread=ref), legs, legs)


def _full(store: Store, legs: tuple[Leg, ...], value: sympy.Expr) -> Ref:
    """A constant."""
    expr = Call(f.NEW_FULL, (store.like, sizes_of(legs), Number(value)))
    return Ref(store.add(expr, sizes_of(legs), Kernel.ELEMENTWISE), legs, legs)


def _added(store: Store, terms: list[Ref], legs: tuple[Leg, ...]) -> Ref:
    """The sum of several values, in the memory order of the largest."""
    order = terms[0].stored if set(terms[0].stored) == set(legs) else legs
    shown = tuple(arranged(store, t, tuple((leg,) for leg in order)) for t in terms)
    work = Work(flops=((len(terms) - 1, legs),), moved=((len(terms) + 1, legs),), fresh=((1, legs),))
    spread = terms[1].value.spread if len(terms) == 2 and terms[0].stored == order else None
    summands = (terms[0], spread) if spread is not None else None
    value = store.add(Call(f.ADD, shown), sizes_of(order), Kernel.ELEMENTWISE, work, summands=summands)
    return Ref(value, order, legs)
