"""Sums, products, means and softmax."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Root, Rule
from ..table import Table
from .loss import softmax_draw
from .writing.kinks import slope
from .writing.text import access, axis, broadcast, chosen, join, leg_names, literal, refuse, sizes, whole

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
TABLE.rule(aten.pow.Tensor_Tensor)(broadcast("{input} ** {exponent}"))


@TABLE.rule(aten.maximum.default, aten.minimum.default)
def maximum(call: Any) -> Rule:
    """(a + b ± |a - b|) / 2: at a tie each gets half."""
    legs = leg_names(call.output)
    a, b = (access(v, call.arguments[v], call.output, legs) for v in ("input", "other"))
    sign, less = ("+", "<") if call.target == aten.maximum.default else ("-", ">")
    rivals = {"input": "other", "other": "input"}
    return Rule(
        f"output[{join(legs)}] = ({a} + {b} {sign} abs({a} - {b})) / 2",
        vjp={x: _half_at(f"{{{x}}} == {{{y}}}", chosen(f"~({{{x}}} {less} {{{y}}})"))
             for x, y in rivals.items() if whole(call, x)},
        kinks="half each at a tie",
    )


def _half_at(tie: str, code: str) -> str:
    return f"{code} * (1 - ({tie}).to({{cotangents}}.dtype) / 2)"


@TABLE.rule(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor)
def clamp_to(call: Any) -> Rule:
    """Ends that are tensors. At one, older versions of torch have 1 for the input, newer ones 1/2 for each."""
    legs = leg_names(call.output)
    x = access("input", call.input, call.output, legs)
    ends = [call.arguments.get("min"), call.arguments.get("max")]
    low, high = (
        None if end is None else access(name, end, call.output, legs)
        for name, end in zip(("min", "max"), ends, strict=True)
    )
    crossed = f"{low} > {high}" if low and high else ""
    text = x
    if slope("clamp to a tensor") == 0.5:
        between = f" and {low} < {high}" if crossed else ""
        for end in filter(None, (low, high)):
            text = f"({x} + {end}) / 2 if {x} == {end}{between} else ({text})"
    if low:
        text = f"{low} if {x} < {low} else ({text})"
    if high:
        text = f"{high} if {x} > {high}{f' or {crossed}' if crossed else ''} else ({text})"
    kinks = "1/2 for each of input and end at an end" if slope("clamp to a tensor") == 0.5 else "1 at both ends"
    vjp = {"input": _inside(call)} if whole(call, "input") else {}
    return Rule(f"output[{join(legs)}] = {text}", vjp=vjp, kinks=kinks)


def _inside(call: Any) -> str:
    """The cotangents of what is clamped to tensors: those between the ends."""
    ends = [(end, sign) for end, sign in (("min", "<"), ("max", ">")) if call.arguments.get(end) is not None]
    code = chosen(f"~({' | '.join(f'({{input}} {sign} {{{end}}})' for end, sign in ends)})")
    if slope("clamp to a tensor") != 0.5:
        return code
    ties = " | ".join(f"({{input}} == {{{end}}})" for end, _ in ends)
    return _half_at(ties if len(ends) == 1 else f"({ties}) & ({{min}} < {{max}})", code)


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


def _variance(call: Any, root: bool = False) -> Rule:
    """The mean of the squared distance from the mean; the divisor is the count less `correction` (default 1)."""
    left, right, gone = _reduced(call)
    correction = call.arguments.get("correction", int(call.arguments.get("unbiased", True)))
    rest = join([leg for leg in leg_names(call.input) if leg not in gone])
    value = f"0 if square[{rest}] == 0 else square[{rest}]**(1/2)" if root else f"square[{rest}]"
    return Rule(
        f"""mean[{rest}] = input[{right}] / ({sizes(gone)})
            centred[{right}] = input[{right}] - mean[{rest}]
            square[{rest}] = centred[{right}]**2 / ({sizes(gone)} - {literal(1 if correction is None else correction)})
            output[{left}] = {value}""",
        kinks="0 at 0" if root else "",
    )


TABLE.rule(aten.var.default, aten.var.dim, aten.var.correction)(_variance)
TABLE.rule(aten.std.default, aten.std.dim, aten.std.correction)(lambda call: _variance(call, root=True))


@TABLE.rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(call: Any) -> Rule:
    """(Σ |x|^p)^(1/p); at zero the derivative is 0."""
    left, right, gone = _reduced(call)
    p = call.arguments.get("ord", call.arguments.get("p"))
    p = 2 if p is None else p
    if p == 0:
        refuse(call, "it counts what is not 0, which has no derivative", "Use (x != 0).sum().")
    if p == 1:
        return Rule(f"output[{left}] = abs(input[{right}])", kinks="0 at 0")
    rest = join([leg for leg in leg_names(call.input) if leg not in gone])
    x = f"input[{right}]"
    power = f"{x}**2" if p == 2 else f"abs({x})**{literal(p)}"
    return Rule(
        f"""total[{rest}] = {power}
            output[{left}] = 0 if total[{rest}] <= 0 else total[{rest}]**(1 / {literal(p)})""",
        kinks="0 at 0",
    )


@TABLE.rule(aten.cumsum.default)
def cumsum(call: Any) -> Rule:
    legs = leg_names(call.input, skip="k")
    dim = axis(call.dim, len(legs))
    if not isinstance(call.input.shape[dim], int):
        refuse(call, "it adds up the samples", "Use another axis.")
    size, into = call.input.shape[dim], [*legs[:dim], "k", *legs[dim + 1 :]]
    ones = f"torch.ones(({size}, {size}), dtype={{input}}.dtype, device={{input}}.device)"
    saved = {f"before[{legs[dim]}, k]": f"{ones}.tril()"}
    return Rule(f"output[{join(legs)}] = before[{legs[dim]}, k] * input[{join(into)}]", saved=saved)


def _normalized(call: Any) -> tuple[list[str], list[str], str]:
    """(output legs, input legs, the pair of legs along `dim`); the pair is (c, k)."""
    legs = leg_names(call.input, skip="kc")
    dim = axis(call.dim, len(legs))
    if not isinstance(call.input.shape[dim], int):
        refuse(call, "it normalizes over the samples", "Normalize over another axis.")
    return [*legs[:dim], "c", *legs[dim + 1 :]], [*legs[:dim], "k", *legs[dim + 1 :]], "c, k"


@TABLE.rule(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(call: Any) -> Rule:
    """`_safe_softmax` gives zeros for a row of -inf, and so do its derivatives by this formula."""
    out, into, pair = _normalized(call)
    jacobian = f"output[{join(out)}] * (delta[{pair}] - output[{join(into)}])"
    vjp = _native(call, "torch.ops.aten._softmax_backward_data")
    return Rule(jacobian={"input": jacobian}, legs={"input": join(into), "output": join(out)}, vjp=vjp)


@TABLE.rule(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(call: Any) -> Rule:
    out, into, pair = _normalized(call)
    """The Hessian of every element is p pᵀ - diag p."""
    jacobian = f"delta[{pair}] - exp(output[{join(into)}])"
    vjp = _native(call, "torch.ops.aten._log_softmax_backward_data")
    legs, dim = {"input": join(into), "output": join(out)}, call.dim % max(1, len(call.input.axes))
    code = f"softmax_columns({{input}}, {{curvature}}, {dim})"
    scale = "{curvature}.clamp(min=0).sqrt().reshape({noise}.shape).unsqueeze(1)"
    sample = f"softmax_draw({{input}}.movedim({dim}, 1), {{noise}}, {scale}).movedim(1, {dim})"
    size = call.input.shape[dim] if len(call.input.axes) > 1 else 1
    root = Root(size, code, sample, (dim,), by_position=True) if isinstance(size, int) else None
    functions = (softmax_columns, softmax_draw)
    return Rule(jacobian={"input": jacobian}, legs=legs, vjp=vjp, root=root, functions=functions if root else ())


def softmax_columns(input: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """The columns √p_v (onehot(v) - p) √weight of the root of weight (diag p - p pᵀ), with p along an axis."""
    p = torch.softmax(input, dim).movedim(dim, -1)
    scale = weight.clamp(min=0).sqrt().reshape(p.shape[:-1]).unsqueeze(-1) * p.sqrt()
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return ((eye - p.unsqueeze(-2)) * scale.unsqueeze(-1)).movedim(-2, 0).movedim(-1, dim + 1)


def _native(call: Any, kernel: str) -> dict[str, str]:
    """The VJP along `dim`; none where the call casts, too."""
    if call.input.dtype != call.output.dtype:
        return {}
    return {"input": f"{kernel}({{cotangent}}, {{output}}, {call.dim}, {call.output.dtype})"}


@TABLE.rule(aten.logsumexp.default)
def logsumexp(call: Any) -> Rule:
    """The Jacobian is the softmax."""
    left, right, _ = _reduced(call)
    jacobian = f"exp(input[{right}] - output[{left}])"
    return Rule(jacobian={"input": jacobian}, legs={"input": right, "output": left})
