"""Extract: all quantities of a parameter, once its uses are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ...diagram.algebra import Cotangents, Uses
from ...diagram.core import BATCH, COLUMN, COLUMN_COPY, Diagram, Leg, is_head, leaves
from ...errors import FormulaError, InputError, UnsupportedError
from ...quantities import Propagation, Quantity, Total
from ...quantities.factors import Factors
from ...quantities.stream import Stream
from ..translate.foreign import foreign
from .condense import condensed
from .derived import Extraction, Native, Result
from .state import Sweep, all_uses


def extract(sweep: Sweep, parameters: list[str]) -> None:
    for name in parameters if sweep.quantities else ():
        if not sweep.uses.get(name) and not sweep.pending(name):
            continue
        uses, g = all_uses(sweep, name)
        found = extraction(sweep, name, uses, g)
        sweep.schedule.append(replace(found, condensed=_condensed(sweep, found, uses, g)))


def propagated(sweep: Sweep) -> dict[str, list[Diagram | Native]]:
    """What the cotangents so far are sums of, by their names."""
    return {f"{sweep.prefix}:{value}": each for value, each in sweep.terms.items()}


def _condensed(sweep: Sweep, found: Extraction, uses: Uses, g: Cotangents) -> dict[Result, Diagram]:
    """The same quantities from the cotangents of several columns as they were before a selection scattered them."""
    terms = propagated(sweep) if sweep.several else {}
    before = [condensed(each, terms) for each in g.each]
    if not any(before):
        return {}
    g = replace(g, each=tuple(one or other for one, other in zip(before, g.each, strict=True)))
    mine = [q for q in sweep.quantities if Result(q.name) in found.diagrams]
    alike = {Result(q.name): _asked(sweep, found.parameter, q, uses, g) for q in mine}
    return {name: diagram for name, diagram in alike.items() if isinstance(diagram, Diagram)}


def _asked(sweep: Sweep, name: str, quantity: Quantity, uses: Uses, g: Cotangents) -> object:
    """What a quantity says of a parameter; what it reads besides is noted."""
    readings = sweep.readings.within(quantity.name if quantity.needs else "", uses.legs)
    each = (g if p == quantity.host else _of_other(sweep, name, quantity, p, uses) for p in quantity.propagations)
    extract: Callable[..., object] = quantity.extract
    return extract(replace(uses, readings=readings), *(replace(one, readings=readings) for one in each))


def key_of(propagation: Propagation) -> Propagation:
    """What is equal for propagations that are one sweep, whether or not all columns must be there at once."""
    return replace(propagation, together=False)


def _of_other(sweep: Sweep, name: str, quantity: Quantity, propagation: Propagation, uses: Uses) -> Cotangents:
    """What another sweep propagates to the uses of a parameter. Its columns have the leg of the second ones."""
    sweeps = sweep.others.get(key_of(propagation), [])
    kind = type(propagation).__name__
    if len(sweeps) != 1:
        raise UnsupportedError(
            f"{kind} next to {type(quantity.host).__name__}: {kind} is {len(sweeps) or 'no'} sweeps here, and one is "
            "needed.\n  Put it first in propagates, or ask for two quantities."
        )
    own, g = all_uses(sweeps[0], name)
    if [leg.size for leg in own.legs] != [leg.size for leg in uses.legs]:
        here = type(quantity.host).__name__
        raise UnsupportedError(f"{kind} reads {name!r} with the legs {own.legs}, and {here} with {uses.legs}")
    second = {leg: Leg(COLUMN_COPY, leg.size) for leg in g.kept if leg.name == COLUMN}
    kept = tuple(second.get(leg, leg) for leg in g.kept)
    return replace(g, each=tuple(each.rename(second) for each in g.each), kept=kept, jacobians=own.jacobians)


def extraction(sweep: Sweep, name: str, uses: Uses, g: Cotangents) -> Extraction:
    """All quantities of one parameter."""
    diagrams: dict[Result, Diagram] = {}
    factors: dict[str, Factors] = {}
    streams: dict[str, Stream] = {}
    for quantity in sweep.quantities:
        try:
            with foreign(f"quantity {quantity.name!r}", InputError):
                found: object = _asked(sweep, name, quantity, uses, g)
        except UnsupportedError as error:
            dotted = sweep.graph.parameters[name][0]
            raise UnsupportedError(f"parameter {dotted!r}, quantity {quantity.name!r}: {error}") from None
        if isinstance(found, Factors):
            factors[quantity.name] = found
            diagrams |= {Result(quantity.name, k): diagram for k, diagram in enumerate(found.diagrams)}
            diagrams |= {Result(quantity.name, k, mean=True): m for k, m in enumerate(found.means) if m is not None}
        elif isinstance(found, Stream):
            legs = (BATCH, *uses.legs)
            if set(found.diagram.legs) != set(legs):
                told, wanted = (", ".join(map(str, each)) for each in (found.diagram.legs, legs))
                raise InputError(f"quantity {quantity.name!r}: its stream is of [{told}], and slices are of [{wanted}]")
            diagrams[Result(quantity.name)] = found.diagram.ordered(*(leg.name for leg in legs))
            streams[quantity.name] = found
        elif isinstance(found, Diagram):
            diagrams[Result(quantity.name)] = _in_place(quantity, found)
        else:
            what = f"quantity {quantity.name!r}: extract returns {type(found).__name__}"
            raise InputError(f"{what}: return a tn.Diagram, as (J.T @ g).sum('n') is, tn.Factors or tn.Stream")
    dotted = sweep.graph.parameters.get(name, (name,))[0]
    groups = {q.name: q.group_of(dotted) for q in sweep.quantities if isinstance(q, Total)}
    read = (leg for reading in sweep.readings.found.values() for leg in reading.legs if leg not in reading.own)
    own = frozenset(leg for leg in read if leg not in uses.legs and not is_head(leg))
    native = _kernel(sweep, name, uses, g, diagrams)
    return Extraction(name, diagrams, factors, {}, groups, streams, own=own, carriers=g.names, native=native)


def _in_place(quantity: Quantity, found: Diagram) -> Diagram:
    """What `extract` returns. Raises `InputError` where a leg is there twice, or one of samples not in front."""
    names, head = [leg.name for leg in found.legs], [is_head(leg) for leg in found.legs]
    if len({*names}) < len(names):
        raise InputError(f"quantity {quantity.name!r}: the legs of its result, [{', '.join(names)}], are not different")
    if head != sorted(head, reverse=True):
        front = ", ".join(repr(leg.name) for leg in found.legs if is_head(leg))
        raise InputError(
            f"quantity {quantity.name!r}: the legs of its result are [{', '.join(names)}], and those of samples and "
            f"columns come first: .ordered({front})"
        )
    return found


def _kernel(sweep: Sweep, name: str, uses: Uses, g: Cotangents, diagrams: Mapping[Result, Diagram]) -> Native | None:
    """The native gradient of a parameter that is read once, where nothing else is asked of it.

    What is propagated to the other operand is then from that kernel, too. Raises `FormulaError` where there is nothing
    else, and more is asked.
    """
    joint = sweep.kernels.get(name)
    if joint is None or not diagrams:
        return None
    total = (uses.T @ g).sum(BATCH.name)
    once = [leaves(each) for each in g.each] == [(joint.read,)]
    fits = once and all(diagram == total for diagram in diagrams.values())
    if joint.alone and not fits:
        dotted = sweep.graph.parameters[name][0]
        raise FormulaError(f"only the gradient of {dotted!r} is known where it is read, and more is asked of it.")
    if not fits or joint.operand in sweep.scheduled:
        return None
    if joint.pulled is not None:
        sweep.terms[joint.operand][joint.since :] = [joint.pulled]
    return joint.gradient
