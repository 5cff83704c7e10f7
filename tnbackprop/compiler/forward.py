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
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
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
