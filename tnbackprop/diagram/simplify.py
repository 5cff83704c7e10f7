"""Simplify: rewrites that keep the value of a diagram. Each rewrite is a row of `REWRITES`, applied to a fixpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations

import sympy

from .canonical import product_key
from .core import Delta, Diagram, Leg, Map, Operand, Product, Selection, Tensor, Window, argument
from .radix import digits_of


@lru_cache(2**14)  # a model of many blocks has some thousand diagrams
def simplify(diagram: Diagram) -> Diagram:
    """The diagram with deltas away, equal operands as powers, trivial windows gone, and like terms added."""
    some = (p for p in diagram.products if not any(_empty(leg) for leg in p.legs))  # a sum of no elements is 0
    products = [p for p in (_fixpoint(p, diagram.legs) for p in some) if p.scale != 0]
    return Diagram(diagram.legs, _like_terms(products, diagram.legs))


def _empty(leg: Leg) -> bool:
    return isinstance(leg.size, int) and not leg.size


def _fixpoint(product: Product, output: tuple[Leg, ...]) -> Product:
    changed: Product | None = product
    while changed is not None:
        product = changed
        changed = next((new for rewrite in REWRITES if (new := rewrite(product, output)) is not None), None)
    return product


def remove_delta(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """Σ_a δ[a,b] X[a] = X[b]; a delta between two output legs stays."""
    for position, op in enumerate(product.operands):
        if not isinstance(op, Delta):
            continue
        a, b = op.legs
        rest = product.operands[:position] + product.operands[position + 1 :]
        if a == b:
            return resummed(product, rest, output)
        gone, stays = (a, b) if a not in output else (b, a)
        if gone not in output:
            renamed = Product(product.scale, tuple(o.rename({gone: stays}) for o in rest))
            before = Product(product.scale, (*renamed.operands, Delta((stays, stays))))
            return resummed(before, renamed.operands, output)
    return None


def fold_equal(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """Equal operands on equal legs: a power of the tensor; a window, delta or selection is its own square."""
    for i, one in enumerate(product.operands):
        for j in range(i + 1, len(product.operands)):
            folded = _fold(one, product.operands[j])
            if folded is not None:
                rest = tuple(op for k, op in enumerate(product.operands) if k not in (i, j))
                return resummed(product, rest[:i] + folded + rest[i:], output)
    return None


def _fold(one: Operand, other: Operand) -> tuple[Operand, ...] | None:
    if one == other and isinstance(one, Window | Delta | Selection):
        return (one,)
    if isinstance(one, Delta) and isinstance(other, Delta) and set(one.legs) == set(other.legs):
        return (one,)
    f, g = as_map(one), as_map(other)
    if f is None or g is None or f.args != g.args:
        return None
    if one == other or len(f.args) == 1:
        product = f.expr * g.expr
        if product == 1:
            return ()
        return (Tensor(*_fields(f.args[0])),) if product == argument(0) else (Map(product, f.args),)
    return None


def _fields(tensor: Tensor) -> tuple[str, tuple[Leg, ...]]:
    return tensor.name, tensor.legs


def as_map(operand: Operand) -> Map | None:
    if isinstance(operand, Map):
        return operand if operand.args else None
    return Map(argument(0), (operand,)) if isinstance(operand, Tensor) else None


def fold_constant(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """A map without arguments is a number, and so is the constant factor of a map."""
    for position, op in enumerate(product.operands):
        if isinstance(op, Map) and not op.args:
            rest = product.operands[:position] + product.operands[position + 1 :]
            return Product(product.scale * op.expr, rest)
        if isinstance(op, Map) and len(op.args) == 1 and op.expr == argument(0):
            return Product(product.scale, (*product.operands[:position], op.args[0], *product.operands[position + 1 :]))
        if isinstance(op, Map):
            factor, rest_expr = op.expr.as_independent(*(argument(k) for k in range(len(op.args))), as_Add=False)
            if factor != 1:
                before, after = product.operands[:position], product.operands[position + 1 :]
                return Product(product.scale * factor, (*before, Map(rest_expr, op.args), *after))
    return None


def trim_window(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """A window term over a leg of size 1 is always 0; a window that only renames its image is a delta."""
    for position, op in enumerate(product.operands):
        if not isinstance(op, Window):
            continue
        new: Operand | None = None
        kept = tuple((c, leg) for c, leg in op.terms if leg.size != 1)
        if len(kept) == 1 and kept[0][0] == 1 and op.offset == 0 and kept[0][1].size == op.image.size:
            new = Delta((op.image, kept[0][1]))
        elif kept != op.terms:
            new = Window(op.image, kept, op.offset)
        if new is not None:
            operands = (*product.operands[:position], new, *product.operands[position + 1 :])
            return resummed(product, operands, output)
    return None


def split_leg(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """A window that counts i = (a, b, …) in mixed radix, each i once: tensors are read with legs a, b, … for i."""
    for position, op in enumerate(product.operands):
        if not isinstance(op, Window) or op.image in output:
            continue
        legs = digits_of(op)
        rest = product.operands[:position] + product.operands[position + 1 :]
        if legs is not None and all(_splits(o, op.image) for o in rest):
            operands = tuple(_with_split(o, op.image, legs) for o in rest)
            after = Product(product.scale, operands)
            lost = [leg.size for leg in legs if leg not in output and leg not in after.legs]
            return Product(sympy.Mul(product.scale, *lost), operands)
    return None


def _splits(operand: Operand, leg: Leg) -> bool:
    return leg not in operand.legs or isinstance(operand, Tensor | Map)


def _with_split(operand: Operand, leg: Leg, into: tuple[Leg, ...]) -> Operand:
    if isinstance(operand, Map):
        return Map(operand.expr, tuple(_split_tensor(a, leg, into) for a in operand.args))
    return _split_tensor(operand, leg, into) if isinstance(operand, Tensor) else operand


def _split_tensor(tensor: Tensor, leg: Leg, into: tuple[Leg, ...]) -> Tensor:
    k = tensor.legs.index(leg) if leg in tensor.legs else -1
    return Tensor(tensor.name, tensor.legs[:k] + into + tensor.legs[k + 1 :]) if k >= 0 else tensor


def resummed(before: Product, operands: tuple[Operand, ...], output: tuple[Leg, ...]) -> Product:
    """The product with other operands; a summed leg that is orphaned by it multiplies by its size."""
    after = Product(before.scale, operands)
    present = set(after.legs)
    lost = [leg.size for leg in before.legs if leg not in output and leg not in present]
    return Product(sympy.Mul(before.scale, *lost), operands)


def join_windows(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """Π[i=s·p+d·k] Π[i=s·p+d·k'] = Π[i=s·p+d·k] δ[k,k']: two windows that differ in one leg agree there."""
    windows = [(k, op) for k, op in enumerate(product.operands) if isinstance(op, Window)]
    for (_, one), (k, other) in combinations(windows, 2):
        if (one.image, one.offset, len(one.terms)) != (other.image, other.offset, len(other.terms)):
            continue
        unlike = [(a, b) for a, b in zip(one.terms, other.terms, strict=True) if a != b]
        if len(unlike) == 1 and unlike[0][0][0] == unlike[0][1][0] and unlike[0][0][1].size == unlike[0][1][1].size:
            delta = Delta((unlike[0][0][1], unlike[0][1][1]))
            return Product(product.scale, (*product.operands[:k], delta, *product.operands[k + 1 :]))
    return None


def join_selections(product: Product, output: tuple[Leg, ...]) -> Product | None:
    """[index = c] [index = c'] = [index = c] δ[c,c']: one index makes one choice."""
    selections = [(k, op) for k, op in enumerate(product.operands) if isinstance(op, Selection)]
    for (_, one), (k, other) in combinations(selections, 2):
        sizes = [leg.size for leg in one.choice], [leg.size for leg in other.choice]
        if one.index == other.index and sizes[0] == sizes[1]:
            deltas = tuple(Delta(pair) for pair in zip(one.choice, other.choice, strict=True))
            return Product(product.scale, (*product.operands[:k], *deltas, *product.operands[k + 1 :]))
    return None


REWRITES: tuple[Callable[[Product, tuple[Leg, ...]], Product | None], ...] = (
    remove_delta,
    trim_window,
    split_leg,
    fold_constant,
    fold_equal,
    join_windows,
    join_selections,
)


def _like_terms(products: list[Product], output: tuple[Leg, ...]) -> tuple[Product, ...]:
    """Products that differ in their scale only are added; those that cancel are dropped."""
    if len(products) == 1:
        return (products[0],)
    start = {leg: (0, k) for k, leg in enumerate(output)}
    merged: dict[object, Product] = {}
    for product in products:
        identity = product_key(Product(sympy.Integer(1), product.operands), start)
        earlier = merged.get(identity)
        scale = product.scale + earlier.scale if earlier else product.scale
        merged[identity] = Product(sympy.simplify(scale) if earlier else scale, (earlier or product).operands)
    return tuple(p for p in merged.values() if p.scale != 0)
