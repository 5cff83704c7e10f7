"""The forward: the model's own calls as source text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy
import torch

from ..bind import BoundRule
from ..diagram import Selection, Tensor, Window
from .cost import Kernel, Work
from .graph import Call, Value
from .torch_internals import OpOverload

aten = torch.ops.aten
FRESH = frozenset(
    {getattr(aten, f"conv{rank}d").default for rank in (1, 2, 3)}
    | {getattr(aten, f"conv{rank}d").padding for rank in (1, 2, 3)}
    | {aten.linear.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.matmul.default}
    | {aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default}
    | {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.relu.default}
)
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


def call_code(call: Call, resolve: Callable[[str], str]) -> str:
    """The call of an operator with every argument, as Python."""
    arguments = call.target._schema.arguments
    shown: list[str] = []
    for argument in arguments:
        name = "input" if argument.name == "self" else argument.name
        value = call.arguments[name]
        if argument.has_default_value() and _same(value, argument.default_value):
            continue
        keyword = argument.kwarg_only or (shown and "=" in shown[-1]) or len(shown) < arguments.index(argument)
        shown.append(f"{argument.name}={literal(value, resolve)}" if keyword else literal(value, resolve))
    return f"torch.ops.{call.target!s}({', '.join(shown)})"


def is_fresh(call: Call) -> bool:
    """Whether the operator's result lies in memory of its own, whatever it is given."""
    return call.target in FRESH


def call_written_over(call: Call, resolve: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
    """The operand that an elementwise operator can write its result over, and the code that does so."""
    target = call.target
    if not isinstance(target, OpOverload) or list(call.tensors) != ["input"]:
        return ()
    value = call.tensors["input"]
    views = any(returned.alias_info is not None for returned in target._schema.returns)
    name, overload = target._schema.name.removeprefix("aten::"), target._overloadname
    there = overload in getattr(getattr(aten, f"{name}_", None), "overloads", list)()
    if views or not there or (value.shape, value.dtype) != (call.output.shape, call.output.dtype):
        return ()
    plain = f"torch.ops.{target!s}("
    return ((resolve(value.name), call_code(call, resolve).replace(plain, f"torch.ops.aten.{name}_.{overload}(", 1)),)


def vjp_written_over(code: str, cotangent: str) -> tuple[tuple[str, str], ...]:
    """A native VJP of an elementwise operator over the cotangent that it reads."""
    match = _BACKWARD.fullmatch(code)
    if match is None or match[1] not in ELEMENTWISE or not match[2].startswith(f"{cotangent}, "):
        return ()
    return ((cotangent, f"torch.ops.aten.{match[1]}_backward.grad_input({match[2]}, grad_input={cotangent})"),)


_BACKWARD = re.compile(r"torch\.ops\.aten\.(\w+)_backward\((.*)\)")
ELEMENTWISE = frozenset("threshold sigmoid tanh silu elu leaky_relu hardtanh softplus hardsigmoid".split())


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, Value):
        return False
    one, two = (list(v) if isinstance(v, tuple) else v for v in (value, default))
    return bool(one == two)


def literal(value: Any, resolve: Callable[[str], str]) -> str:
    """A Python expression for an argument."""
    if isinstance(value, Value):
        return resolve(value.name)
    if isinstance(value, tuple | list):
        return f"[{', '.join(literal(v, resolve) for v in value)}]"
    if isinstance(value, sympy.Expr):
        return str(sympy.sstr(value))
    if isinstance(value, torch.device):
        return "like.device"
    if isinstance(value, float) and value - value != 0:
        return f"float('{value}')"
    return repr(value)


def fill(code: str, resolve: Callable[[str], str]) -> str:
    """Code with its {value} placeholders replaced."""
    return PLACEHOLDER.sub(lambda match: resolve(match[1]), code)


def forward_work(rule: BoundRule | None) -> tuple[Kernel, Work]:
    """The kind of kernel, FLOPs and bytes of a forward, read off its formula: 2 per multiply-add, no images."""
    if rule is None or rule.equations[-1].diagram is None:
        return Kernel.NATIVE, Work()
    output = rule.equations[-1].legs
    kernel, flops, moved = Kernel.ELEMENTWISE, [], []
    for product in rule.equations[-1].diagram.products:
        windows = [op for op in product.operands if isinstance(op, Window)]
        chosen = {leg for op in product.operands if isinstance(op, Selection) for leg in op.choice}
        legs = tuple(leg for leg in product.legs if leg not in {w.image for w in windows} | chosen)
        tensors = [op for op in product.operands if isinstance(op, Tensor)]
        every = tuple(leg for leg in output if leg not in legs)
        flops.append((2 if len(tensors) > 1 else 1, (*legs, *every)))
        moved += [(1, t.legs) for t in tensors]
        if len(tensors) > 1 and any(leg not in output for leg in legs):
            kernel = Kernel.CONVOLUTION if windows else Kernel.MM
    return kernel, Work(tuple(flops), (*moved, (1, output)), ((1, output),))
