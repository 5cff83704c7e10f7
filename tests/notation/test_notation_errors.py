"""Wrong rule text: every message says what is wrong, with a caret under the place."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch

import tnbackprop as tn
from tnbackprop.errors import RuleError, UnsupportedError
from tnbackprop.notation.rule import Rule

from .test_notation import bound

SHAPES: Mapping[str, str | None] = {"input": "N 5", "weight": "2 5", "bias": "2"}
WRONG = [
    # text, message, the text from the caret on
    ("", "the formula is empty|neither formula", None),
    ("output[n, o] = weight[o, i] * * input[n, i]", "not a formula: invalid syntax", "* input[n, i]"),
    ("output[n, o] = (weight[o, i] * input[n, i]", "was never closed", "(weight[o, i] * input[n, i]"),
    ("output[n, o] = weight[o, i] · input[n, i]", "the character '·' is not ASCII", "· input[n, i]"),
    ("output[n, ö] = weight[o, i]", "the character 'ö' is not ASCII", "ö] = weight[o, i]"),
    ("weight[o, i] * input[n, i]", "the form name", "weight[o, i] * input[n, i]"),
    ("output = input[n, i]", r"expected name\[legs\]", "output = input[n, i]"),
    ("output[n, n] = input[n, i]", "leg 'n' is repeated on the left", "n] = input[n, i]"),
    ("output[n, O] = input[n, i]", "'O' is not a leg: capitals are sizes", "O] = input[n, i]"),
    ("output[n, 2*o] = input[n, o]", "an index on the left must be a leg", "2*o] = input[n, o]"),
    (
        "output[n, o] = weigth[o, i] * input[n, i]",
        "unknown tensor 'weigth'(.|\n)*mean 'weight'",
        "weigth[o, i] * input",
    ),
    ("output[n, o] = weight[o, i] * input[n, i] / J", "unknown constant 'J'", "J"),
    ("output[n, i] = input[n, i] * epz", "unknown constant 'epz'(.|\n)*mean 'eps'", "epz"),
    ("output[n, o] = weight[o, i] * bias", "tensor 'bias' needs its legs", "bias"),
    ("output[n, o] = weight[o, i] * input[n, o]", "leg 'o' has size 2 in .* but 5 in .*", "o]"),
    (
        "output[n, o] = weight[o, i, j] * input[n, i]",
        r"'weight' has 2 axes \[2, 5\], but .* names 3",
        "weight[o, i, j]",
    ),
    ("output[n, *s, *t] = input[n, *s, *t]", "no operand tells how many axes", "*s, *t] = input"),
    ("output[n, g.o] = weight[g.o, i] * input[n, i]", "size of leg 'g' does not follow", "g.o] = weight"),
    ("output[n, k] = weight[o, i] * input[n, i]", "leg 'k' is only on the left, and o, i only", "k] = weight"),
    ("output[n, o] = exq(weight[o, i]) * input[n, i]", "unknown function 'exq'(.|\n)*mean 'exp'", "exq(weight"),
    ("output[n, o] = exp(weight[o, i], 2) * input[n, i]", "'exp' takes 1 argument", "exp(weight"),
    ("output[n, o] = (weight[o, i] + bias[o]) * bias[o]", "do not all sum over i", "(weight[o, i] + bias"),
    (
        "output[n, o] = weight[o, i] @ input[n, i]",
        "not part(.|\n)*write weight.*: a leg not on the left",
        "weight[o, i] @",
    ),
    ("output[n, i] = input[n, i]^2", r"'\^' is no power(.|\n)*write output.* = input\[n, i\]\*\*2\n", "^2"),
    ("output[n, i] = input[n, 0:5]", r"a slice is no leg(.|\n)*write j \+ 0 for 0:5, .* leg j of 5 .*J=5", "0:5]"),
    ("output[n, i] = input[n, 1:5:2]", r"a slice is no leg(.|\n)*write 2\*j \+ 1 for 1:5:2, .* of 2 ", "1:5:2]"),
    ("output[n, i] = input[n, 2:]", r"a slice is no leg(.|\n)*write j \+ 2 for 2:, .* of … ", "2:]"),
    ("output[n, i] = input[n, :I]", r"a slice is no leg(.|\n)*write j \+ 2, or 3\*j \+ 2", ":I]"),
    ("oi,ni->no", r"(.|\n)*write output\[n, o\] = weight\[o, i\] \* input\[n, i\]", None),
    ("n i, o i -> n o", r"(.|\n)*write output\[n, o\] = input\[n, i\] \* weight\[o, i\]", None),
    ("oi,...i,o->...o", r"(.|\n)*write output\[\*s, o\] = weight\[o, i\] \* input\[\*s, i\] \* weight2\[o\]", None),
    ("w[o, i], x[n, i] -> y[n, o]", r"(.|\n)*write y\[n, o\] = w\[o, i\] \* x\[n, i\]", None),
    ("output[n, i] = gelu(input[n, i])", r"write input\[n, i\] \* erfc\(-input\[n, i\] / sqrt", "gelu(input"),
    ("output[n, i] = F.silu(2 * input[n, i])", r"write \(2 \* input\[n, i\]\) \* sigmoid\(2 \* input", "F.silu("),
    ("output[n, o] = select(bias[o], i=k) * input[n, i]", "a choice lies at a position", "k) * input"),
    ("output[n, o] = select(bias[o], **i) * input[n, i]", "a choice lies at a position", "i) * input"),
    ("output[n, o] = select(bias[o], i, j=2*o) * input[n, i]", "select has the form", "select(bias"),
    ("output[n, o] = select(bias[o], I=2*o) * input[n, i]", "'I' is not a leg: capitals are sizes", "2*o) * input"),
    ("output[n, o] = select(bias[o], i=2*o + k) * input[n, i]", "size of leg 'k' does not follow", "k) * input"),
    (
        "output[n, o] = relu(input[n, o])",
        r"unknown function 'relu'(.|\n)*write maximum\(input\[n, o\], 0\)",
        "relu(input",
    ),
    ("output[n, o] = sum(input[n, o])", "unknown function 'sum'(.|\n)*not on the left is summed", "sum(input"),
    ("output[n, in] = input[n, in]", "'in' is a word of Python: choose another", "in] = input"),
    ("output(n, i) = input(n, i)", r"legs stand in square brackets: name\[leg", "output(n, i) = input"),
    ("output[n, i] = input[n, i] − eps", "not ASCII(.|\n)*write -", "− eps"),
    ("a[n] = input[n, 0]; output[n, i] = a[n]", "a line for each", "a[n] = input[n, 0]; output"),
    ("output[n, i] = input[n, i] * epz", r"or give it: tn.Rule\(…, constants={'epz'", "epz"),
    ("result[n, i] = input[n, i]", "the last line defines 'result'", "result[n, i]"),
    ("a[n] = input[n, i]\noutput[n, i] = input[n, i]", "'a' is defined but not used", "a[n] = input"),
    ("a[n] = input[n, i]\na[n] = a[n]\noutput[n, i] = a[n]", "'a' is defined twice", "a[n] = a[n]"),
    ("a[n] = b[n]\nb[n] = a[n]\noutput[n, i] = b[n]", "'b' is used before", "b[n]"),
    ("output[n, ..., o] = input[n, o]", "stands alone", "..., o] = input"),
    ("output[n, h] = input[n, stride*h]", "not affine: legs are multiplied|size of leg 'stride'", "stride*h]"),
    ("output[n, h] = input[n, 2*h/3]", "the index is not affine", "2*h/3]"),
    ("output[n, h] = input[n, eps*h]", "integer coefficients, not 5", "eps*h]"),
    ("output[n, h] = input[n, 1 + bias[h]]", "an index cannot read a tensor", "bias[h]]"),
    ("output[n, h] = exp(input[n, h + k - 1]) * bias[k]", "outside of input_h is 0, but", "exp(input"),
    ("output[n, i] = exp(delta[i, i])", "factors, not arguments", "delta[i, i])"),
    ("output[n, i] = 1 if input[n, i] else 0", "a condition is a comparison", "input[n, i] else"),
    ("output[n, i] = 1 / 0 * input[n, i]", "not finite", "1 / 0 * input"),
    ("output[n, i] = input[n, i] * other[i]", "'other' is absent, but a factor", "input[n, i] * other"),
    ("output[n, i] = exp(other[i]) * input[n, i]", "'other' is absent but inside", "other[i])"),
    ("output[n, i] = other[i]", "nothing is left", "other[i]"),
    ("output[n, i] = delta[i] * input[n, i]", "delta takes two legs", "delta[i]"),
    ("output[n, o] = input[n]", "'input' has 2 axes", "input[n]"),
    ("output[n] = input[n, i]**0", "does not depend on", "input[n, i]**0"),
]


@pytest.mark.parametrize(("text", "message", "caret"), WRONG, ids=range(len(WRONG)))
def test_wrong_text_is_told(text: str, message: str, caret: str | None) -> None:
    output = "N 2" if re.search(r"output\[n, (g\.)?[okO]\]", text) else "N" if text.startswith("output[n] ") else "N 5"
    with pytest.raises(RuleError, match=message) as caught:
        bound(Rule(text, constants={"eps": 1e-5}), output, **SHAPES, other=None)
    if caret is not None:
        assert caught.value.column is not None, caught.value
        assert caught.value.text[caught.value.column :].startswith(caret), caught.value


WRITTEN = {
    # what stands in the text -> lines before, and what stands there instead
    "softmax(input[n, i])": ("e[n, i] = exp(input[n, i])", "s[n] = e[n, i]", "e[n, i] / s[n]"),
    "softmax(bias[i] * input[n, i], -1)": ("e[n, i] = exp(bias[i] * input[n, i])", "s[n] = e[n, i]", "e[n, i] / s[n]"),
    "softmax(weight[i, j] * input[n, j])": (
        "h[n, i] = weight[i, j] * input[n, j]", "e[n, i] = exp(h[n, i])", "s[n] = e[n, i]", "e[n, i] / s[n]",
    ),
    "log_softmax(2 * input[n, i])": (
        "e[n, i] = exp(2 * input[n, i])", "s[n] = e[n, i]", "(2 * input[n, i]) - log(s[n])",
    ),
    "logsumexp(bias[j] * input[n, j])": ("e[n, j] = exp(bias[j] * input[n, j])", "s[n] = e[n, j]", "log(s[n])"),
}  # fmt: skip


@pytest.mark.parametrize("function", WRITTEN)
def test_a_softmax_is_written_in_lines(function: str) -> None:
    """The lines that the message has are a formula of the same function."""
    *lines, last = WRITTEN[function]
    left, shapes = (
        "output[n]" if "logsumexp" in function else "output[n, i]",
        {"input": "N 5", "weight": "5 5", "bias": "5"},
    )
    with pytest.raises(RuleError) as caught:
        bound(f"{left} = {function}", "N", **shapes)
    assert caught.value.hint.splitlines()[: len(lines) + 1] == [
        f"write it in lines, and here {last}:", *(f"  {line}" for line in lines),
    ]  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    named = {name: torch.randn(shape, generator=rng) for name, shape in {"weight": (5, 5), "bias": (5,)}.items()}
    text = "\n".join([*lines, f"{left} = {last}"])
    layer = tn.einsum_layer(text, **{name: value for name, value in named.items() if name in text})
    x = torch.randn(3, 5, generator=rng)
    inside = {"weight": x @ named["weight"].T, "bias": x * named["bias"], "2 *": 2 * x, "(input": x}
    value = next(value for key, value in inside.items() if key in function)
    want = getattr(torch, function.partition("(")[0])(value, 1)
    torch.testing.assert_close(layer(x), want)


def test_a_slice_is_written_as_an_index() -> None:
    x = torch.randn(3, 6)
    for text, size, want in [("j + 0", 4, x[:, 0:4]), ("2*j + 1", 2, x[:, 1:5:2]), ("j + 2", 3, x[:, 2:5])]:
        by_constant = tn.einsum_layer(f"output[n, j] = input[n, {text}]", J=size)
        by_tensor = tn.einsum_layer(f"output[n, j] = gain[j] * input[n, {text}]", gain=(size,))
        assert torch.equal(by_constant(x), want) and torch.equal(by_tensor(x), want)


def test_a_text_without_batch_leg_is_told() -> None:
    message = r"'input' has 2 axes \[N, 5\], but input\[i\] names 1(.|\n)*no batch leg: write input\[n, i\]"
    with pytest.raises(RuleError, match=message):
        bound("output[n, i] = input[i]", "N 5", input="N 5")
    with pytest.raises(RuleError, match=r"no batch leg: write output\[n, i, j\]"):
        bound("output[i, j] = input[n, i, j]", "N 5 5", input="N 5 5")
    with pytest.raises(RuleError, match=r"names 1\n  output"):
        bound("output[n] = input[n, i]", "N 5", input="N 5")


def test_a_caret_points_into_the_right_line() -> None:
    text = """output[n, o] = (weight[o, i]
                              * inptu[n, i])"""
    with pytest.raises(RuleError) as caught:
        bound(text, "N 2", **SHAPES)
    assert str(caught.value).splitlines() == [
        "unknown tensor 'inptu'",
        "  * inptu[n, i])",
        "    ^",
        "did you mean 'input'?",
        "in the rule of aten.test in the model",
    ]


MIXING = [
    ("output[...] = input[...]", "4 N", "N 4", "another row-major place"),
    ("output[m, n] = input[n, i] * other[m, i]", "N N", "N 5", "both the batch"),
    ("output[g.o] = input[g.o]", "N.4", "N.4", "grouped axis g.o .* holds the batch"),
    ("output[h, i] = input[h + 1, i]", "N 5", "N 5", "the index h \\+ 1 runs over the batch axis"),
    ("output[n, h] = input[n, h + n]", "N 5", "N 5", "uses the batch leg 'n'"),
    ("mean[i] = input[n, i] / N\noutput[n, i] = input[n, i] - mean[i]", "N 5", "N 5", "is a sum over the batch"),
    ("output[n, i] = input[m, i] * select(other[n, i], m)", "N 5", "N 5", "both the batch"),
]


@pytest.mark.parametrize(("text", "output", "shape", "message"), MIXING)
def test_mixing_samples_is_refused(text: str, output: str, shape: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"aten.test in the model mixes samples: .*{message}"):
        bound(text, output, input=shape, other="N 5")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(), "neither formula nor jacobian"),
        (Rule(jacobian={"inptu": "1"}, legs={"output": "n, c"}), "jacobian names 'inptu'(.|\n)*mean 'input'"),
        (Rule(jacobian={"input": "output[n, c]"}), "legs of 'input' are not known|legs of 'output' are not known"),
        (Rule("output[*s] = input[*s]", vjp={"inptu": "1"}), "vjp names 'inptu'"),
        (Rule("output[*s] = input[*s]", backward={"input, wieght": "1"}), "backward names 'wieght'"),
        (Rule("output[*s] = input[*s]", vjp={"input": "{cot}"}), "unknown tensor 'cot' in the code(.|\n)*cotangent"),
        (Rule("output[*s] = input[*s]", saved={"input[*s]": "1"}), "needs another name"),
        (Rule("output[*s] = input[*s]", legs={"foo": "n"}), "legs names 'foo'"),
        (Rule("output[*s] = k * input[*s]", constants={"k": float("inf")}), "a constant in it is infinite"),
        (Rule("output[*s] = k * input[*s]", constants={"k": float("nan")}), "not a number"),
    ],
)
def test_wrong_rules_are_told(rule: Rule, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        bound(rule, "N 5", input="N 5")
