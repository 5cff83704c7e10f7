"""An op without a rule: VJPs by torch.func, per sample, and named in the report.

The op must not mix samples. That is tried out on random tensors: changing one sample must not change the others.
There, too, `torch.func.vmap` over its VJP is compared with one call for each sample and column: for some ops torch
knows no such derivative, or a wrong one (`cdist`), and for those the program has a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...diagram.core import BATCH, Leg, N
from ...errors import UnsupportedError
from ...notation.bind import COTANGENT, COTANGENTS, BoundRule, Equation
from ...notation.code import Call as FirstCall
from ...notation.code import Code
from ..program.cost import size_at
from ..translate.graph import Call, Value, op_text
from ..translate.torch_internals import arguments_of


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
        return _batched(self.operation)

    @property
    def sampled(self) -> bool:
        """Whether the output does."""
        return _sampled(self.operation.output)

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


def fallback(call: Call) -> BoundRule:
    """A rule without a formula. Raises `UnsupportedError` where the op mixes samples or keeps the batch elsewhere."""
    values = tuple(v for v in call.tensors.values())
    for value in (*values, call.output):
        batched = [k for k, axis in enumerate(value.axes) if N in axis]
        if batched not in ([], [0]) or (batched and len(value.axes[0]) > 1):
            raise _refused(call, f"'{value.name}' has the batch elsewhere than on axis 0")
        if value.differentiable and batched and not _sampled(call.output):
            raise _refused(call, f"it reduces over the samples of '{value.name}'")
    _try_separate(call)
    legs = tuple(BATCH if N in axis else Leg(f"a{k}", _int(axis)) for k, axis in enumerate(call.output.axes))
    operands = tuple(v for v in dict.fromkeys(values) if v.differentiable)
    looped = frozenset(v.name for v in operands if not _maps(call, v))
    code = {v.name: OperatorVjp(_one_sample(call), v, v.name in looped) for v in operands}
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
        f"{call.where} has no rule, and torch.func cannot stand in: {why}.\n  Declare one: README, 'Add a layer'."
    )


def _batched(call: Call) -> list[Value]:
    """The operands with a sample's own value, each once."""
    return [v for v in dict.fromkeys(call.tensors.values()) if _sampled(v)]


def _maps(call: Call, operand: Value) -> bool:
    """Whether vmap over samples and columns gives what single VJPs give, on random tensors."""
    batched, inputs = _batched(call), _drawn(call)
    one, generator = _one_sample(call), torch.Generator().manual_seed(1)
    sampled = _sampled(call.output)
    shape = [3, 3, *(size_at(size, 3) for size in call.output.shape[sampled:])]
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64).to(call.output.dtype)

    def vjp(cotangent: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        own = inputs | {v.name: row.unsqueeze(0) for v, row in zip(batched, rows, strict=True)}
        back = torch.func.vjp(lambda u: _run(one, own | {operand.name: u}), own[operand.name])[1]
        found: torch.Tensor = back(cotangent.unsqueeze(0) if sampled else cotangent)[0]
        return found

    rows = [inputs[v.name] for v in batched]
    single = [torch.stack([vjp(*each) for each in zip(column, *rows, strict=True)]) for column in cotangents]
    try:
        over_samples = torch.func.vmap(vjp, (0, *(0 for _ in rows)))
        mapped = torch.func.vmap(over_samples, (0, *(None for _ in rows)))(cotangents, *rows)
    except RuntimeError:  # an op that vmap does not know, or draws numbers
        return False
    want = torch.stack(single)
    bound = torch.finfo(want.dtype).eps ** 0.5 * want.abs().nan_to_num(0).amax()
    return torch.allclose(mapped, want, rtol=0, atol=float(bound), equal_nan=True)


def _sampled(value: Value) -> bool:
    return bool(value.axes) and N in value.axes[0]


def _one_sample(call: Call) -> Call:
    def at_one(argument: Any) -> Any:
        return argument if isinstance(argument, Value) or not hasattr(argument, "subs") else size_at(argument, 1)

    arguments = {name: pytree.tree_map(at_one, a) for name, a in call.arguments.items()}
    return Call(call.target, MappingProxyType(arguments), call.output, call.path, call.module_type, call.module)


def _drawn(call: Call) -> dict[str, torch.Tensor]:
    """Random operands for three samples."""
    generator = torch.Generator().manual_seed(0)

    def draw(value: Value) -> torch.Tensor:
        shape = [size_at(size, 3) for size in value.shape]
        if value.dtype.is_floating_point:
            return torch.rand(shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return torch.zeros(shape, dtype=value.dtype)

    return {v.name: draw(v) for v in call.tensors.values()}


def _try_separate(call: Call) -> None:
    inputs = _drawn(call)
    sampled = {v.name for v in call.tensors.values() if _sampled(v)}
    if not sampled or not _sampled(call.output):
        return
    changed = {
        name: torch.cat([(value[:1] * 0.5).to(value), value[1:]]) if name in sampled else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        before, after = (_run(call, tensors) for tensors in (inputs, changed))
    if not torch.equal(before[1:], after[1:]):
        raise _refused(call, "its output for one sample depends on another (it mixes samples)")
    floating = {name: tensor for name, tensor in inputs.items() if tensor.is_floating_point()}
    try:
        torch.func.vjp(lambda own: _run(call, inputs | own), floating)
    except (RuntimeError, NotImplementedError) as error:
        raise _refused(call, "it knows no derivative of it") from error


def _run(call: Call, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    def value(argument: Any) -> Any:
        if isinstance(argument, Value):
            return tensors[argument.name]
        return size_at(argument, 3) if hasattr(argument, "subs") else argument

    names = {a.name: "input" if a.name == "self" else a.name for a in arguments_of(call.target)}
    filled = {own: pytree.tree_map(value, call.arguments[name]) for own, name in names.items()}
    args = [filled.pop(a.name) for a in arguments_of(call.target) if not a.kwarg_only]
    result: torch.Tensor = call.target(*args, **filled)
    return result
