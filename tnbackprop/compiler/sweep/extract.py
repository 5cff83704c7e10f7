"""Extract: all quantities of a parameter, once its uses are known."""

from __future__ import annotations

from dataclasses import replace

from ...diagram.algebra import Cotangents, Uses
from ...diagram.core import Diagram
from ...errors import InputError, UnsupportedError
from ...quantities import Quantity, Total
from ...quantities.factors import Factors
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
    alike = {Result(q.name): _asked(sweep, q, uses, g) for q in mine}
    return {name: diagram for name, diagram in alike.items() if isinstance(diagram, Diagram)}


def _asked(sweep: Sweep, quantity: Quantity, uses: Uses, g: Cotangents) -> object:
    """What a quantity says of a parameter; what it reads besides is noted."""
    readings = sweep.readings.within(quantity.name if quantity.needs else "")
    return quantity.extract(replace(uses, readings=readings), replace(g, readings=readings))


def extraction(sweep: Sweep, name: str, uses: Uses, g: Cotangents) -> Extraction:
    """All quantities of one parameter."""
    diagrams: dict[Result, Diagram] = {}
    factors: dict[str, Factors] = {}
    for quantity in sweep.quantities:
        try:
            with foreign(f"quantity {quantity.name!r}", InputError):
                found: object = _asked(sweep, quantity, uses, g)
        except UnsupportedError as error:
            dotted = sweep.graph.parameters[name][0]
            raise UnsupportedError(f"parameter {dotted!r}, quantity {quantity.name!r}: {error}") from None
        if isinstance(found, Factors):
            factors[quantity.name] = found
            diagrams |= {Result(quantity.name, k): diagram for k, diagram in enumerate(found.diagrams)}
            diagrams |= {Result(quantity.name, k, mean=True): m for k, m in enumerate(found.means) if m is not None}
        elif isinstance(found, Diagram):
            diagrams[Result(quantity.name)] = found
        else:
            what = f"quantity {quantity.name!r}: extract returns {type(found).__name__}"
            raise InputError(f"{what}: return a tn.Diagram, as (J.T @ g).sum('n') is, or tn.Factors")
    dotted = sweep.graph.parameters.get(name, (name,))[0]
    groups = {q.name: q.group_of(dotted) for q in sweep.quantities if isinstance(q, Total)}
    return Extraction(name, diagrams, factors, groups=groups)
