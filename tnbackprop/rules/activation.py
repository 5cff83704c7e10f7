"""Elementwise functions and dropout. At a kink the derivative is torch autograd's (`kinks`)."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.kinks import slope
from .writing.text import access, broadcast_sizes, chosen, elementwise, join, leg_names, literal, refuse, whole

TABLE = Table()
aten = torch.ops.aten
enter = TABLE.rule

# fmt: off
# The strictness of each comparison is torch's, and lets a NaN take the branch with slope 1 where torch's does.
enter(aten.relu.default)(elementwise(
    "0 if x <= 0 else x", vjp="torch.ops.aten.threshold_backward({cotangent}, {output}, 0)", kinks="0 at 0"))
enter(aten.threshold.default)(elementwise(
    "value if x <= threshold else x", arguments=("threshold", "value"),
    vjp="torch.ops.aten.threshold_backward({cotangent}, {input}, <threshold>)", kinks="0 at the threshold"))
enter(aten.leaky_relu.default)(elementwise(
    "x if x > 0 else negative_slope * x", arguments=("negative_slope",),
    vjp="torch.ops.aten.leaky_relu_backward({cotangent}, {input}, <negative_slope>, False)",
    kinks="negative_slope at 0"))
enter(aten.hardtanh.default)(elementwise(
    "min_val if x <= min_val else (max_val if x >= max_val else x)", arguments=("min_val", "max_val"),
    vjp="torch.ops.aten.hardtanh_backward({cotangent}, {input}, <min_val>, <max_val>)", kinks="0 at both ends"))
enter(aten.relu6.default)(elementwise(
    "0 if x <= 0 else (6 if x >= 6 else x)", vjp="torch.ops.aten.hardtanh_backward({cotangent}, {input}, 0, 6)",
    kinks="0 at 0 and 6"))
enter(aten.hardsigmoid.default)(elementwise(
    "0 if x <= -3 else (1 if x >= 3 else x / 6 + 1 / 2)",
    vjp="torch.ops.aten.hardsigmoid_backward({cotangent}, {input})", kinks="0 at -3 and 3"))
enter(aten.elu.default)(elementwise(
    "scale * alpha * expm1(input_scale * x) if x <= 0 else scale * x",
    arguments=("alpha", "scale", "input_scale"), kinks="scale * alpha * input_scale at 0",
    vjp="torch.ops.aten.elu_backward({cotangent}, <alpha>, <scale>, <input_scale>, False, {input})"))
enter(aten.celu.default)(elementwise(
    "alpha * expm1(x / alpha) if x <= 0 else x", arguments=("alpha",),
    vjp="torch.ops.aten.elu_backward({cotangent}, <alpha>, 1, 1 / <alpha>, False, {input})"))
enter(aten.selu.default)(elementwise(
    "scale * alpha * expm1(x) if x <= 0 else scale * x", kinks="scale * alpha at 0",
    constants={"alpha": 1.6732632423543772848170429916717, "scale": 1.0507009873554804934193349852946}))
enter(aten.sigmoid.default)(elementwise(
    "sigmoid(x)", derivative="y * (1 - y)", vjp="torch.ops.aten.sigmoid_backward({cotangent}, {output})"))
enter(aten.tanh.default)(elementwise(
    "tanh(x)", derivative="1 - y**2", vjp="torch.ops.aten.tanh_backward({cotangent}, {output})"))
enter(aten.silu.default)(elementwise(
    "x * sigmoid(x)", vjp="torch.ops.aten.silu_backward({cotangent}, {input})"))
enter(aten.log_sigmoid.default)(elementwise("logsigmoid(x)"))
enter(aten.softplus.default)(elementwise(
    "x if beta * x > threshold else softplus(beta * x) / beta", arguments=("beta", "threshold"),
    vjp="torch.ops.aten.softplus_backward({cotangent}, {input}, <beta>, <threshold>)",
    kinks="linear above threshold / beta"))
enter(aten.mish.default)(elementwise(
    "x * tanh(softplus(x))", vjp="torch.ops.aten.mish_backward({cotangent}, {input})"))
enter(aten.hardshrink.default)(elementwise(
    "0 if abs(x) <= lambd else x", arguments=("lambd",), kinks="0 at both ends",
    vjp="torch.ops.aten.hardshrink_backward({cotangent}, {input}, <lambd>)"))
enter(aten.softshrink.default)(elementwise(
    "0 if abs(x) <= lambd else (x - lambd if x > 0 else x + lambd)", arguments=("lambd",), kinks="0 at both ends",
    vjp="torch.ops.aten.softshrink_backward({cotangent}, {input}, <lambd>)"))
enter(aten.exp.default)(elementwise("exp(x)", derivative="y"))
enter(aten.expm1.default)(elementwise("expm1(x)"))
enter(aten.log.default)(elementwise("log(x)"))
enter(aten.log1p.default)(elementwise("log1p(x)"))
enter(aten.sqrt.default)(elementwise("sqrt(x)"))
enter(aten.rsqrt.default)(elementwise("x**(-1 / 2)"))
enter(aten.reciprocal.default)(elementwise("1 / x"))
enter(aten.square.default)(elementwise("x**2"))
enter(aten.abs.default)(elementwise("abs(x)", kinks="0 at 0"))
enter(aten.sin.default)(elementwise("sin(x)"))
enter(aten.cos.default)(elementwise("cos(x)"))
enter(aten.erf.default)(elementwise("erf(x)"))
enter(aten.erfc.default)(elementwise("erfc(x)"))
enter(aten.neg.default)(elementwise("-x"))
enter(aten.tan.default)(elementwise("tan(x)", derivative="1 + y**2"))
enter(aten.sinh.default)(elementwise("sinh(x)"))
enter(aten.cosh.default)(elementwise("cosh(x)"))
enter(aten.atan.default)(elementwise("atan(x)"))
enter(aten.asinh.default)(elementwise("", derivative="(x**2 + 1)**(-1/2)"))
enter(aten.acosh.default)(elementwise("", derivative="(x - 1)**(-1/2) * (x + 1)**(-1/2)"))
enter(aten.atanh.default)(elementwise("", derivative="1 / (1 - x**2)"))
enter(aten.asin.default)(elementwise("", derivative="(1 - x**2)**(-1/2)"))
enter(aten.acos.default)(elementwise("", derivative="-(1 - x**2)**(-1/2)"))
enter(aten.exp2.default)(elementwise("exp(c * x)", derivative="c * y", constants={"c": math.log(2)}))
enter(aten.log2.default)(elementwise("log(x) / c", constants={"c": math.log(2)}))
enter(aten.log10.default)(elementwise("log(x) / c", constants={"c": math.log(10)}))
enter(aten.special_ndtr.default)(elementwise("erfc(-c * x) / 2", constants={"c": math.sqrt(0.5)}))
enter(aten.frac.default)(elementwise("", derivative="1 + 0 * x", kinks="1 at whole numbers"))
# fmt: on


@TABLE.rule(aten.gelu.default)
def gelu(call: Any) -> Rule:
    """x Phi(x), or its tanh approximation."""
    formula = {
        "none": "x * erfc(-x / sqrt(2)) / 2",
        "tanh": "x * (1 + tanh(c * (x + 0.044715 * x**3))) / 2",
    }[call.approximate]
    vjp = f"torch.ops.aten.gelu_backward({{cotangent}}, {{input}}, approximate={call.approximate!r})"
    return elementwise(formula, vjp=vjp, constants={"c": math.sqrt(2 / math.pi)})(call)


@TABLE.rule(aten.hardswish.default)
def hardswish(call: Any) -> Rule:
    """Older versions of torch count both ends to the inside."""
    inside = slope("hardswish") == 1.5
    low, high, kinks = ("<", ">", "-1/2 at -3, 3/2 at 3") if inside else ("<=", ">=", "0 at -3, 1 at 3")
    text = f"0 if x {low} -3 else (x if x {high} 3 else x * (x + 3) / 6)"
    return elementwise(text, vjp="torch.ops.aten.hardswish_backward({cotangent}, {input})", kinks=kinks)(call)


@TABLE.rule(aten.pow.Tensor_Scalar)
def power(call: Any) -> Rule:
    return elementwise(f"x**{literal(call.exponent)}")(call) if call.exponent else elementwise("1 + 0 * x")(call)


@TABLE.rule(aten.pow.Scalar)
def exponential(call: Any) -> Rule:
    """A positive number to the power of the operand, which is called ``exponent``."""
    base = call.input
    if base <= 0:
        refuse(call, f"the base {base} is not positive", "Write the power with a tensor as its base.")
    return Rule("output[*s] = exp(c * exponent[*s])", constants={"c": math.log(base)})


@TABLE.rule(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(call: Any) -> Rule:
    """Older versions of torch count both ends to the inside. An infinite end is none."""
    inside = slope("clamp") == 1
    low, high = call.arguments.get("min"), call.arguments.get("max")
    text, outside = "x", []
    if high is not None and high != math.inf:
        outside.append(f"({{input}} {'>' if inside else '>='} {high!r})")
        text = f"{literal(high)} if x {'>' if inside else '>='} {literal(high)} else {text}"
    if low is not None and low != -math.inf:
        outside.append(f"({{input}} {'<' if inside else '<='} {low!r})")
        text = f"{literal(low)} if x {'<' if inside else '<='} {literal(low)} else ({text})"
    vjp = chosen(f"~({' | '.join(outside)})", "{cotangent}") if outside else ""
    return elementwise(text, vjp=vjp, kinks=f"{int(inside)} at both ends")(call)


@TABLE.rule(aten.prelu.default)
def prelu(call: Any) -> Rule:
    """max(x, 0) + weight * min(x, 0); the slope at 0 is the weight."""
    legs = leg_names(call.input)
    x = f"input[{join(legs)}]"
    channel = legs[1] if call.weight.shape[0] != 1 else "u"
    return Rule(
        f"output[{join(legs)}] = ({x} if {x} > 0 else 0) + weight[{channel}] * (0 if {x} > 0 else {x})",
        kinks="weight at 0",
    )


@TABLE.rule(aten.glu.default)
def glu(call: Any) -> Rule:
    """The first half of an axis times the sigmoid of the second half."""
    legs = leg_names(call.output)
    dim = call.dim % len(legs)
    first = [f"{leg} + 0" if k == dim else leg for k, leg in enumerate(legs)]
    second = [f"{leg} + half" if k == dim else leg for k, leg in enumerate(legs)]
    half = call.output.shape[dim]
    a, b = f"input[{join(first)}]", f"input[{join(second)}]"
    return Rule(f"output[{join(legs)}] = {a} * sigmoid({b})", constants={"half": half})


@TABLE.rule(aten.dropout.default)
def dropout(call: Any) -> Rule | str:
    """A saved mask that is already divided by the probability to keep; draws as torch does on the CPU."""
    if not call.train or call.p == 0:
        return "output[...] = input[...]"
    mask = _mask("torch.empty_like({input})", call.p)
    return Rule("output[*s] = mask[*s] * input[*s]", saved={"mask[*s]": mask}, forward="{input} * {mask}")


@TABLE.rule(aten.feature_dropout.default)
def feature_dropout(call: Any) -> Rule | str:
    """Dropout of whole channels."""
    if not call.train or call.p == 0:
        return "output[...] = input[...]"
    ones = len(call.input.axes) - 2
    return Rule(
        "output[n, c, *s] = mask[n, c] * input[n, c, *s]",
        saved={"mask[n, c]": _mask("{input}.new_empty({input}.shape[:2])", call.p)},
        forward=f"{{input}} * {{mask}}[(...,) + (None,) * {ones}]",
    )


def _mask(empty: str, p: float) -> str:
    return f"{empty}.bernoulli_({1 - p!r}).div_({1 - p!r})" if p < 1 else f"{empty}.zero_()"


@TABLE.rule(aten.alpha_dropout.default)
def alpha_dropout(call: Any) -> Rule | str:
    """Dropout that keeps mean and variance of a SELU network (Klambauer et al. 2017, arXiv:1706.02515)."""
    if not call.train or call.p == 0:
        return "output[...] = input[...]"
    if call.p == 1:
        refuse(call, "p = 1 drops everything", "Leave the layer out.")
    alpha, p = 1.7580993408473766, call.p
    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    return Rule(
        "output[*s] = kept[*s] * input[*s] * a + (kept[*s] - 1) * b + b * p",
        saved={"kept[*s]": f"torch.empty_like({{input}}).bernoulli_({1 - p!r})"},
        forward=f"{{input}} * ({{kept}} * {a!r}) + (({{kept}} - 1) * {alpha * a!r} + {alpha * a * p!r})",
        constants={"a": a, "b": alpha * a, "p": p},
    )


@TABLE.rule(aten.where.self)
def where(call: Any) -> Rule:
    """A choice by a mask, which is not differentiated."""
    legs = leg_names(call.output)
    mask, yes, no = (access(v, call.arguments[v], call.output, legs) for v in ("condition", "input", "other"))
    mask = mask.replace("condition", "mask", 1)
    codes = {"input": chosen("{condition}"), "other": chosen("~{condition}")}
    return Rule(
        f"output[{join(legs)}] = {mask} * {yes} + (1 - {mask}) * {no}",
        saved={mask: "{condition}.to({input}.dtype)"},
        vjp={name: code for name, code in codes.items() if whole(call, name)},
        constants=broadcast_sizes(mask),
    )


@TABLE.rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(call: Any) -> Rule:
    """The input where the mask is False; the filling may be infinite, so it is in no formula."""
    if "value" in call.tensors and call.value.differentiable:
        refuse(call, "the value that is filled in depends on parameters", "Use torch.where.")
    legs = leg_names(call.output)
    keep = access("mask", call.mask, call.output, legs).replace("mask", "keep", 1)
    own = access("", call.input, call.output, legs)[1:-1]
    return Rule(
        jacobian={"input": keep},
        legs={"input": own, "output": join(legs)},
        saved={keep: "(~{mask}).to({input}.dtype)"},
        vjp={"input": chosen("~{mask}")} if whole(call, "input") else {},
        constants=broadcast_sizes(keep),
    )
