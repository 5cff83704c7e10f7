"""What quantities read besides the model: operands and phases, as nodes of the picture of a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..compiler import Compiled
from ..compiler.explain.phases import in_short
from ..compiler.sweep.derived import Extraction
from ..diagram.core import leaves
from ..diagram.reading import Reading
from .scene import Kind

Key = tuple[str, str]
"""What a node is, and its name."""
OPERAND, BETWEEN, QUANTITY = "operand", "between", "quantity"
MODEL = ("the model", "")
Reads = tuple[tuple[Key, str], ...]
"""Nodes that another one reads, each with what goes there."""


@dataclass(frozen=True)
class Node:
    """A box with its lines of text, and what it reads."""

    key: Key
    kind: Kind
    lines: tuple[str, ...]
    reads: Reads = ()


def nodes(compiled: Compiled) -> list[Node]:
    """Operands, then phases in their order, then the quantities that read them."""
    derived = compiled.derived
    handed = {reading.key: reading for reading in derived.handed.values()}
    found = [Node((OPERAND, key), Kind.VALUE, (key, _whose(each))) for key, each in handed.items()]
    read = _read(compiled)
    for phase in derived.phases:
        totals, outcome = in_short(compiled, phase)
        own = dict.fromkeys(result.quantity for result, _ in phase.totals.values())
        before = tuple(dict.fromkeys(each for quantity in own for each in read.get(quantity, ())))
        says = (*(f"Σ {each}" for each in totals), *(f"→ {each}" for each in outcome))
        lines = (f"between, for {phase.quantity}", *says)
        found.append(Node((BETWEEN, phase.quantity), Kind.PHASE, lines, _with_model(before)))
    asked = {quantity: each for quantity, each in read.items() if quantity not in derived.hidden}
    return [*found, *(Node((QUANTITY, key), Kind.VALUE, (key,), _with_model(each)) for key, each in asked.items())]


def _whose(reading: Reading) -> str:
    return "of each parameter" if reading.parameter else f"[{', '.join(map(str, reading.sizes))}]"


def _with_model(reads: Reads) -> Reads:
    """What reads no phase comes right from the model."""
    return reads if any(what == BETWEEN for (what, _), _ in reads) else ((MODEL, ""), *reads)


def _read(compiled: Compiled) -> dict[str, Reads]:
    """Quantity -> the nodes that it reads."""
    found: dict[str, dict[tuple[Key, str], None]] = {}
    for quantity, name in _leaves(compiled):
        reading = compiled.derived.readings[name]
        node = ((BETWEEN, reading.of), reading.key) if reading.of else ((OPERAND, reading.key), "")
        found.setdefault(quantity, {})[node] = None
    return {quantity: tuple(each) for quantity, each in found.items()}


def _leaves(compiled: Compiled) -> Iterator[tuple[str, str]]:
    """(Quantity, the operand that a diagram of it reads)."""
    for item in compiled.derived.items:
        if isinstance(item, Extraction):
            for result, diagram in item.diagrams.items():
                yield from ((result.quantity, name) for name in leaves(diagram) if name in compiled.derived.readings)
