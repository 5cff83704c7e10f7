"""An op without a rule: VJPs by torch.func, per sample, and named in the report.

The op must treat samples apart. That is tried out on random tensors: changing one sample must not change the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..bind import BoundRule, Equation
from ..diagram import BATCH, Leg, N
from ..errors import UnsupportedError
from .cost import size_at
from .forward import call_code
from .graph import Call, Value


def fallback(call: Call) -> BoundRule:
    """A rule without a formula. Raises `UnsupportedError` where the op mixes samples or keeps the batch elsewhere."""
    values = tuple(v for v in call.tensors.values())
    for value in (*values, call.output):
        batched = [k for k, axis in enumerate(value.axes) if N in axis]
        if batched not in ([], [0]) or (batched and len(value.axes[0]) > 1):
            raise _refused(call, f"'{value.name}' has the batch elsewhere than on axis 0")
        if value.differentiable and batched and not _sampled(call.output):
            raise _refused(call, f"it reduces over the samples of '{value.name}'")
    _try_apart(call)
    legs = tuple(BATCH if N in axis else Leg(f"a{k}", _int(axis)) for k, axis in enumerate(call.output.axes))
    code = {v.name: _vjp(call, v) for v in values if v.differentiable}
    equation = Equation(call.output.name, legs, None, MappingProxyType({}))
    return BoundRule((equation,), (), "", MappingProxyType(code), "", MappingProxyType({}), fallback=call.where)


def _int(axis: tuple[Any, ...]) -> int:
    total = 1
    for size in axis:
        total *= int(size)
    return total


def _refused(call: Call, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{call.where} has no rule, and torch.func cannot stand in: {why}.\n  Declare one: README, 'Add a layer'."
    )


def _vjp(call: Call, operand: Value) -> str:
    """Torch code of the VJP with respect to one operand: [N, *operand], one sample at a time."""
    batched = [v for v in dict.fromkeys(call.tensors.values()) if v.axes and N in v.axes[0]]
    own_rows = {v.name for v in batched}
    single = call_code(_one_sample(call), lambda name: f"{name}_n" if name in own_rows else "{" + name + "}")
    for value in batched:
        single = single.replace(f"{value.name}_n", f"{value.name}_n.unsqueeze(0)")
    own = f"{operand.name}_n" if operand in batched else "{" + operand.name + "}"
    function = single.replace(f"{own}.unsqueeze(0)", "u.unsqueeze(0)").replace(own, "u")
    head = "g" if not _sampled(call.output) else "g.unsqueeze(0)"
    names = ", ".join([*(f"{v.name}_n" for v in batched), "g"])
    stacked = ", ".join([*("{" + v.name + "}" for v in batched), "{cotangent}"])
    return f"torch.func.vmap(lambda {names}: torch.func.vjp(lambda u: {function}, {own})[1]({head})[0])({stacked})"


def _sampled(value: Value) -> bool:
    return bool(value.axes) and N in value.axes[0]


def _one_sample(call: Call) -> Call:
    def at_one(argument: Any) -> Any:
        return argument if isinstance(argument, Value) or not hasattr(argument, "subs") else size_at(argument, 1)

    arguments = {name: pytree.tree_map(at_one, a) for name, a in call.arguments.items()}
    return Call(call.target, MappingProxyType(arguments), call.output, call.path, call.module_type, call.module)


def _try_apart(call: Call) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(value: Value) -> torch.Tensor:
        shape = [size_at(size, 3) for size in value.shape]
        if value.dtype.is_floating_point:
            return torch.rand(shape, generator=generator, dtype=torch.float64).to(value.dtype)
        return torch.zeros(shape, dtype=value.dtype)

    inputs = {v.name: draw(v) for v in call.tensors.values()}
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

    names = {a.name: "input" if a.name == "self" else a.name for a in call.target._schema.arguments}
    filled = {own: pytree.tree_map(value, call.arguments[name]) for own, name in names.items()}
    args = [filled.pop(a.name) for a in call.target._schema.arguments if not a.kwarg_only]
    result: torch.Tensor = call.target(*args, **filled)
    return result
