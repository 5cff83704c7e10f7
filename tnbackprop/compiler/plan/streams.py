"""Streams: torch code on slices of a diagram, as calls of a function of some samples."""

from __future__ import annotations

from dataclasses import replace

from ...diagram.algebra import inline
from ...diagram.core import BATCH, Diagram, Leg, N, Size
from ...errors import UnsupportedError
from ..entered.forward import enter
from ..lower.arrange import in_order, reshaped, sizes_of
from ..lower.contract import build
from ..program import functions as f
from ..program.cost import Kernel, number
from ..program.expr import Call, Join, Ref, Rounds, Value
from ..program.store import Store
from ..sweep.derived import Streamed
from .slices import arguments, body_of, inside, opened, pairs_samples, work_of

ELEMENTS = 2**21
"""Of a slice, or those of one sample where that has more."""


def streamed(store: Store, diagram: Diagram, stream: Streamed, shape: tuple[Size, ...]) -> Ref:
    """The function of slices [samples, *shape], summed or one after the other. Raises `UnsupportedError`."""
    whole = inline(diagram)
    if not all(BATCH in p.legs and not pairs_samples(p, whole.legs) for p in whole.products):
        raise UnsupportedError(f"a stream is cut along the samples, and this diagram pairs them: {diagram}")
    legs = _legs("stream", stream.made.shape)
    if not whole.products:
        return Ref(_of_zeros(store, stream, shape), legs, legs)
    inner = Diagram(whole.legs, tuple(opened(store, product, whole.legs) for product in whole.products))
    own = _legs("p", shape)
    small, leaves = inside(store, inner, chunk := _chunk(store, own))
    small.one_dtype = store.one_dtype
    for name, tensor in stream.constants.items():
        small.given(name, tuple(tensor.shape))
    ref = build(small, inner)
    value = small.add(reshaped(in_order(small, ref), sizes_of(ref.order), (N, *shape)), (N, *shape), Kernel.VIEW)
    made = _entered(small, stream, value)
    body = body_of(small, leaves, made, "stream", tuple(stream.constants))
    join = Join.CAT if stream.rows else Join.SUM
    calls = Rounds(body, arguments(store, body, leaves, tuple(stream.constants)), N, chunk, (join,), 0)
    work = work_of(body.steps, chunk)
    moved = (*work.moved, (2 * max(len(stream.calls), 1), (BATCH, *own)))
    fresh = ((1, (Leg("n", chunk), *own)),)
    total = store.add(calls, made.shape, Kernel.SLICED, replace(work, moved=moved, fresh=fresh, inside=fresh))
    return Ref(total, legs, legs)


def _of_zeros(store: Store, stream: Streamed, shape: tuple[Size, ...]) -> Value:
    """Of a parameter that nothing depends on: a zero that is read at every place."""
    zero = store.add(Call(f.NEW_ZEROS, (store.like, ())), (), Kernel.NATIVE, floating=store.one_dtype)
    return _entered(store, stream, store.add(Call(f.EXPAND, (zero, N, *shape)), (N, *shape), Kernel.VIEW, strided=True))


def _entered(store: Store, stream: Streamed, value: Value) -> Value:
    """What the function makes of a value."""
    store.name(stream.given.name, value)
    enter(store, stream.calls, stream.given.dtype)
    return store.find(stream.made.name)


def _legs(name: str, shape: tuple[Size, ...]) -> tuple[Leg, ...]:
    return tuple(Leg(f"{name}{k}", size) for k, size in enumerate(shape))


def _chunk(store: Store, own: tuple[Leg, ...]) -> int:
    return max(1, min(store.batch, int(ELEMENTS / max(number(((1, own),), store.batch), 1))))
