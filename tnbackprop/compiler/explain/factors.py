"""Which Kronecker factors every parameter has, and why one has a diagonal in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from ...quantities.factors import Factors
from ..emit.compiled import Compiled
from ..sweep.derived import Extraction, joined_with
from .text import legs_text, table

HEADER = ("parameter", "shape", "factors", "positions", "a diagonal, because")
ONE_HOT = "one-hot input: all of it"


def factor_lines(compiled: Compiled) -> Iterator[str]:
    """One table for each quantity, parameters in the order of the model."""
    found: dict[str, dict[str, Factors]] = {}
    for item in (item for item in compiled.derived.items if isinstance(item, Extraction)):
        for quantity, factors in item.factors.items():
            found.setdefault(quantity, {})[item.parameter] = factors
    for quantity, by in found.items():
        rows: list[tuple[str, ...]] = [HEADER]
        for value in (value for value in compiled.graph.parameters if value in by):
            factors, shape = by[value], compiled.graph.values[value].axes_text
            rows.append((compiled.graph.parameters[value][0], shape, *_row(factors)))
        yield f"{quantity}:"
        yield from table(rows, "  ")
        named = {dotted: by[value] for value, (dotted, *_) in compiled.graph.parameters.items() if value in by}
        yield from _joined(named)


def _joined(factors: Mapping[str, Factors]) -> Iterator[str]:
    """Which weights have a bias in their block, and what has a block of its own, where they were to be joined."""
    joined = joined_with(factors)
    asked = [name for name, each in factors.items() if each.means]
    alone = [name for name in asked if name not in joined and name not in joined.values()]
    if joined:
        yield "  joined: " + ", ".join(f"{weight} with {bias}" for weight, bias in joined.items())
    yield from (f"  not joined: {name}, {not_joined(factors[name])}" for name in alone)


def not_joined(factors: Factors) -> str:
    """Why no bias is in a weight's block, or a bias in none of a weight, where they were to be joined."""
    if factors.means == (None,):
        return "no weight has its factor B"
    if factors.blocks:
        return "it has a block for each group"
    if len(factors.means) != 2 or any(factors.diagonal):
        return "its factors are not B and A, both whole"
    return "no bias has its factor B"


def _row(factors: Factors) -> tuple[str, str, str]:
    """Its factors with their legs and sizes, what is made of positions, and why a factor is a diagonal."""
    parts, reasons = [], []
    for k, legs in enumerate(factors.legs):
        size = prod(int(leg.size) for leg in legs)
        flat, rows = factors.diagonal[k], factors.rows[k]
        what = "diagonal" if flat else f"blocks of {rows}×{rows} in" if rows else "full"
        parts.append(f"{what} [{legs_text(legs)}] {size}×{size}")
        why = factors.dropped[k] if flat else ""
        reasons += [why] if why else [f"[{legs_text(legs)}] {ONE_HOT}"] if flat and factors.leads else []
    blocks = prod(int(leg.size) for leg in factors.blocks)
    lead = f"{blocks} blocks [{legs_text(factors.blocks)}] of " if factors.blocks else ""
    return lead + " ⊗ ".join(parts), factors.sharing.value, "; ".join(reasons)
