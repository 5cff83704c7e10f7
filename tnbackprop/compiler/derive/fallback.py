"""An op without a rule: VJPs by torch.func, per sample, and named in the report.

The op must not mix samples, and `torch.func.vmap` over its VJP must give what single calls give: both are tried on
samples of the example (`capture/trial.py`). Where vmap does not, the program has a loop. An op with several outputs is
called for each output that is used: the VJP of all is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ...diagram.core import BATCH, Leg, N
from ...errors import UnsupportedError
from ...notation.bind import COTANGENT, COTANGENTS, BoundRule, Equation
from ...notation.code import Call as FirstCall
from ...notation.code import Code
from ..capture.trial import Trial, batched, maps, one_sample, place_of, refuse_mixing, sampled
from ..translate.graph import Call, Value, op_text


@dataclass(frozen=True)
class OperatorVjp:
    """The VJP of an operator with respect to one operand by torch.func: [N, *operand], one sample at a time.

    call    for one sample
    looped  in a loop over samples and columns: torch.func.vmap would be wrong
    """

    operation: Call
    operand: Value
    looped: bool

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
        return tuple(dict.fromkeys((*others, COTANGENTS if self.looped else COTANGENT)))

    @property
    def call(self) -> FirstCall:
        """It is no call that is known to write anywhere."""
        return FirstCall()

    def filled(self, text: Callable[[str], str]) -> str:
        """For people."""
        way = "each sample" if self.looped else "vmap"
        return f"vjp({op_text(self.operation.target)}, {text(self.operand.name)})({text(COTANGENT)}) by {way}"


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
    looped = frozenset(v.name for v in operands if not maps(call, v, tensors, refused))
    if looped and any(place_of(v) for v in (*values, call.output)):
        raise _refused(call, "it takes a loop over samples, which are not in front")
    code = {v.name: OperatorVjp(one_sample(call), v, v.name in looped) for v in operands}
    equation = Equation(call.output.name, legs, None, MappingProxyType({}))
    own = BoundRule((equation,), (), Code(), MappingProxyType(code), "", MappingProxyType({}))
    return replace(own, fallback=call.where, looped=looped)


def _int(axis: tuple[Any, ...]) -> int:
    total = 1
    for size in axis:
        total *= int(size)
    return total


def _refused(call: Call, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{call.where} has no rule, and torch.func cannot stand in: {why}.\n  Declare one: docs/add-a-layer.md."
    )
