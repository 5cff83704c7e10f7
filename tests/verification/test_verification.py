"""`tn.verify` of rules: right ones pass; a wrong one of each kind is named with its first wrong entry and its cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.definitions.report import message
from tnbackprop.verification.draws import modules

from ..verified import (
    AFFINE,
    DAMPED,
    ELEMENTWISE,
    FIRST,
    Affine,
    Centred,
    Conv,
    Damped,
    MeanFree,
    Rectified,
    conv,
    norm,
)

# ---------------------------------------------------------------- right rules

RIGHT: dict[str, tuple[Any, Any]] = {
    "affine": (AFFINE, Affine),
    "linear, bias or not": (AFFINE, nn.Linear),
    "convolution of one axis": (conv(), Conv),
    "layer norm": (norm, nn.LayerNorm),
    "bilinear, two inputs": (
        "output[*s, o] = weight[o, i, j] * input1[*s, i] * input2[*s, j] + bias[o]",
        nn.Bilinear(3, 2, 4),
    ),
    "embedding": ("output[*s, d] = weight[v, d] * select(input[*s], v)", nn.Embedding(5, 2)),
    "declared Jacobian": (
        tn.Rule(DAMPED, jacobian={"input": "3/2 * gain[i] * (1 - tanh(input[*s, i])**2)"}, legs=ELEMENTWISE),
        Damped(3),
    ),
    "native code": (
        tn.Rule(AFFINE, forward="{input} @ {weight}.T + {bias}", vjp={"input": "{cotangent} @ {weight}"}),
        Affine(3, 2),
    ),
    "a kink that is meant": (
        tn.Rule(
            "output[*s, i] = input[*s, i] * gain[i] if input[*s, i] * gain[i] >= 0 else 0", kinks="1 at 0"
        ),
        Rectified(3),
    ),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", RIGHT)
def test_right_rules(name: str) -> None:
    rule, module = RIGHT[name]
    report = tn.verify(rule, module=module, quantities=FIRST)
    assert report.ok and report.first_wrong is None
    compared = {row.what for row in report.rows}
    assert {"independence of samples", "formula", "Jacobian", "grad", "batch_grad"} <= compared
    assert max(row.error for row in report.rows) < 1e-12
    assert any("N = 1," in row.case for row in report.rows) and any("whole numbers" in row.case for row in report.rows)


class Pairs(nn.Module):
    """The larger one of every two."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.unflatten(1, (-1, 2)).amax(2)


@pytest.mark.parametrize("near", [2, 1])
def test_where_a_choice_lies(near: int) -> None:
    """What a rule says of the place of a choice is checked with the rest: here it may be the second of a pair."""
    rule = tn.Rule(
        "output[n, h] = select(index[n, h], y=2*h + k) * input[n, y]",
        constants={"K": near},
        saved={"index[n, h]": "{input}.unflatten(1, (-1, 2)).argmax(2) + 2 * torch.arange({input}.shape[1] // 2)"},
    )
    report = tn.verify(rule, module=Pairs(), x=(3, 6), quantities=FIRST, check=False)
    assert report.ok == (near == 2)


@pytest.mark.slow
def test_every_quantity_of_a_rule_and_of_its_input() -> None:
    """Second derivatives, too, and what is defined line by line; nothing is left out."""
    report = tn.verify(norm, module=nn.LayerNorm(3), x=(2, 3))
    quantities = {row.what for row in report.rows if "'input'" in row.of} - {"Jacobian"}
    assert quantities == {
        "grad", "batch_grad", "batch_l2", "batch_dot", "second_moment", "variance", "sqrt_ggn", "diag_ggn", "ntk",
        "diag_ggn_per_sample", "ggn_trace", "ggn_gram", "hessian_diag", "hessian_diag_per_sample", "jacobians",
        "sqrt_ggn_mc", "diag_ggn_mc", "kflr", "kflr_reduce", "kfac", "kfac_empirical", "kfra", "hesscale", "bl89",
        "clipped_grad", "natural_gradient", "directional_grad", "directional_curvature", "weighted_grad",
        "axis_moments", "directional_root", "rotated_second_moment", "projected_factors", "sketch",
    }  # fmt: skip
    assert report.ok and not report.left_out
    text = str(report)
    assert text.startswith("the rule of LayerNorm agrees with torch.func")
    assert re.search(r"hessian_diag +\d+ .* ok +'weight', 'bias', 'input'", text)


@pytest.mark.slow
def test_every_option_and_many_shapes_are_drawn() -> None:
    """Axes of size 1, N = 1, further axes, groups: all in the cases of the report."""
    rule = lambda layer: tn.Rule(  # noqa: E731
        "output[n, g.o, h, w] = weight[g.o, i, k, l]"
        " * input[n, g.i, s0*h + d0*k - p0, s1*w + d1*l - p1] + bias[g.o]",
        constants={"G": layer.groups}
        | {f"{name[0]}{a}": getattr(layer, name)[a] for name in ("stride", "dilation", "padding") for a in (0, 1)},
    )
    cases = {row.case for row in tn.verify(rule, module=nn.Conv2d, quantities=FIRST).rows}
    for option in ("stride=2", "padding=1", "dilation=2", "groups=2", "bias=False"):
        assert any(option in case for case in cases), option
    assert any("in_channels=1, out_channels=1, kernel_size=1" in case for case in cases)
    cases = {row.case for row in tn.verify(AFFINE, module=Affine, quantities=FIRST).rows}
    for shape in ("[3, 3, 3]", "[1, 3, 3]", "[2, 3]", "[2, 1, 3, 3]", "[2, 1, 1]"):
        assert any(f"input {shape}" in case for case in cases), (shape, cases)


@pytest.mark.slow
def test_a_class_with_a_registered_rule() -> None:
    with tn.registered({Affine: AFFINE}):
        assert tn.verify(Affine, quantities=FIRST).subject == "the rule of Affine"
        assert tn.verify(nn.Sequential(Affine(3, 2)), (4, 3), quantities=FIRST).ok
    wrong = {Affine: AFFINE.replace("+", "-")}
    with tn.registered(wrong), pytest.raises(tn.VerificationError, match="'bias': wrong sign"):
        tn.verify(Affine, quantities=FIRST)


@pytest.mark.slow
def test_an_option_that_the_class_refuses_is_left_out() -> None:
    class Picky(Affine):
        def __init__(self, inputs: int, outputs: int, order: int = 1) -> None:
            super().__init__(inputs, outputs)
            if order != 1:
                raise ValueError("only order 1")

    report = tn.verify(AFFINE, module=Picky, quantities=FIRST)
    assert report.ok
    assert any("order=2" in note.what and "only order 1" in note.why for note in report.left_out)
    assert "left out:\n  Picky(inputs=3, outputs=4, order=2): it raises ValueError: only order 1" in str(report)


# ---------------------------------------------------------------- wrong rules


@dataclass(frozen=True)
class Wrong:
    """A rule that is wrong in one way, and what the message must say."""

    rule: Any
    module: Any
    message: str


ENTRY = r"\[[^]]*=\d.*\]: the \w+.* gives -?[\d.e-]+, the module -?[\d.e-]+"
WRONG = {
    "missing leg": Wrong(
        "output[*s, o] = weight[j, i] * input[*s, i] + bias[o]", Affine,
        r"output" + ENTRY + r"[^§]*missing leg: it does not vary along o, and it must",
    ),
    "leg on one side": Wrong(
        "output[*s, o] = weight[o, i] * input[*s, j] + bias[o]", Affine, r"leg 'i' is summed in 'weight' alone: "
    ),
    "leg on one side of two lines": Wrong(
        "t[*s] = input[*s, j]\noutput[*s, o] = weight[o, i] * t[*s] + bias[o]", Affine,
        r"'input': missing leg: .* along j', and",
    ),
    "two legs for one": Wrong(
        "output[*s, i] = 3/2 * tanh(input[*s, i]) * gain[i] + 0 * input[*s, i] + gain[j] - gain[j] + gain[i] - gain[i]"
        " + input[*s, j] - input[*s, i]", Damped(3), r"'input': missing leg: entries with different",
    ),
    "transposed leg": Wrong(
        "output[*s, o] = weight[i, o] * input[*s, i] + bias[o]", Affine(3, 3),
        r"transposed: it is right with axes 0 and 1 of 'weight' exchanged",
    ),
    "missing factor": Wrong(
        "output[*s, i] = tanh(input[*s, i]) * gain[i]", Damped(3),
        r"wrong factor: every entry is 0\.666667 times .* 1/the module's power",
    ),
    "wrong factor of one term": Wrong(
        "output[*s, o] = 2 * weight[o, i] * input[*s, i] + bias[o]", Affine,
        r"in its dependence on 'input': wrong factor: every entry is 2 times what it must be",
    ),
    "wrong sign": Wrong(
        "output[*s, o] = -weight[o, i] * input[*s, i] - bias[o]", Affine, "wrong sign: every entry is the opposite"
    ),
    "wrong sign of one term": Wrong(
        "output[*s, o] = weight[o, i] * input[*s, i] - bias[o]", Affine, "in its dependence on 'bias': wrong sign"
    ),
    "forgotten bias": Wrong(
        "output[*s, o] = weight[o, i] * input[*s, i]", Affine,
        r"the formula never reads 'bias', and the output depends on it: a forgotten term or factor",
    ),
    "forgotten factor": Wrong("output[*s, i] = 3/2 * tanh(input[*s, i])", Damped(3), "never reads 'gain'"),
    "added constant": Wrong(
        "output[*s, o] = weight[o, i] * input[*s, i] + bias[o] + 1", Affine, "every derivative is right: a constant"
    ),
    "missing 1/size of a mean": Wrong(
        "mean[*s] = input[*s, i]\noutput[*s, i] = (input[*s, i] - mean[*s]) * gain[i]", Centred,
        r"wrong factor in the line of 'mean': it is right divided by I \(as in a mean\)",
    ),
    "wrong sign in a line": Wrong(
        "mean[*s] = input[*s, i] / I\noutput[*s, i] = (input[*s, i] + mean[*s]) * gain[i]", Centred,
        r"wrong factor in the line of 'mean': it is right divided by -1",
    ),
    "wrong declared Jacobian": Wrong(
        tn.Rule(DAMPED, jacobian={"input": "3/2 * gain[i] * (tanh(input[*s, i])**2 - 1)"}, legs=ELEMENTWISE),
        Damped(3), r"∂output/∂input\[n=0, .*the declared Jacobian gives[^§]*wrong sign",
    ),
    "declared Jacobian with another factor": Wrong(
        tn.Rule(DAMPED, jacobian={"input": "gain[i] * (1 - tanh(input[*s, i])**2)"}, legs=ELEMENTWISE),
        Damped(3), r"every entry is 0\.666667 times",
    ),
    "transposed declared Jacobian": Wrong(
        tn.Rule(AFFINE, jacobian={"input": "weight[i, o]"}, legs={"input": "*s, i", "output": "*s, o"}),
        Affine(3, 3), r"Jacobian of 'input'[^§]*transposed: legs o and i' are exchanged",
    ),
    "a module that mixes samples": Wrong(
        "output[n, i] = input[n, i] * gain[i]", MeanFree,
        r"output\[n=1, [^§]*the module mixes samples: its Jacobian is not batch-diagonal",
    ),
    "native VJP that mixes samples": Wrong(
        tn.Rule(AFFINE, vjp={"input": "({cotangent}.sum(0, keepdim=True) @ {weight}).expand_as({input})"}),
        Affine(3, 2), r"native VJP of 'input'[^§]*mixes samples: a cotangent of sample 0 .* batch-diagonal",
    ),
    "transposed native VJP": Wrong(
        tn.Rule(AFFINE, vjp={"input": "{cotangent} @ {weight}.T"}), Affine(3, 3),
        r"native VJP of 'input'[^§]*\(Jᵀg\)_input" + ENTRY + r"[^§]*axes 0 and 1 of 'weight' exchanged",
    ),
    "native VJP times two": Wrong(
        tn.Rule(AFFINE, vjp={"weight": "2 * torch.einsum('...o,...i->oi', {cotangent}, {input})"}), Affine(3, 3),
        "native VJP of 'weight'[^§]*every entry is 2 times",
    ),
    "native VJP that raises": Wrong(
        tn.Rule(AFFINE, vjp={"input": "torch.matmull({cotangent}, {weight})"}), Affine(3, 2),
        "native VJP of 'input'[^§]*raises AttributeError.*matmull",
    ),
    "native VJP of another shape": Wrong(
        tn.Rule(AFFINE, vjp={"input": "{cotangent}"}), Affine(3, 2),
        r"the code gives shape \[3, 3, 2\]; 'input' has \[3, 3, 3\]",
    ),
    "wrong forward code": Wrong(
        tn.Rule(AFFINE, forward="{input} @ {weight}.T"), Affine(3, 2), "forward code[^§]*it never reads 'bias'"
    ),
    "forward code that raises": Wrong(
        tn.Rule(AFFINE, forward="{input} @ {weight}"), Affine(3, 2), "the forward code raises RuntimeError"
    ),
    "saved code that raises": Wrong(
        tn.Rule("output[*s, i] = input[*s, i] * gain[i] * m[*s, i]", saved={"m[*s, i]": "{input}.no"}), Damped(3),
        "saved tensor's code raises AttributeError",
    ),
    "wrong padding": Wrong(
        conv(padding="0"), Conv, r"wrong offset: it is right when moved by \+1 along h \(padding, stride or index\)"
    ),
    "formula that ignores an option": Wrong(
        conv(stride="1"), Conv, r"right for Conv\(inputs=3, outputs=4\), and wrong with stride=2: .* use 'stride'\?"
    ),
    "constant in place of an option": Wrong(DAMPED, Damped, "and wrong with power=2.5: does the rule use 'power'"),
    "text that one option breaks": Wrong(
        "output[*s, i] = (input[*s, i] - input[*s, j] / J) * weight[i]", nn.GroupNorm, "formula|fails"
    ),
    "another kink than torch's": Wrong(
        "output[*s, i] = input[*s, i] * gain[i] if input[*s, i] * gain[i] >= 0 else 0", Rectified,
        r"a kink: the module has no derivative there[^§]*kinks=[^§]*whole numbers",
    ),
    "a saved value that depends on the input": Wrong(
        tn.Rule("output[*s, i] = 3/2 * t[*s, i] * gain[i]", saved={"t[*s, i]": "torch.tanh({input})"}), Damped(3),
        "Jacobian of 'input'[^§]*the formula never reads 'input', and the output depends on it|zero everywhere",
    ),
    "nothing that is usual": Wrong(
        "output[*s, i] = 3/2 * sin(input[*s, i]) * gain[i]", Damped(3), "in its dependence on 'input', 'gain'"
    ),
}  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules(name: str) -> None:
    wrong = WRONG[name]
    try:
        report = tn.verify(wrong.rule, module=wrong.module, quantities=FIRST, check=False)
    except tn.TnError as error:
        said = str(error)
    else:
        assert not report.ok and report.first_wrong is report.rows[-1]
        said = message(report.subject, report.rows[-1])
        assert "tried with" in said
        assert "WRONG" in str(report) and said in str(report)
    assert re.search(wrong.message, said), said


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["missing leg", "native VJP times two", "wrong padding", "wrong sign in a line"])
def test_an_error_says_what_the_report_says(name: str) -> None:
    wrong = WRONG[name]
    report = tn.verify(wrong.rule, module=wrong.module, quantities=FIRST, check=False)
    with pytest.raises(tn.VerificationError, match=wrong.message) as raised:
        tn.verify(wrong.rule, module=wrong.module, quantities=FIRST)
    assert str(raised.value) == message(report.subject, report.rows[-1])


def test_the_first_wrong_entry_is_the_first() -> None:
    """Only the entries of the last output are wrong: the index says so, and both numbers are those of the entry."""
    module = Affine(2, 3)
    report = tn.verify(
        tn.Rule(AFFINE, forward="({input} @ {weight}.T + {bias}) * torch.tensor([1.0, 1.0, 3.0])"),
        module=module, x=torch.ones(2, 2), check=False,
    )  # fmt: skip
    assert report.first_wrong is not None
    found = re.search(
        r"output\[n=0, o=2\]: the code gives (\S+), the module (\S+)  \(2 of 6", report.first_wrong.wrong
    )
    assert found is not None, report
    assert float(found[1]) == pytest.approx(3 * float(found[2]))


def test_text_is_told_with_its_caret() -> None:
    with pytest.raises(tn.RuleError, match=r"unknown tensor 'inptu'[^§]*\^[^§]*did you mean 'input'"):
        tn.verify("output[*s, o] = weight[o, i] * inptu[*s, i] + bias[o]", module=Affine)
    with pytest.raises(tn.RuleError, match="never closed"):
        tn.verify("output[*s, o] = (weight[o, i]", module=Affine)
    with pytest.raises(tn.RuleError, match=r"in the rule of .*Affine"):
        tn.verify("output[*s, o] = weight[o, i, j] * input[*s, i] + bias[o]", module=Affine)
    with pytest.raises(tn.UnsupportedError, match=r"mixes samples: .* is a sum over the batch"):
        tn.verify("m[i] = input[n, i] / N\noutput[n, i] = (input[n, i] - m[i]) * gain[i]", module=Centred)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: tn.verify(AFFINE), r"a rule is verified with its module: verify\(rule, module=MyLayer\)"),
    "an instance where no class fits": (
        lambda: tn.verify(AFFINE, module=nn.Sequential), "the rule reads no argument|unknown tensor 'weight'"
    ),
    "no x": (lambda: tn.verify(nn.Linear(3, 2)), r"a model is verified on a batch: verify\(model, x\)"),
    "wrong shape": (lambda: tn.verify(nn.Linear(3, 2), (4, 5)), r"Linear fails on x \[4, 5\][^§]*Pass x that fits"),
    "wrong shape for a rule": (lambda: tn.verify(AFFINE, (4, 5), module=Affine(3, 2)), r"fails on input \[4, 5\]"),
    "something else": (lambda: tn.verify(3), r"cannot verify int: verify takes a rule"),  # type: ignore[arg-type]
    "a class without a rule": (lambda: tn.verify(Affine), r"cannot verify Affine: verify takes a rule"),  # type: ignore[arg-type]
    "a class that wants modules": (
        lambda: tn.verify("output[*s] = input[*s]", module=nn.TransformerEncoder), r"cannot make a TransformerEncoder"
    ),
    "dropout": (
        lambda: tn.verify(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), (4, 3)), r"another output each time.*eval"
    ),
    "quantities of a program": (
        lambda: tn.verify(tn.compile(nn.Linear(3, 2), None, (torch.randn(2, 3), None), []), quantities=[tn.NTK()]),
        "a program has its own quantities",
    ),
    "unknown rank": (
        lambda: tn.verify("output[...] = input[...] * 2", module=nn.Identity), r"how many axes there are: pass x"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_misuse(name: str) -> None:
    call, text = BAD[name]
    with pytest.raises(tn.TnError, match=text):
        call()


def test_modules_of_a_class() -> None:
    made, left_out = modules(Conv)
    assert [each.changed for each in made] == ["", "kernel=4", "padding=2", "stride=2", ""]
    assert made[-1].text == "Conv(inputs=1, outputs=1)" and not left_out
