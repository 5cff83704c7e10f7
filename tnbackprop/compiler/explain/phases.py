"""What quantities read besides the sweeps, and what is computed between phases, as text."""

from __future__ import annotations

from collections.abc import Iterator

from ...diagram.core import Size, hint_of
from ..emit.compiled import Compiled
from ..program.inputs import parameter_shapes
from ..sweep.derived import Extraction, Phase, Result, Schedule
from ..sweep.roots import LossRoot
from ..translate.graph import op_text
from .text import body_text, legs_text, shortened

WIDTH = 144
"""Of the formula of a Hessian."""


def hessian_lines(compiled: Compiled, schedule: Schedule) -> Iterator[str]:
    """The diagonal Hessian of the loss, where the columns of this sweep are of its root."""
    for columns in compiled.derived.columns:
        start = columns.start
        if columns.schedule is schedule and isinstance(start, LossRoot) and start.curvature is not None:
            legs, formula = legs_text(start.curvature.legs), body_text(start.curvature, {})
            left = f"the block of [{legs}] in ∂²loss/∂{hint_of(start.value)}²" if start.blocks else ""
            left = f"{left}: its factor" if left else f"∂²loss/∂{hint_of(start.value)}[{legs}]²"
            yield shortened(f"  {left} = {formula}", WIDTH)


def operand_lines(compiled: Compiled) -> Iterator[str]:
    """The operands that are handed in at the call, each with its axes."""
    parameters = parameter_shapes(compiled.graph)
    for name, reading in compiled.derived.handed.items():
        shape = ", ".join(map(str, reading.shape(parameters.get(reading.parameter, ()))))
        whose = f" of {reading.parameter}" if reading.parameter else ""
        yield f"{hint_of(name)}: operands[{reading.key!r}]{whose}, [{shape}]"


def phase_lines(compiled: Compiled) -> Iterator[str]:
    """What is computed of totals before the next quantities are extracted."""
    derived = compiled.derived
    for phase in derived.phases:
        yield f"then, for {phase.quantity}:"
        for name, (result, group) in phase.totals.items():
            yield f"  {hint_of(name)} = sum over parameters ({group}) of {result.quantity}"
        for call in phase.calls:
            operands = ", ".join(hint_of(value.name) for value in call.tensors.values())
            yield f"  {hint_of(call.output.name)} = {op_text(call.target)}({operands})"
        for name, value in phase.outcome.items():
            yield f"  {hint_of(name)} = {hint_of(value)}"


def in_short(compiled: Compiled, phase: Phase) -> tuple[list[str], list[str]]:
    """The totals that a phase reads, and the operands that it makes: each once, with its shape."""
    derived, totals, outcome = compiled.derived, {}, {}
    for result, _ in phase.totals.values():
        totals[result] = f"{result.quantity.removeprefix(f'{phase.quantity}: ')} {_shown(_sizes(compiled, result))}"
    for name in phase.outcome:
        reading = derived.readings[name]
        outcome[reading.key] = f"{reading.key} {_shown(reading.sizes)}{' of each parameter' * bool(reading.parameter)}"
    return list(totals.values()), list(outcome.values())


def _sizes(compiled: Compiled, result: Result) -> tuple[Size, ...]:
    """Of a total: the first parameter's, as all of them have the same."""
    items = (item for item in compiled.derived.items if isinstance(item, Extraction) and result in item.diagrams)
    return tuple(leg.size for leg in next(items).diagrams[result].legs)


def _shown(sizes: tuple[Size, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
