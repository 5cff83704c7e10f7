"""Sums, products, means and softmax."""

from __future__ import annotations

from typing import Any

import torch

from ..rule import Rule, Table
from .text import axis, broadcast, join, leg_names, literal, refuse, sizes

TABLE = Table()
aten = torch.ops.aten

TABLE.rule(aten.add.Tensor, aten.add.Scalar)(broadcast("{input} + {alpha} * {other}"))
TABLE.rule(aten.sub.Tensor, aten.sub.Scalar)(broadcast("{input} - {alpha} * {other}"))
TABLE.rule(aten.rsub.Tensor, aten.rsub.Scalar)(broadcast("{other} - {alpha} * {input}"))
TABLE.rule(aten.mul.Tensor, aten.mul.Scalar)(broadcast("{input} * {other}"))
TABLE.rule(aten.div.Tensor, aten.div.Scalar)(broadcast("{input} / {other}"))
TABLE.rule(aten.addcmul.default)(broadcast("{input} + {value} * {tensor1} * {tensor2}"))
TABLE.rule(aten.addcdiv.default)(broadcast("{input} + {value} * {tensor1} / {tensor2}"))
TABLE.rule(aten.lerp.Tensor, aten.lerp.Scalar)(broadcast("{input} + {weight} * {end} - {weight} * {input}"))
TABLE.rule(aten.pow.Tensor_Tensor)(broadcast("exp({exponent} * log({input}))"))


def _reduced(call: Any) -> tuple[str, str, list[str]]:
    """(left legs, input legs, summed legs) of a reduction with `dim` and `keepdim`."""
    legs = leg_names(call.input)
    dims = call.arguments.get("dim")
    dims = range(len(legs)) if dims in (None, (), []) else [dims] if isinstance(dims, int) else dims
    gone = {axis(d, len(legs)) for d in dims}
    keep = call.arguments.get("keepdim", False)
    left = [f"u{k}" if k in gone else leg for k, leg in enumerate(legs) if keep or k not in gone]
    return join(left), join(legs), [leg for k, leg in enumerate(legs) if k in gone]


@TABLE.rule(aten.sum.default, aten.sum.dim_IntList)
def sum_(call: Any) -> Rule:
    left, right, _ = _reduced(call)
    return Rule(f"output[{left}] = input[{right}]")


@TABLE.rule(aten.mean.default, aten.mean.dim)
def mean(call: Any) -> Rule:
    left, right, gone = _reduced(call)
    return Rule(f"output[{left}] = input[{right}] / ({sizes(gone)})")


def _variance(call: Any, root: str = "") -> Rule:
    """The mean of the squared distance from the mean; the divisor is the count less `correction` (default 1)."""
    left, right, gone = _reduced(call)
    correction = call.arguments.get("correction", int(call.arguments.get("unbiased", True)))
    rest = join([leg for leg in leg_names(call.input) if leg not in gone])
    return Rule(
        f"""mean[{rest}] = input[{right}] / ({sizes(gone)})
            centred[{right}] = input[{right}] - mean[{rest}]
            square[{rest}] = centred[{right}]**2 / ({sizes(gone)} - {literal(1 if correction is None else correction)})
            output[{left}] = square[{rest}]{root}"""
    )


TABLE.rule(aten.var.default, aten.var.dim, aten.var.correction)(_variance)
TABLE.rule(aten.std.default, aten.std.dim, aten.std.correction)(lambda call: _variance(call, "**(1/2)"))


def _normalized(call: Any) -> tuple[list[str], list[str], str]:
    """(output legs, input legs, the pair of legs along `dim`); the pair is (c, k)."""
    legs = leg_names(call.input, skip="kc")
    dim = axis(call.dim, len(legs))
    if not isinstance(call.input.shape[dim], int):
        refuse(call, "it normalizes over the samples", "Normalize over another axis.")
    return [*legs[:dim], "c", *legs[dim + 1 :]], [*legs[:dim], "k", *legs[dim + 1 :]], "c, k"


@TABLE.rule(aten.softmax.int, aten._softmax.default)
def softmax(call: Any) -> Rule:
    out, into, pair = _normalized(call)
    jacobian = f"output[{join(out)}] * (delta[{pair}] - output[{join(into)}])"
    return Rule(jacobian={"input": jacobian}, legs={"input": join(into), "output": join(out)})


@TABLE.rule(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(call: Any) -> Rule:
    out, into, pair = _normalized(call)
    jacobian = f"delta[{pair}] - exp(output[{join(into)}])"
    return Rule(jacobian={"input": jacobian}, legs={"input": join(into), "output": join(out)})


@TABLE.rule(aten.logsumexp.default)
def logsumexp(call: Any) -> Rule:
    """The Jacobian is the softmax."""
    left, right, _ = _reduced(call)
    jacobian = f"exp(input[{right}] - output[{left}])"
    return Rule(jacobian={"input": jacobian}, legs={"input": right, "output": left})
