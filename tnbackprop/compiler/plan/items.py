"""Items: what the items of a sweep (cotangents, individual VJPs, all quantities of a parameter) become as steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import torch

from ...diagram.core import Diagram, Leg, N, Size, hint_of, is_head
from ...errors import UnsupportedError
from ...notation.bind import COTANGENT, COTANGENTS
from ...notation.code import Code, Nth
from ...notation.code import Native as Vjp
from ..derive.fallback import OperatorVjp
from ..entered.forward import EACH, fill, operator_vjp
from ..lower.arrange import added, in_order, reshaped, sizes_of
from ..lower.contract import build
from ..program import functions as f
from ..program.cost import Kernel, Terms, Work
from ..program.expr import NO_WORK, Call, Expr, Lambda, Ref, Value
from ..program.repeat import again, asked, keep
from ..program.store import Store
from ..sweep.derived import Backward, Extraction, Individual, Native, Result, Schedule
from ..translate.graph import Graph
from ..translate.operators import Memory, row_of
from ..translate.torch_internals import overload
from .accumulated import accumulated, as_read
from .choose import Choice, choose, chosen
from .placed import joined, side_by_side
from .streams import streamed

Results = dict[Result, dict[str, Value]]


def scheduled(
    store: Store,
    graph: Graph,
    schedule: Schedule,
    chunk: int | None,
    choices: list[Choice],
    lead: tuple[Leg, ...] = (),
) -> Results:
    """Every item of a sweep; result -> parameter name -> value."""
    results: Results = {}
    for item in schedule:
        if isinstance(item, Backward):
            backward(store, graph, item, lead)
        elif isinstance(item, Individual):
            if item.name in store:
                continue
            ref = _native(store, item.native, (N, *graph.values[item.of].shape), lead)
            named(store, ref, item.name)
        else:
            values, choice = _streams(store, graph, item) if item.streams else _extract(store, graph, item, chunk)
            choices += [choice] if choice is not None else []
            for quantity, value in values.items():
                group = item.groups.get(quantity.quantity)
                own, name = results.setdefault(quantity, {}), graph.parameters[item.parameter][0]
                if group is not None and group in own:
                    value = _summed(store, str(quantity), name, own[group], value)
                own[name if group is None else group] = value
    return results


def named(store: Store, ref: Ref, name: str) -> None:
    """Call a built value `name`; a value in another memory order is read through a permuted view."""
    value = ref.value
    if ref.order != ref.stored:
        shape = sizes_of(ref.order)
        value = store.add(in_order(store, ref), shape, Kernel.VIEW, hint=hint_of(name), strided=True, seen=ref)
    store.name(name, value)


def backward(
    store: Store, graph: Graph, item: Backward, lead: tuple[Leg, ...]
) -> None:
    """One cotangent: the sum of what its users send, each by native code or by its diagram."""
    if item.name in store:  # an earlier phase has it
        return
    what = f"cotangent of {hint_of(item.value)}" if item.value else "averaged matrix"
    store.note = what + (f", {item.note}" if item.note else "")
    shape = graph.values[item.value].shape if item.value in graph.values else None
    refs = [_native(store, term, shape, lead) for term in item.terms if isinstance(term, Native)]
    groups, others = side_by_side(term for term in item.terms if isinstance(term, Diagram))
    refs += [joined(store, group, lambda block, sizes: shaped(store, build(store, block), sizes)) for group in groups]
    for term in others:
        refs.append(_cheapest(store, [term] if item.condensed is None else [term, item.condensed]))
    if len(refs) == 1:
        named(store, refs[0], item.name)
        return
    shape = (*sizes_of(lead), *shape) if shape is not None else sizes_of(refs[0].order)
    terms = tuple(shaped(store, ref, shape) for ref in refs)
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(shape))
    work = Work(flops=((len(refs) - 1, legs),), moved=((len(refs) + 1, legs),), fresh=((1, legs),))
    total = store.add(Call(f.ADD, terms), shape, Kernel.ELEMENTWISE, work, hint=hint_of(item.name))
    store.name(item.name, total)


def _cheapest(store: Store, ways: list[Diagram]) -> Ref:
    """The fastest of several diagrams, built; what was fastest for equal ones is so again."""
    what, notes = asked(store, dict(enumerate(ways))), (store.note,)
    if (known := again(store, what, notes)) is not None:
        return known[1][0]
    trial = store.fork()
    ref = trial.cheapest([partial(build, diagram=way) for way in ways])
    store.adopt(trial)
    keep(store, what, trial, (ref,), notes)
    return ref


def _native(store: Store, term: Native, shape: tuple[Size, ...] | None, lead: tuple[Leg, ...]) -> Ref:
    """Native code; over the columns that are propagated together by vmap, unless it takes them itself."""
    assert shape is not None
    cotangent: Expr = store.find(term.cotangent)
    before = store.find(term.cotangent).shape
    out = store.find(term.of).shape
    if not any(N in factor.free_symbols for factor in out if not isinstance(factor, int)):
        out = (N, *out)  # a value of parameters: one cotangent per sample
    out = (*sizes_of(lead), *out)
    cotangent = reshaped(cotangent, before, out)
    together = COTANGENTS in term.code.holes
    if together and before != out:
        cotangent = store.add(cotangent, out, Kernel.VIEW)
    mapped = bool(lead) and not together
    given: dict[str, Expr] = {COTANGENT: EACH if mapped else cotangent, COTANGENTS: cotangent}
    if isinstance(term.code, Nth):  # the kernel is called once for all
        every = _filled(store, term.code.code, given)
        every = every if mapped else store.add(every, (), Kernel.NATIVE, own=False, floating=store.one_dtype)
        expr: Expr = Call(f.ITEM, (every, term.code.place))
    else:
        expr = _filled(store, term.code, given)
    expr = Call(f.APPLY, (Call(f.VMAP, (Lambda((EACH,), expr),)), cotangent)) if mapped else expr
    legs = (*lead, *(Leg(f"a{k}", size) for k, size in enumerate(shape)))
    kernel, forward = store.works.get(term.of, (Kernel.NATIVE, NO_WORK))
    scaled = replace(forward, flops=_times(forward.flops, lead), moved=_times(forward.moved, lead))
    moved = (*scaled.moved, (1, legs)) if scaled.moved else ((3, legs),)
    work = Work(scaled.flops or ((2, legs),), moved, ((1, legs),))
    call = term.code.call  # another function may return what it is given
    own = bool(call.aten) and row_of(overload(call.aten)).memory is Memory.OWN
    own = own or (bool(call.on) and call.name == "new_zeros")
    return Ref(store.add(expr, sizes_of(legs), kernel, work, own=own), legs, legs)


def _filled(store: Store, code: Vjp, given: dict[str, Expr]) -> Expr:
    """What a native VJP calls."""
    if isinstance(code, Code):
        return fill(store, code, given)
    assert isinstance(code, OperatorVjp)
    return operator_vjp(store, code, given[COTANGENTS if COTANGENTS in code.holes else COTANGENT])


def _times(terms: Terms, lead: tuple[Leg, ...]) -> Terms:
    return tuple((c, (*lead, *legs)) for c, legs in terms)


def shaped(store: Store, ref: Ref, shape: tuple[Size, ...]) -> Expr:
    """A value in its legs' order, with the given shape."""
    now = sizes_of(ref.order)
    expr = in_order(store, ref)
    if ref.order == ref.stored:  # one reshape is enough
        return reshaped(ref.value, ref.value.shape, shape)
    return reshaped(expr, now, shape)


def _extract(
    store: Store, graph: Graph, item: Extraction, chunk: int | None
) -> tuple[dict[Result, Value], Choice | None]:
    """All results of one parameter, with the set of parts that makes them cheapest together."""
    dotted, shape = graph.parameters[item.parameter][0], graph.values[item.parameter].shape
    store.note = f"{dotted}"
    own = accumulated(store, item)
    if item.native is not None:
        choice, refs = chosen(item, dotted, store, partial(_native, term=item.native, shape=shape, lead=()))
    else:
        choice, refs = choose(store, own, dotted, chunk)
        choice = choice if own is item else as_read(store, choice, item)
    values = {}
    for quantity, ref in refs.items():
        store.note = f"{quantity} of {dotted}"
        whole = quantity.factor is None
        sizes = _result_shape(ref.order, shape, item.own) if whole else sizes_of(ref.order)
        dtype = graph.values[item.parameter].dtype if store.several else None
        if own.diagrams[quantity] is not item.diagrams[quantity]:
            dtype = store.accumulate if ref.value.dtype is None else None  # it is made of indices alone
        values[quantity] = _final(store, ref, sizes, dtype)
    return values, choice


def _summed(store: Store, quantity: str, parameter: str, one: Value, other: Value) -> Value:
    if one.shape != other.shape:
        raise UnsupportedError(
            f"{quantity} of parameter {parameter!r} is {list(other.shape)}, of others {list(one.shape)}: no total"
        )
    return added(store, one, other)


def _streams(store: Store, graph: Graph, item: Extraction) -> tuple[dict[Result, Value], None]:
    """Torch code on slices of a parameter's values."""
    values = {}
    for quantity, diagram in item.diagrams.items():
        store.note = f"{quantity} of {graph.parameters[item.parameter][0]}"
        shape = graph.values[item.parameter].shape
        values[quantity] = streamed(store, diagram, item.streams[quantity.quantity], shape).value
    return values, None


def _result_shape(order: tuple[Leg, ...], shape: tuple[Size, ...], own: frozenset[Leg]) -> tuple[Size, ...]:
    """The legs that are copies of the batch (and columns) first, then the parameter's own shape, as often as it is.

    With legs of an operand the parameter's shape stands where its legs do, if those are one after the other.
    """
    if own & set(order):
        mine = [k for k, leg in enumerate(order) if not is_head(leg) and leg not in own]
        first, last = (mine[0], mine[-1] + 1) if mine else (0, 0)
        together = bool(mine) and last - first == len(mine)
        whole = together and _copies(sizes_of(order[first:last]), prod(int(size) for size in shape)) == 1
        return (*sizes_of(order[:first]), *shape, *sizes_of(order[last:])) if whole else sizes_of(order)
    head = tuple(leg.size for leg in order if is_head(leg))
    rest = tuple(leg.size for leg in order if not is_head(leg))
    copies = _copies(rest, prod(int(size) for size in shape))
    return (*head, *(rest if copies is None else shape * copies))


def _copies(sizes: tuple[Size, ...], elements: int) -> int | None:
    """How many runs of legs have as many elements as the parameter; None if the legs are not made of such runs."""
    found, run = 0, 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        run *= size
        if run == elements:
            found, run = found + 1, 1
    return found if run == 1 else None


def _final(store: Store, ref: Ref, shape: tuple[Size, ...], dtype: torch.dtype | None) -> Value:
    """The result; one that is constant along some legs is written out, so that it can be written to."""
    expr = shaped(store, ref, shape)
    if dtype is not None:
        return store.add(Call(f.TO, (expr, dtype)), shape, Kernel.COPY, dtype=dtype)
    if isinstance(expr, Value):
        return expr
    if ref.value.spread is not None:
        expr = Call(f.CONTIGUOUS, (expr,))
    return store.add(expr, shape, Kernel.VIEW, strided=ref.order != ref.stored)
