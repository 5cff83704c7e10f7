"""Slice the batch: a term that needs its individual gradients is computed a few samples at a time.

The slice is a function of its own in the source; the term is the sum of the slices (n summed) or their
concatenation (n open). Exact: a product of operands is taken apart along n whatever the operands are.
Behind a loop over columns such functions are tiles: of few samples, so that what they look up stays in the cache.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from ..canonical import key
from ..diagram import BATCH, COLUMN, Diagram, Leg, Map, N, Operand, Part, Product, Selection, Tensor, ordered_union
from .arrange import arranged, sizes_of
from .contract import Lowering, Plan, as_tensor, build, read
from .cost import Kernel, Terms, Work, number
from .listing import alive, lines_of
from .store import Ref, Step, Store

Legs = tuple[Leg, ...]
TOTAL = sympy.Symbol("total", integer=True, positive=True)
"""Inside a slice: the batch size as a number in a scale. N is the size of the slice there."""


LARGE = 2
"""A term is sliced if it allocates this many times its result."""


def build_sliced(store: Store, diagram: Diagram, lowerings: tuple[Lowering, ...], chunk: int) -> Ref:
    """Like `build`, with every term that has parts along the batch computed `chunk` samples at a time."""
    products = []
    for product in diagram.products:
        if _sliceable(product, diagram.legs) and _large(store, product, diagram.legs, lowerings):
            value = _sliced(store, product, diagram.legs, lowerings, chunk)
            products.append(Product(product.scale, (as_tensor(store, value),)))
        else:
            products.append(product)
    return build(store, Diagram(diagram.legs, tuple(products)), lowerings)


def _sliceable(product: Product, legs: Legs) -> bool:
    """Whether n runs through a product that is more than its value, and nothing pairs samples with each other."""
    reduced = BATCH not in legs or len(product.operands) > 1
    return BATCH in product.legs and reduced and not pairs_samples(product, legs)


def _large(store: Store, product: Product, legs: Legs, lowerings: tuple[Lowering, ...]) -> bool:
    """Whether some value on the way is much larger than the result."""
    trial, start = store.fork(), len(store.steps)
    ref = build(trial, Diagram(legs, (product,)), lowerings)
    largest = max((number(step.work.fresh, store.batch) for step in trial.steps[start:]), default=0.0)
    return largest > LARGE * number(((1, ref.order),), store.batch)


def pairs_samples(product: Product, legs: Legs) -> bool:
    """Whether samples meet each other in it."""
    if BATCH in product.legs and any(leg.size == N and leg != BATCH for leg in (*product.legs, *legs)):
        return True
    inner = [_renamed(op) for op in product.operands if isinstance(op, Part)]
    return any(pairs_samples(p, d.legs) for d in inner for p in d.products)


def _renamed(part: Part) -> Diagram:
    return part.diagram.rename(dict(zip(part.diagram.legs, part.legs, strict=True)))


def columns_first(store: Store, product: Product, legs: Legs, lowerings: tuple[Lowering, ...]) -> list[Plan]:
    """In a loop over columns their sum first, and the rest, which is linear in it, in tiles that stay in the cache.

    Without tiles, only where the sum is there already.
    """
    summed = [op for op in product.operands if isinstance(op, Tensor) and store.resolve(op.name) in store.varying]
    rest = [op for op in product.operands if op not in summed]
    if store.rounds == 1 or len(summed) < 2 or not rest or any(leg.name == COLUMN for leg in legs):
        return []
    needed = {*legs, *(leg for op in rest for leg in op.legs)}
    between = tuple(leg for leg in ordered_union(*(op.legs for op in summed)) if leg in needed)
    inner = Diagram(between, (Product(sympy.Integer(1), tuple(summed)),))
    chunk = _tile(store, between, legs)
    tiled = chunk < store.batch and _sliceable(Product(sympy.Integer(1), (Part(inner, between), *rest)), legs)
    if not tiled and key(inner) not in store.built:
        return []

    def plan(store: Store) -> Ref:
        total = as_tensor(store, build(store, inner, lowerings))
        product = Product(sympy.Integer(1), (total, *rest))
        if tiled:
            return _sliced(store, product, legs, lowerings, chunk, tiled=True)
        return build(store, Diagram(legs, (product,)), lowerings)

    return [plan]


def _tile(store: Store, between: Legs, legs: Legs) -> int:
    """How many samples at a time keep in the cache what has one of two legs each that are summed, and the result's."""
    twice = number(((1, tuple(leg for leg in between if leg not in (*legs, BATCH))),), store.batch)
    each = twice**0.5 * number(((1, tuple(leg for leg in legs if leg != BATCH)),), store.batch) * store.itemsize
    return min(store.batch, max(1, int(store.rates.tile / each)))


def _sliced(
    store: Store, product: Product, legs: Legs, lowerings: tuple[Lowering, ...], chunk: int, tiled: bool = False
) -> Ref:
    """The term as calls of a function of `chunk` samples; tiled, where it has one operand that varies in a loop."""
    own = tuple(leg for leg in legs if leg in set(product.legs))
    operands = tuple(_open(store, op, lowerings) for op in product.operands)
    inner = Diagram(own, (Product(sympy.Integer(1), operands),))
    inputs = _leaves(inner)
    small = Store(store.rates, chunk, store.itemsize, note=store.note, prefix="u", functions=store.functions)
    small.floating |= store.floating & set(inputs)
    small.shapes |= {name: sizes_of(tensor.legs) for name, tensor in inputs.items()} | {"like": ()}
    ref = build(small, inner, lowerings)
    store.functions |= small.functions
    result = arranged(small, ref, tuple((leg,) for leg in own)) or ref.name
    kept = set(small.names_in(result))
    steps = alive(small.steps, kept)
    uses_like = any("like" in step.inputs for step in steps)
    parameters = [*inputs, *(["like"] if uses_like else []), *(["total"] if _has_total(steps) else [])]
    first = next(tensor for tensor in inputs.values() if BATCH in tensor.legs)
    batch = f"{first.name}.shape[{first.legs.index(BATCH)}]"
    name = function_of(store, parameters, lines_of(steps, kept), result, batch)
    arguments = [_argument(store, tensor, chunk) for tensor in inputs.values()]
    arguments += (["like"] if uses_like else []) + (["N"] if "total" in parameters else [])
    rounds = f"range(0, N, {chunk})"
    calls = f"{name}({', '.join(arguments)}) for i in {rounds if tiled else f'progress({rounds})'}"
    axis = own.index(BATCH) if BATCH in own else None
    code = f"sum({calls})" if axis is None else f"torch.cat([{calls}]{f', {axis}' if axis else ''})"
    work = _work(steps, store, chunk)
    if not tiled:
        return Ref(store.add(code, sizes_of(own), Kernel.SLICED, work), own, own)
    moved = tuple((1, tensor.legs) for tensor in inputs.values())
    work = replace(work, moved=(*moved, (1, own)), launches=len(steps) * -(-store.batch // chunk))
    (linear,) = (name for name in store.names_in(code) if name in store.varying)
    return Ref(store.add(code, sizes_of(own), Kernel.TILED, work, linear=linear), own, own)


def _open(store: Store, op: Operand, lowerings: tuple[Lowering, ...]) -> Operand:
    """A part without the batch is computed once, outside; in the others a scale's N becomes the total."""
    if not isinstance(op, Part):
        return op
    if BATCH not in op.legs:
        built = as_tensor(store, build(store, op.diagram, lowerings))
        return built.rename(dict(zip(op.diagram.legs, op.legs, strict=True)))
    diagram = _renamed(op)
    products = tuple(_open_product(store, p, diagram.legs, lowerings) for p in diagram.products)
    return Part(Diagram(diagram.legs, products), op.legs)


def _open_product(store: Store, product: Product, legs: Legs, lowerings: tuple[Lowering, ...]) -> Product:
    if BATCH not in product.legs:
        own = tuple(leg for leg in legs if leg in set(product.legs))
        value = build(store, Diagram(own, (product,)), lowerings)
        return Product(sympy.Integer(1), (as_tensor(store, value),))
    return Product(product.scale.xreplace({N: TOTAL}), tuple(_open(store, op, lowerings) for op in product.operands))


def _leaves(diagram: Diagram) -> dict[str, Tensor]:
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
                    inner = _leaves(_renamed(op))
                    found |= {name: t for name, t in inner.items() if name not in found}
                case _:
                    pass
    return found


def _argument(store: Store, tensor: Tensor, chunk: int) -> str:
    ref = read(store, tensor)
    code = arranged(store, ref, tuple((leg,) for leg in tensor.legs))
    if BATCH not in tensor.legs:
        return code
    return f"{code}[{':, ' * tensor.legs.index(BATCH)}i : i + {chunk}]"


def function_of(store: Store, parameters: list[str], lines: list[str], result: str, batch: str) -> str:
    """The name of a function of some samples, as many as `batch` says; two that are the same are one."""
    body = [f"    N = {batch}", *lines, f"    return {result}"]
    text = "\n".join(body)
    for known, source in store.functions.items():
        if source.split("\n", 1)[1] == text and source.startswith(f"def {known}({', '.join(parameters)}):"):
            return known
    name = f"slice_{len(store.functions)}"
    store.functions[name] = f"def {name}({', '.join(parameters)}):\n{text}"
    return name


def _has_total(steps: tuple[Step, ...]) -> bool:
    return any("total" in step.code for step in steps)


def _work(steps: tuple[Step, ...], store: Store, chunk: int) -> Work:
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

