"""Streams: torch code on slices of a diagram, as calls of a function of some samples."""

from __future__ import annotations

from ...diagram.algebra import inline
from ...diagram.core import BATCH, Diagram, Leg, N, Size
from ...errors import UnsupportedError
from ..entered.forward import called
from ..lower.arrange import in_order, reshaped, sizes_of
from ..lower.contract import build
from ..program import functions as f
from ..program.cost import Kernel, Work, number
from ..program.expr import Body, Call, Expr, Join, Ref, Rounds, Value, sizes_in
from ..program.lines import alive
from ..program.numbers import TOTAL
from ..program.store import LIKE, Store
from ..sweep.derived import Streamed
from .slices import argument, leaves_of, opened, pairs_samples

ELEMENTS = 2**21
"""Of a slice, or those of one sample where that has more."""


def streamed(store: Store, diagram: Diagram, stream: Streamed, shape: tuple[Size, ...]) -> Ref:
    """The function of slices [samples, *shape], summed or one after the other. Raises `UnsupportedError`."""
    whole = inline(diagram)
    if not all(BATCH in p.legs and not pairs_samples(p, whole.legs) for p in whole.products):
        raise UnsupportedError(f"a stream is cut along the samples, and this diagram pairs them: {diagram}")
    if not whole.products:
        return _of_zeros(store, stream, shape)
    inner = Diagram(whole.legs, tuple(opened(store, product, whole.legs) for product in whole.products))
    small = store.separate(chunk := _chunk(store, shape))
    small.one_dtype = store.one_dtype
    leaves = leaves_of(inner)
    params = {name: small.given(name, sizes_of(t.legs), store.find(name).floating) for name, t in leaves.items()}
    small.like = small.given(LIKE, ())
    fixed = {name: small.given(name, tuple(t.shape)) for name, t in stream.constants.items()}
    ref = build(small, inner)
    value = small.add(reshaped(in_order(small, ref), sizes_of(ref.order), (N, *shape)), (N, *shape), Kernel.VIEW)
    small.name(stream.given, value)
    for call in stream.calls:
        expr = called(small, call, random=False, own=stream.dtype)
        floating = small.one_dtype and call.output.dtype == stream.dtype
        small.name(call.output.name, small.add(expr, call.output.shape, Kernel.NATIVE, floating=floating))
    made = small.find(stream.made.name)
    steps = alive(small.steps, {made})
    body = _body(small, params, fixed, steps, made)
    args = [argument(store, tensor) for tensor in leaves.values()]
    args += [(store.like, None)] if small.like in body.params else []
    args += [(store.find(name), None) for name, each in fixed.items() if each in body.params]
    args += [(N, None)] if body.total else []
    join = Join.CAT if stream.rows else Join.SUM
    calls = Rounds(body, tuple(args), N, chunk, (join,), 0)
    flops = tuple(term for step in steps for term in step.work.flops)
    moved = (*(term for step in steps for term in step.work.moved), *_moved(shape, len(stream.calls)))
    fresh = ((1, (Leg("n", chunk), *(Leg(f"p{k}", size) for k, size in enumerate(shape)))),)
    legs = tuple(Leg(f"stream{k}", size) for k, size in enumerate(made.shape))
    total = store.add(calls, made.shape, Kernel.SLICED, Work(flops, moved, fresh, inside=fresh))
    return Ref(total, legs, legs)


def _of_zeros(store: Store, stream: Streamed, shape: tuple[Size, ...]) -> Ref:
    """Of a parameter that nothing depends on: a zero that is read at every place."""
    zero = store.add(Call(f.NEW_ZEROS, (store.like, ())), (), Kernel.NATIVE, floating=store.one_dtype)
    value = store.add(Call(f.EXPAND, (zero, N, *shape)), (N, *shape), Kernel.VIEW, strided=True)
    store.name(stream.given, value)
    for call in stream.calls:
        expr = called(store, call, random=False, own=stream.dtype)
        store.name(call.output.name, store.add(expr, call.output.shape, Kernel.NATIVE))
    made = store.find(stream.made.name)
    legs = tuple(Leg(f"stream{k}", size) for k, size in enumerate(made.shape))
    return Ref(made, legs, legs)


def _moved(shape: tuple[Size, ...], calls: int) -> tuple[tuple[int, tuple[Leg, ...]], ...]:
    return ((2 * max(calls, 1), (BATCH, *(Leg(f"p{k}", size) for k, size in enumerate(shape)))),)


def _chunk(store: Store, shape: tuple[Size, ...]) -> int:
    each = number(((1, tuple(Leg(f"p{k}", size) for k, size in enumerate(shape))),), store.batch)
    return max(1, min(store.batch, int(ELEMENTS / max(each, 1))))


def _body(
    small: Store,
    params: dict[str, Value],
    fixed: dict[str, Value],
    steps: tuple[Value, ...],
    made: Value,
) -> Body:
    read = {value for step in steps for value in step.inputs} | {made}
    own = [*params.values(), *([small.like] if small.like in read else [])]
    own += [each for each in fixed.values() if each in read]
    first = next(value for value in params.values() if N in value.shape)
    total = any(TOTAL in sizes_in(step.expr) for step in steps)
    result: Expr = made
    return Body(tuple(own), steps, (result,), (first, first.shape.index(N)), "stream", total=total)
