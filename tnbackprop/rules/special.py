"""Special functions, angles, remainders: elementwise functions that distributions and encodings are made of."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import Row, access, broadcast, broadcast_sizes, elementwise, join, leg_names

TABLE = Table()
aten = torch.ops.aten
enter = TABLE.rule
_LOG_2 = repr(math.log(2))

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


def _of_two(by_input: str, by_other: str) -> Row:
    """A row with declared slopes, of {a}, {b} and the output {y}, for two operands that broadcast."""

    def row(call: Any) -> Rule:
        legs = leg_names(call.output)
        a, b = (access(name, call.arguments[name], call.output, legs) for name in ("input", "other"))
        slopes = {"input": by_input, "other": by_other}
        return Rule(
            jacobian={name: slopes[name].format(a=a, b=b, y=f"output[{join(legs)}]") for name in call.tensors},
            legs={"input": a[len("input[") : -1], "other": b[len("other[") : -1], "output": join(legs)},
            constants=broadcast_sizes(a) | broadcast_sizes(b),
        )

    return row


_SQUARE = "({a}**2 + {b}**2)"
enter(aten.atan2.default)(
    _of_two(f"0 if {_SQUARE} == 0 else {{b}} / {_SQUARE}", f"0 if {_SQUARE} == 0 else -{{a}} / {_SQUARE}")
)
enter(aten.hypot.default)(_of_two("0 if {y} == 0 else {a} / {y}", "0 if {y} == 0 else {b} / {y}"))
# 1 - sigmoid(a - b) would be 0 where a is larger by 17
enter(aten.logaddexp.default)(_of_two("sigmoid({a} - {b})", "sigmoid({b} - {a})"))
enter(aten.logaddexp2.default)(_of_two(f"sigmoid(({{a}} - {{b}}) * {_LOG_2})", f"sigmoid(({{b}} - {{a}}) * {_LOG_2})"))
