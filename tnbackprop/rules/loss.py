"""Losses. The output is a scalar for `mean` and `sum`, one value per element without a reduction."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Root, Rule
from ..table import Table
from .writing.text import access, join, leg_names, literal, refuse, sizes

TABLE = Table()
aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2  # at::Reduction


def _same_shape(call: Any, *names: str) -> list[str]:
    """The legs of the input, which the named operands share."""
    for name in names:
        if call.arguments[name].axes != call.input.axes:
            refuse(
                call,
                f"{name} {call.arguments[name].shape} and input {call.input.shape} differ in shape",
                "Give them the same shape: broadcasting them is seldom meant, and can mix samples.",
            )
    return leg_names(call.input)


def _left(call: Any, legs: list[str]) -> str:
    return join(legs if call.reduction == NONE else [])


def _elements(call: Any, legs: list[str]) -> str:
    return f" / ({sizes(legs)})" if call.reduction == MEAN else ""


def _of_difference(call: Any, function: str, kinks: str = "") -> Rule:
    """A function of ``d``, the input minus the target."""
    legs = _same_shape(call, "target")
    difference = f"(input[{join(legs)}] - target[{join(legs)}])"
    text = function.replace("<d>", difference)
    return Rule(f"output[{_left(call, legs)}] = ({text}){_elements(call, legs)}", kinks=kinks)


@TABLE.rule(aten.mse_loss.default)
def mse_loss(call: Any) -> Rule:
    return _of_difference(call, "<d>**2")


@TABLE.rule(aten.l1_loss.default)
def l1_loss(call: Any) -> Rule:
    return _of_difference(call, "abs(<d>)", kinks="0 at 0")


@TABLE.rule(aten.huber_loss.default)
def huber_loss(call: Any) -> Rule:
    d = literal(call.delta)
    return _of_difference(call, f"<d>**2 / 2 if abs(<d>) < {d} else {d} * (abs(<d>) - {d} / 2)")


@TABLE.rule(aten.smooth_l1_loss.default)
def smooth_l1_loss(call: Any) -> Rule:
    if call.beta == 0:
        return _of_difference(call, "abs(<d>)", kinks="0 at 0")
    b = literal(call.beta)
    return _of_difference(call, f"<d>**2 / (2 * {b}) if abs(<d>) < {b} else abs(<d>) - {b} / 2")


LABEL = (
    "torch.where({noise} < {chance}, -({otherwise} / {chance}.clamp(min=torch.finfo({chance}.dtype).tiny)).sqrt(), "
    "({chance} / {otherwise}.clamp(min=torch.finfo({chance}.dtype).tiny)).sqrt())"
)
"""(p - y) / sqrt(p (1 - p)) with the label y = 1 drawn with probability p."""
CHANCES = {"chance": "torch.sigmoid({input})", "otherwise": "torch.sigmoid(-{input})"}


@TABLE.rule(aten.soft_margin_loss.default)
def soft_margin_loss(call: Any) -> Rule:
    """log(1 + exp(-target * input))."""
    legs = _same_shape(call, "target")
    each = f"-logsigmoid(target[{join(legs)}] * input[{join(legs)}])"
    return Rule(f"output[{_left(call, legs)}] = {each}{_elements(call, legs)}", saved=CHANCES, draw=LABEL)


def _operand(call: Any, name: str, legs: list[str]) -> str:
    """A factor that broadcasts against the input, or nothing."""
    if call.arguments.get(name) is None:
        return ""
    return access(name, call.arguments[name], call.input, legs) + " * "


@TABLE.rule(aten.binary_cross_entropy_with_logits.default)
def binary_cross_entropy_with_logits(call: Any) -> Rule:
    """-weight * (pos_weight * y * log p + (1 - y) * log(1 - p)) with p = sigmoid(input)."""
    legs = _same_shape(call, "target")
    x, y = f"input[{join(legs)}]", f"target[{join(legs)}]"
    weight, positive = _operand(call, "weight", legs), _operand(call, "pos_weight", legs)
    return Rule(
        f"output[{_left(call, legs)}] = -{weight}({positive}{y} * logsigmoid({x})"
        f" + (1 - {y}) * logsigmoid(-{x})){_elements(call, legs)}",
        saved=CHANCES,
        draw=LABEL,
    )


@TABLE.rule(aten.binary_cross_entropy.default)
def binary_cross_entropy(call: Any) -> Rule:
    """-weight * (y * log p + (1 - y) * log(1 - p)) of the input p; p (1 - p) is kept above 1e-12, as torch does."""
    legs = _same_shape(call, "target")
    x, y = f"input[{join(legs)}]", f"target[{join(legs)}]"
    weight = _operand(call, "weight", legs)
    return Rule(
        jacobian={"input": f"{weight}({x} - {y}) / maximum({x} * (1 - {x}), 1e-12){_elements(call, legs)}"},
        legs={"input": join(legs), "output": _left(call, legs)},
        saved={"chance": "{input}", "otherwise": "1 - {input}"},
        draw=LABEL,
    )


# Cross-entropy. With t the weighted target distribution (0 for an ignored position), w = sum_c t and
# p = softmax(input): gradient (w p - t) / divisor, Hessian w (diag p - p p^T) / divisor, divisor = N * average.
# Of class indices t has few entries or a constant: it is in the gradient without being written out.


def _hard_target(call: Any, smoothing: float) -> dict[str, str]:
    """t, w, the gradient over w p, and the divisor per sample, for class indices."""
    weighted = call.arguments.get("weight") is not None
    t = "torch.zeros_like({input}).scatter(1, {label}.unsqueeze(1), {label_weight}.unsqueeze(1))"
    w, less, by, spread = "{label_weight}", "{label_weight}", _over_average(call), ""
    if smoothing:
        share, kept = repr(smoothing / call.input.shape[1]), "{kept}.to({input}.dtype)"
        t = f"{t} * {1 - smoothing!r} + {share} * {kept}.unsqueeze(1){' * ' + _class_weight(call) if weighted else ''}"
        less = f"{{label_weight}} * {1 - smoothing!r}"
        w = f"{less} + {kept} * {share + ' * {weight}.sum()' if weighted else repr(smoothing)}"
        own = f"({kept}{by}).unsqueeze(1)"
        spread = f".addcmul_({own}, {_class_weight(call)}, value=-{share})" if weighted else f".sub_({share} * {own})"
    saved = {
        "kept[n, *s]": f"{{target}} != {call.ignore_index}",
        "label[n, *s]": "{target}.masked_fill(~{kept}, 0)",
        "label_weight[n, *s]": "{weight}[{label}] * {kept}" if weighted else "{kept}.to({input}.dtype)",
        "w[n, *s]": w,
        "t[n, c, *s]": t,
        "less": f".scatter_add_(1, {{label}}.unsqueeze(1), (-{less}{by}).unsqueeze(1)){spread}",
    }
    # all ignored: the loss is 0/0 but torch's gradient is 0, as it is with any divisor but 0
    average = "({label_weight}.sum() + (~{kept}).all()) / {input}.shape[0]"
    return saved | ({"average[]": average} if call.reduction == MEAN else {})


def _over_average(call: Any) -> str:
    return " / {average}" if call.reduction == MEAN else ""


def _class_weight(call: Any) -> str:
    return f"{{weight}}.view({[1, -1] + [1] * (len(call.input.axes) - 2)})"


def _soft_target(call: Any, smoothing: float) -> dict[str, str]:
    """The same for probabilities."""
    classes, t = call.input.shape[1], "{target}"
    if smoothing:
        t = f"({t} * {1 - smoothing!r} + {smoothing / classes!r})"
    if call.arguments.get("weight") is not None:
        t = f"{t} * {_class_weight(call)}"
    saved = {"t[n, c, *s]": t, "w[n, *s]": "{t}.sum(1)", "less": f".sub_({{t}}{_over_average(call)})"}
    if call.reduction == MEAN:
        saved["average[]"] = f"{{input}}.new_full((), {{input}}.numel() // ({classes} * {{input}}.shape[0]))"
    return saved


@TABLE.rule(aten.cross_entropy_loss.default)
def cross_entropy_loss(call: Any) -> Rule:
    """Softmax cross-entropy with class weights, ignore_index, label smoothing, class indices or probabilities."""
    if len(call.input.axes) < 2:
        refuse(call, "the input has no batch axis", "Give the model's output a batch axis.")
    if not isinstance(call.input.shape[1], int):
        refuse(call, "axis 1, the classes, holds the batch", "Move the classes to axis 1.")
    soft = len(call.tensors["target"].axes) == len(call.input.axes)
    if soft and call.tensors["target"].differentiable:
        refuse(call, "the target depends on parameters", "Detach it.")
    saved = (_soft_target if soft else _hard_target)(call, call.label_smoothing)
    less, by = saved.pop("less"), _over_average(call)
    slope = f"torch.ops.aten.softmax.int({{input}}, 1).mul_(({{w}}{by}).unsqueeze(1)){less}"
    saved |= {"p[n, c, *s]": "torch.softmax({input}, 1)", "slope[n, c, *s]": slope}
    return Rule(
        jacobian={"input": f"slope[n, c, *s]{' / N' if by else ''}"},
        legs={"input": "n, c, *s", "output": "n, *s" if call.reduction == NONE else ""},
        saved=saved | _softmax_root(call),
        root=_columns(call),
        functions=(softmax_draw,),
        divisor="average" if by and not soft else "",
    )


def softmax_draw(input: torch.Tensor, noise: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale (softmax(input) - onehot(y)) along axis 1, where y has its sum of probabilities at the noise.

    A few samples at a time: all else that is made is small.
    """
    found = input.new_empty(input.shape)
    size = max(1, 2 ** (18 if input.device.type == "cpu" else 24) // max(1, input[:1].numel()))
    for logits, own, at, by in zip(*(torch.split(each, size) for each in (input, found, noise, scale)), strict=True):
        p = torch.softmax(logits, 1, dtype=noise.dtype)
        sums = p.movedim(1, -1).cumsum(-1).contiguous()
        at = (at.unsqueeze(-1) * sums[..., -1:]).contiguous()
        y = torch.searchsorted(sums, at, right=True).clamp_(max=p.shape[1] - 1).movedim(-1, 1)
        own.copy_(p.scatter_add_(1, y, -torch.ones_like(y, dtype=p.dtype)).mul_(by))
    return found


def _softmax_root(call: Any) -> dict[str, str]:
    """Saved values of the root of w (diag p - p pᵀ) / divisor: its Cholesky factor, which needs C - 1 columns.

    With tails r_v = p_v + p_{v+1} + …:
    S[c, v] = [c = v] sqrt(p_v r_{v+1} / r_v) - [c > v] p_c sqrt(p_v / r_v / r_{v+1}).
    """
    ones = ", 1" * (len(call.input.axes) - 2)
    divisor = " / ({input}.shape[0] * {average})" if call.reduction == MEAN else ""
    return {
        "tail": "{p}.flip(1).cumsum(1).flip(1).clamp(min=torch.finfo({p}.dtype).tiny)",
        "part": "({p} / {tail}).sqrt()[:, :-1]",
        "diagonal": "{part} * {tail}[:, 1:].sqrt()",
        "below": "{part} / {tail}[:, 1:].sqrt()",
        "eye": "torch.eye({p}.shape[1], dtype={p}.dtype, device={p}.device)"
        f".view(1, {call.input.shape[1]}, -1{ones})",
        "mask": f"torch.ones_like({{eye}}[0]).view({call.input.shape[1]}, -1).tril(-1).view_as({{eye}})",
        "factor": "{eye}[:, :, :-1] * {diagonal}.unsqueeze(1)"
        " - {mask}[:, :, :-1] * {p}.unsqueeze(2) * {below}.unsqueeze(1)",
        "root_scale": f"({{w}}{divisor}).sqrt().unsqueeze(1)",
    }


def _columns(call: Any) -> Root:
    """A sample is sqrt(w / divisor) (p - onehot(y)), with y drawn from p by its sums of probabilities."""
    classes = call.input.shape[1]
    code = "{factor}.movedim(2, 0) * {root_scale}" if classes > 1 else "torch.zeros_like({p}).unsqueeze(0)"
    divisor = " / ({input}.shape[0] * {average})" if call.reduction == MEAN else ""
    elementwise = f"{{t}} * {{p}} * (1 - {{p}}){divisor}"  # of -t log p, with p a function of its own logit only
    sample = "softmax_draw({input}, {noise}, {root_scale})"
    return Root(max(classes - 1, 1), code, sample, elementwise=elementwise, by_position=True)


@TABLE.rule(aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss2d.default)
def nll_loss(call: Any) -> Rule:
    """Linear in the log-probabilities: -t * input / divisor."""
    if len(call.input.axes) < 2:
        refuse(call, "the input has no batch axis", "Give the model's output a batch axis.")
    by = " / (N * average[])" if call.reduction == MEAN else ""
    left = "n, *s" if call.reduction == NONE else ""
    saved = _hard_target(call, 0.0)
    del saved["less"]
    return Rule(f"output[{left}] = -t[n, c, *s] * input[n, c, *s]{by}", saved=saved, divisor="average" if by else "")
