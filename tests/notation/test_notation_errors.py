"""Wrong rule text: every message says what is wrong, with a caret under the place."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

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
    ("output[n, o] = weight[o, i] @ input[n, i]", "not part of the notation", "weight[o, i] @"),
    ("output[n, o] = select(bias[o], i=k) * input[n, i]", "a choice lies at a position", "k) * input"),
    ("output[n, o] = select(bias[o], **i) * input[n, i]", "a choice lies at a position", "i) * input"),
    ("output[n, o] = select(bias[o], i, j=2*o) * input[n, i]", "select has the form", "select(bias"),
    ("output[n, o] = select(bias[o], I=2*o) * input[n, i]", "'I' is not a leg: capitals are sizes", "2*o) * input"),
    ("output[n, o] = select(bias[o], i=2*o + k) * input[n, i]", "size of leg 'k' does not follow", "k) * input"),
    ("output[n, o] = relu(input[n, o])", r"unknown function 'relu'(.|\n)*maximum\(x, 0\)", "relu(input"),
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
    ("output[n, h] = exp(input[n, h + k - 1]) * bias[k]", "outside of input_1 is 0, but", "exp(input"),
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
