"""Items: what the items of a sweep (cotangents, individual VJPs, all quantities of a parameter) become as steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

from ..diagram import Leg, N, Size, is_head
from .arrange import arranged, sizes_of, text
from .choose import Choice, choose
from .contract import Lowering, build
from .cost import Kernel, Terms, Work
from .derived import Backward, Extraction, Individual, Native, Schedule
from .fallback import LOOP, ONE_BY_ONE
from .forward import fill, vjp_written_over
from .graph import Graph
from .pairs import written_over
from .store import NO_WORK, Ref, Store


def scheduled(
    store: Store,
    graph: Graph,
    schedule: Schedule,
    lowerings: tuple[Lowering, ...],
    chunk: int | None,
    choices: list[Choice],
    lead: tuple[Leg, ...] = (),
) -> dict[str, dict[str, str]]:
    """Every item of a sweep; quantity -> parameter name -> value."""
    results: dict[str, dict[str, str]] = {}
    for item in schedule:
        if isinstance(item, Backward):
            backward(store, graph, item, lowerings, lead)
        elif isinstance(item, Individual):
            ref = _native(store, item.native, (N, *graph.values[item.of].shape), lead)
            named(store, ref, item.name)
        else:
            codes, choice = _extract(store, graph, item, lowerings, chunk)
            choices.append(choice)
            for quantity, code in codes.items():
                results.setdefault(quantity, {})[graph.parameters[item.parameter][0]] = code
    return results


def named(store: Store, ref: Ref, name: str) -> None:
    """Call a built value `name`; a value in another memory order is read through a permuted view."""
    if ref.order == ref.stored:
        store.alias[name] = store.resolve(ref.name)
    else:
        code = arranged(store, ref, tuple((leg,) for leg in ref.order))
        store.add(code, sizes_of(ref.order), Kernel.VIEW, name=name, strided=True)
        store.views[name] = ref


def backward(
    store: Store, graph: Graph, item: Backward, lowerings: tuple[Lowering, ...], lead: tuple[Leg, ...]
) -> None:
    """One cotangent: the sum of what its users send, each by native code or by its diagram."""
    what = f"cotangent of {item.value}" if item.value else "averaged matrix"
    store.note = what + (f", {item.note}" if item.note else "")
    shape = graph.values[item.value].shape if item.value in graph.values else None
    refs = []
    for term in item.terms:
        if isinstance(term, Native):
            refs.append(_native(store, term, shape, lead))
        else:
            ways = [term] if item.condensed is None else [term, item.condensed]
            refs.append(store.cheapest([partial(build, diagram=way, lowerings=lowerings) for way in ways]))
    if len(refs) == 1:
        named(store, refs[0], item.name)
        return
    shape = (*sizes_of(lead), *shape) if shape is not None else sizes_of(refs[0].order)
    codes = [shaped(store, ref, shape) for ref in refs]
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(shape))
    work = Work(flops=((len(refs) - 1, legs),), moved=((len(refs) + 1, legs),), fresh=((1, legs),))
    in_order = [Ref(ref.name, legs, legs) if ref.order == ref.stored else None for ref in refs]
    into = written_over(store, in_order, codes, legs, "add_")
    store.add(" + ".join(codes), shape, Kernel.ELEMENTWISE, work, name=item.name, own=True, into=into)


def _native(store: Store, term: Native, shape: tuple[Size, ...] | None, lead: tuple[Leg, ...]) -> Ref:
    """Native code; over the columns that ride together by vmap, unless it takes them itself."""
    assert shape is not None
    cotangent = store.resolve(term.cotangent)
    out = store.shapes[store.resolve(term.of)]
    if not any(N in factor.free_symbols for factor in out if not isinstance(factor, int)):
        out = (N, *out)  # a value of parameters: one cotangent per sample
    out = (*sizes_of(lead), *out)
    shown = cotangent if store.shapes[cotangent] == out else f"{cotangent}.reshape({text(out)})"
    together = "{cotangents}" in term.code
    if together and shown != cotangent:
        shown = store.add(shown, out, Kernel.VIEW)
    mapped = bool(lead) and not together
    filled = term.code.replace("{cotangents}", shown).replace("{cotangent}", "each" if mapped else shown)
    code = fill(filled, store.resolve)
    code = f"torch.func.vmap(lambda each: {code})({shown})" if mapped else code
    if term.code.startswith(f"{LOOP}("):
        store.functions[LOOP] = ONE_BY_ONE
    legs = (*lead, *(Leg(f"a{k}", size) for k, size in enumerate(shape)))
    kernel, forward = store.works.get(term.of, (Kernel.NATIVE, NO_WORK))
    scaled = replace(forward, flops=_times(forward.flops, lead), moved=_times(forward.moved, lead))
    moved = (*scaled.moved, (1, legs)) if scaled.moved else ((3, legs),)
    work = Work(scaled.flops or ((2, legs),), moved, ((1, legs),))
    own = term.code.startswith("torch.ops.aten.") and "_backward(" in term.code  # others may return what they are given
    own = own or term.code.startswith("{cotangents}.new_zeros(")
    name = store.add(code, sizes_of(legs), kernel, work, own=own, into=vjp_written_over(code, shown))
    return Ref(name, legs, legs)


def _times(terms: Terms, lead: tuple[Leg, ...]) -> Terms:
    return tuple((c, (*lead, *legs)) for c, legs in terms)


def shaped(store: Store, ref: Ref, shape: tuple[Size, ...]) -> str:
    """Code for a value in its legs' order, with the given shape."""
    now = sizes_of(ref.order)
    code = arranged(store, ref, tuple((leg,) for leg in ref.order))
    if code == store.resolve(ref.name):
        now = store.shapes[code]
    if now == shape:
        return code
    if ref.order == ref.stored:  # one reshape is enough
        name = store.resolve(ref.name)
        return name if store.shapes[name] == shape else f"{name}.reshape({text(shape) or '()'})"
    return f"{code}.reshape({text(shape) or '()'})"


def _extract(
    store: Store, graph: Graph, item: Extraction, lowerings: tuple[Lowering, ...], chunk: int | None
) -> tuple[dict[str, str], Choice]:
    """All results of one parameter, with the set of parts that makes them cheapest together."""
    dotted = graph.parameters[item.parameter][0]
    store.note = f"{dotted}"
    choice, refs = choose(store, item, dotted, lowerings, chunk)
    codes = {}
    for quantity, ref in refs.items():
        store.note = f"{quantity} of {dotted}"
        whole = "#" not in quantity
        shape = _result_shape(ref.order, graph.values[item.parameter].shape) if whole else sizes_of(ref.order)
        codes[quantity] = _final(store, shaped(store, ref, shape), shape, ref)
    return codes, choice


def _result_shape(order: tuple[Leg, ...], shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The legs that are copies of the batch (and columns) first, then the parameter's own shape, as often as it is."""
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


def _final(store: Store, code: str, shape: tuple[Size, ...], ref: Ref) -> str:
    """A name for the result, so that no two results share memory with each other or with an input by accident."""
    if code == store.resolve(ref.name):
        return code
    if any(step.name == store.resolve(ref.name) and ".expand(" in step.code for step in store.steps):
        code += ".contiguous()"  # a constant result must be one that can be written to
    return store.add(code, shape, Kernel.VIEW, strided=ref.order != ref.stored)
