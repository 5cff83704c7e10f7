"""Special functions, angles, remainders: elementwise functions that distributions and encodings are made of."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import access, broadcast, broadcast_sizes, elementwise, join, leg_names

TABLE = Table()
aten = torch.ops.aten
enter = TABLE.rule

# fmt: off
enter(aten.lgamma.default, aten.special_gammaln.default)(elementwise("lgamma(x)"))
enter(aten.digamma.default, aten.special_psi.default, aten.special_digamma.default)(elementwise("digamma(x)"))
enter(aten.erfinv.default, aten.special_erfinv.default)(elementwise(
    "", derivative="c * exp(y**2)", constants={"c": math.sqrt(math.pi) / 2}))
enter(aten.special_ndtri.default)(elementwise(
    "", derivative="c * exp(y**2 / 2)", constants={"c": math.sqrt(2 * math.pi)}))
enter(aten.special_erfcx.default)(elementwise(
    "", derivative="2 * x * y - c", constants={"c": 2 / math.sqrt(math.pi)}))
enter(aten.special_entr.default)(elementwise("", derivative="-log(x) - 1"))
enter(aten.sinc.default, aten.special_sinc.default)(elementwise(
    "", derivative="(cos(pi * x) - y) / x if x != 0 else 0", kinks="none; the second derivative at 0 is torch's, 0"))
enter(aten.deg2rad.default)(elementwise("c * x", constants={"c": math.pi / 180}))
enter(aten.rad2deg.default)(elementwise("c * x", constants={"c": 180 / math.pi}))
enter(aten.fmod.Scalar, aten.remainder.Scalar)(elementwise("", derivative="1 + 0 * x", kinks="1 at whole multiples"))
# fmt: on
enter(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)(
    broadcast("(0 if {input} == 0 and {other} <= 0 else {input} * log({other}))")
)
enter(aten.special_xlog1py.default)(broadcast("(0 if {input} == 0 and {other} <= -1 else {input} * log1p({other}))"))
enter(aten.logaddexp2.default)(
    broadcast(f"softplus(({{input}} - {{other}}) * {math.log(2)!r}) / {math.log(2)!r} + {{other}}")
)


@enter(aten.atan2.default)
def atan2(call: Any) -> Rule:
    """The angle of (other, input); flat at the origin, as torch has it."""
    legs = leg_names(call.output)
    y, x = (access(name, call.arguments[name], call.output, legs) for name in ("input", "other"))
    square = f"({y}**2 + {x}**2)"
    slopes = {"input": f"{x} / {square}", "other": f"-{y} / {square}"}
    return Rule(
        jacobian={name: f"0 if {square} == 0 else {slope}" for name, slope in slopes.items()},
        legs={"input": y[len("input[") : -1], "other": x[len("other[") : -1], "output": join(legs)},
        constants=broadcast_sizes(y) | broadcast_sizes(x),
    )
