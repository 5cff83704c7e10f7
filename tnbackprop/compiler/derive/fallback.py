"""An op without a rule: VJPs by torch.func, and named in the report.

The op must not mix samples. The VJP of the batch, or else `torch.func.vmap` over that of one sample, must give what
single calls give: all is tried on samples of the example (`derive/trial.py`). Where neither does, the program has a
loop. An op with several outputs is called for each output that is used: the VJP of all is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ...diagram.core import BATCH, Leg, N
from ...errors import UnsupportedError
from ...notation.bind import COTANGENT, COTANGENTS, BoundRule, Equation
from ...notation.code import Call as FirstCall
from ...notation.code import Code, Native, Nth
from ..translate.graph import Call, Value, op_text
from .trial import Trial, Way, Ways, batched, one_sample, place_of, refuse_mixing, sampled, ways_of


@dataclass(frozen=True)
class OperatorVjp:
    """The VJP of an operator by operands, by torch.func.

    WHOLE: a tuple of what the batch's is, by each of them; else of one operand, one sample at a time: [N, *operand].
    """

    operation: Call
    operands: tuple[Value, ...]
    way: Way

    @property
    def operand(self) -> Value:
        """The only one."""
        (own,) = self.operands
        return own

    @property
    def batched(self) -> list[Value]:
        """The operands that differ from sample to sample."""
        return batched(self.operation)

    @property
    def sampled(self) -> bool:
        """Whether the output does."""
        return sampled(self.operation.output)

    @property
    def places(self) -> tuple[int, ...]:
        """The axes of the samples in what it reads, in the cotangent, and in what it gives."""
        own = place_of(self.operand) if sampled(self.operand) else 0
        return *map(place_of, self.batched), place_of(self.operation.output), own

    @property
    def axes(self) -> int:
        """Of the cotangent of all samples."""
        return len(self.operation.output.axes) + (not self.sampled)

    @property
    def holes(self) -> tuple[str, ...]:
        """What it reads."""
        others = (value.name for value in self.operation.tensors.values())
        return tuple(dict.fromkeys((*others, COTANGENTS if self.way is Way.LOOPED else COTANGENT)))

    @property
    def call(self) -> FirstCall:
        """It is no call that is known to write anywhere."""
        return FirstCall()

    def filled(self, text: Callable[[str], str]) -> str:
        """For people."""
        own = ", ".join(text(value.name) for value in self.operands)
        return f"vjp({op_text(self.operation.target)}, {own})({text(COTANGENT)}), {self.way.value}"


def fallback(call: Call, trial: Trial) -> BoundRule:
    """A rule without a formula. Raises `UnsupportedError` where the op mixes samples, or has them inside an axis."""
    values = tuple(v for v in call.tensors.values())
    for value in (*values, call.output):
        if sampled(value) and len(value.axes[place_of(value)]) > 1:
            raise _refused(call, f"{value} has the batch inside of an axis")
        if value.differentiable and sampled(value) and not sampled(call.output):
            raise _refused(call, f"it reduces over the samples of '{value.name}'")
    tensors = trial.operands(call)
    refused = partial(_refused, call)
    refuse_mixing(call, tensors, refused)
    legs = tuple(BATCH if N in axis else Leg(f"a{k}", _int(axis)) for k, axis in enumerate(call.output.axes))
    operands = tuple(v for v in dict.fromkeys(values) if v.differentiable)
    ways = {v: ways_of(call, v, tensors, refused) for v in operands}
    looped = frozenset(v.name for v, found in ways.items() if found.each is Way.LOOPED)
    if looped and any(place_of(v) for v in (*values, call.output)):
        raise _refused(call, "it takes a loop over samples, which are not in front")
    each = {v.name: _each(call, v, found.each) for v, found in ways.items()}
    equation = Equation(call.output.name, legs, None, MappingProxyType({}))
    own = BoundRule((equation,), (), Code(), MappingProxyType(each), "", MappingProxyType({}))
    return replace(own, fallback=call.where, looped=looped, backward=_together(call, ways))


def _each(call: Call, operand: Value, way: Way) -> Native:
    """The VJP by one operand, of each sample."""
    if way is Way.WHOLE:
        return Nth(OperatorVjp(call, (operand,), way), 0)
    return OperatorVjp(one_sample(call), (operand,), way)


def _together(call: Call, ways: Mapping[Value, Ways]) -> Mapping[str, Native]:
    """One VJP of the batch for what has samples, and the sums over them for what has none, where it gives them."""
    own = tuple(v for v, found in ways.items() if found.each is Way.WHOLE or found.total)
    every = OperatorVjp(call, own, Way.WHOLE)
    return {v.name: Nth(every, k) for k, v in enumerate(own)} if any(ways[v].total for v in own) else {}


def _int(axis: tuple[Any, ...]) -> int:
    total = 1
    for size in axis:
        total *= int(size)
    return total


def _refused(call: Call, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{call.where} has no rule, and torch.func cannot stand in: {why}.\n  Declare one: docs/add-a-layer.md."
    )
