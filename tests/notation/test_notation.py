"""Rule text to diagrams: what bound formulas mean, against numpy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tnbackprop.diagram.core import BATCH, Delta, Leg, Map, N, Selection, Size, Tensor, Window, argument
from tnbackprop.diagram.reference import evaluate
from tnbackprop.notation.bind import COTANGENT, BoundRule, bind
from tnbackprop.notation.code import Code, Hole
from tnbackprop.notation.parse import parse_program
from tnbackprop.notation.rule import Rule

Array = NDArray[Any]
BATCH_SIZE = 3
LINEAR = "output[n, *s, o] = weight[o, i] * input[n, *s, i] + bias[o]"
CONV2D = """output[n, g.o, h, w] = (weight[g.o, i, k, l]
              * input[n, g.i, s0*h + d0*k - p0, s1*w + d1*l - p1] + bias[g.o])"""
LAYER_NORM = """mean[n, *s] = input[n, *s, i] / I
                centred[n, *s, i] = input[n, *s, i] - mean[n, *s]
                variance[n, *s] = centred[n, *s, i]**2 / I
                output[n, *s, i] = centred[n, *s, i] * (variance[n, *s] + eps)**(-1/2) * weight[i] + bias[i]"""
SOFTMAX_JACOBIAN = "output[n,c] * (delta[c,k] - output[n,k])"


def axes(text: str) -> tuple[tuple[Size, ...], ...]:
    """ "N.4 5" is ((N, 4), (5,)); "" is a scalar."""
    return tuple(tuple(N if f == "N" else int(f) for f in axis.split(".")) for axis in text.split())


def bound(rule: Rule | str, output: str, **operands: str | None) -> BoundRule:
    """Bind with runtime value names "{operand}_value" and "y"."""
    shapes = {name: None if text is None else axes(text) for name, text in operands.items()}
    return bind(rule, shapes, {name: f"{name}_value" for name in operands}, "y", axes(output), "aten.test in the model")


def run(rule: BoundRule, **values: Array) -> Array:
    """All equations in order; the value of the last."""
    known: dict[str, Array] = {f"{name}_value": value for name, value in values.items()}
    for equation in rule.equations:
        assert equation.diagram is not None
        known[equation.name] = evaluate(equation.diagram, known, BATCH_SIZE)
    return known["y"]


def integers(*shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).integers(-4, 5, shape).astype(np.float64)


def normal(*shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(1).normal(size=shape)


# --- what formulas mean -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "output", "value"),
    [
        ("N 5", "N 2", (3, 5)),
        ("N 4 5", "N 4 2", (3, 4, 5)),
        ("4 N 5", "4 N 2", (4, 3, 5)),
        ("N.4 5", "N.4 2", (12, 5)),
        ("4.N.2 5", "4.N.2 2", (24, 5)),
        ("N.1 5", "N 2", (3, 5)),
    ],
)
def test_linear(shape: str, output: str, value: tuple[int, ...]) -> None:
    rule = bound(LINEAR, output, input=shape, weight="2 5", bias="2")
    x, w, b = integers(*value), integers(2, 5), integers(2)
    assert np.array_equal(run(rule, input=x, weight=w, bias=b).reshape(*value[:-1], 2), x @ w.T + b)
    assert BATCH in rule.equations[-1].legs
    assert sum(leg.size == N for leg in rule.equations[-1].legs) == 1


def test_absent_bias_drops_its_term() -> None:
    rule = bound(LINEAR, "N 2", input="N 5", weight="2 5", bias=None)
    x, w = integers(3, 5), integers(2, 5)
    assert np.array_equal(run(rule, input=x, weight=w), x @ w.T)
    assert set(rule.legs) == {"input_value", "weight_value"}


def convolution(x: Array, w: Array, b: Array, s: list[int], d: list[int], p: list[int], groups: int) -> Array:
    """By loops over the output positions."""
    x = np.pad(x, [(0, 0), (0, 0), *((q, q) for q in p)])
    size = [(x.shape[2 + a] - d[a] * (w.shape[2 + a] - 1) - 1) // s[a] + 1 for a in (0, 1)]
    out = np.zeros((len(x), len(w), *size))
    for o in range(len(w)):
        first = o // (len(w) // groups) * w.shape[1]
        for h, v in np.ndindex(*size):
            rows = h * s[0] + d[0] * np.arange(w.shape[2])
            columns = v * s[1] + d[1] * np.arange(w.shape[3])
            patch = x[:, first : first + w.shape[1]][:, :, rows][..., columns]
            out[:, o, h, v] = (patch * w[o]).sum((1, 2, 3)) + b[o]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("s", "d", "p"), [([1, 1], [1, 1], [0, 0]), ([2, 1], [1, 2], [1, 2]), ([3, 2], [2, 1], [0, 1])]
)
def test_conv2d(s: list[int], d: list[int], p: list[int], groups: int) -> None:
    x, w, b = integers(3, 4, 7, 8), integers(8, 4 // groups, 3, 2), integers(8)
    expected = convolution(x, w, b, s, d, p, groups)
    constants = {"s0": s[0], "s1": s[1], "d0": d[0], "d1": d[1], "p0": p[0], "p1": p[1]}
    shapes = {"input": "N 4 7 8", "weight": f"8 {4 // groups} 3 2", "bias": "8"}
    rule = bound(Rule(CONV2D, constants=constants), "N 8 " + " ".join(map(str, expected.shape[2:])), **shapes)
    value = run(rule, input=x, weight=w, bias=b)
    assert np.array_equal(value.reshape(expected.shape), expected)
    assert [leg.name for leg in rule.legs["weight_value"]] == ["g", "o", "i", "k", "l"]


def test_conv1d_image_legs_and_windows() -> None:
    text = "output[n, o, h] = weight[o, i, k] * input[n, i, 2*h + k - 1]"
    rule = bound(text, "N 2 4", input="N 3 8", weight="2 3 3")
    x, w = integers(3, 3, 8), integers(2, 3, 3)
    expected = convolution(x[:, :, None], w[:, :, None], np.zeros(2), [1, 2], [1, 1], [0, 1], 1)[:, :, 0]
    assert np.array_equal(run(rule, input=x, weight=w), expected)
    assert str(rule.equations[0].diagram) == (
        "[n,o,h] = Σ_{i,k,input_h} weight_value[o,i,k] input_value[n,i,input_h] Π[input_h=2·h+k-1]"
    )


def test_average_pool_gives_the_size_of_its_window() -> None:
    rule = bound(Rule("output[*s, h] = input[*s, 2*h + k - 1] / K", constants={"K": 3}), "N 2 4", input="N 2 8")
    x = np.pad(integers(3, 2, 8), [(0, 0), (0, 0), (1, 1)])
    expected = np.stack([x[..., 2 * h : 2 * h + 3].mean(-1) for h in range(4)], -1)
    np.testing.assert_allclose(run(rule, input=integers(3, 2, 8)), expected, rtol=1e-14, atol=1e-15)


def test_groups_are_solved_from_shapes_or_given() -> None:
    text = "output[n, g.o] = input[n, g.o] * weight[g]"
    rule = bound(text, "N 6", input="N 6", weight="3")
    x, w = integers(3, 6), integers(3)
    assert np.array_equal(run(rule, input=x, weight=w).reshape(3, 6), x * np.repeat(w, 2))
    text = "output[n, o] = input[n, g.o] / G"
    rule = bound(Rule(text, constants={"G": 2}), "N 3", input="N 6")
    assert np.array_equal(run(rule, input=x), x.reshape(3, 2, 3).mean(1))


@pytest.mark.parametrize(("shape", "value"), [("N 6", (3, 6)), ("N 2 6", (3, 2, 6)), ("2 N 6", (2, 3, 6))])
def test_layer_norm(shape: str, value: tuple[int, ...]) -> None:
    rule = bound(Rule(LAYER_NORM, constants={"eps": 1e-5}), shape, input=shape, weight="6", bias="6")
    x, w, b = normal(*value), normal(6), integers(6)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(run(rule, input=x, weight=w, bias=b), expected, rtol=1e-12)
    assert [e.name for e in rule.equations] == ["y:mean", "y:centred", "y:variance", "y"]


def test_piecewise_says_the_kink() -> None:
    text = "output[*s] = input[*s] if input[*s] > 0 else slope * input[*s]"
    rule = bound(Rule(text, constants={"slope": 0.01}, kinks="slope at 0"), "N 4", input="N 4")
    x = integers(3, 4)
    assert np.array_equal(run(rule, input=x), np.where(x > 0, x, 0.01 * x))
    (operand,) = rule.equations[0].diagram.products[0].operands  # type: ignore[union-attr]
    assert isinstance(operand, Map)
    slopes = operand.expr.diff(argument(0))
    assert [float(slopes.subs(argument(0), at)) for at in (-1, 0, 1)] == [0.01, 0.01, 1]
    assert rule.kinks == "slope at 0"


def test_softmax_program_divides_and_sums_a_map() -> None:
    text = """weight[n, c] = exp(input[n, c])
              total[n] = weight[n, c]
              output[n, c] = weight[n, c] / total[n]"""
    x = normal(3, 5)
    expected = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(run(bound(text, "N 5", input="N 5"), input=x), expected, rtol=1e-14)
    short = "output[n] = exp(input[n, c])"
    np.testing.assert_allclose(run(bound(short, "N", input="N 5"), input=x), np.exp(x).sum(1), rtol=1e-14)


def test_select_nearby() -> None:
    """``select(index[h], y=2*h + k)`` is the same selection, and knows where the choice lies."""
    text = "output[n, h] = select(index[n, h], y=2*h + k - 1) * input[n, y]"
    rule = bound(Rule(text, constants={"K": 3}), "N 4", input="N 7", index="N 4")
    x, index = integers(3, 7), np.array([[0, 2, 3, 6], [1, 1, 4, 5], [0, 3, 5, 6]])
    assert np.array_equal(run(rule, input=x, index=index), np.take_along_axis(x, index, 1))
    (diagram,) = (equation.diagram for equation in rule.equations)
    assert diagram is not None
    (selection,) = (op for op in diagram.products[0].operands if isinstance(op, Selection))
    ((window,), (choice,)) = selection.near, selection.choice
    assert (window.image, window.offset) == (choice, -1)
    assert [(c, leg.size) for c, leg in window.terms] == [(2, 4), (1, 3)]
    wrong = np.array([[0, 5, 3, 6]] * 3)  # position 1 has its window at 1, 2 and 3: for the reference that is nothing
    assert np.array_equal(run(rule, input=x, index=wrong)[:, 1], np.zeros(3))
    renamed = selection.rename({choice: Leg("z", 7)})
    assert renamed.near[0].image == renamed.choice[0] == Leg("z", 7)


def test_select_reads_where_the_index_says() -> None:
    text = "output[n, c, h] = input[n, c, y, x] * select(index[n, c, h], y, x)"
    rule = bound(text, "N 2 5", input="N 2 3 4", index="N 2 5")
    x, index = integers(3, 2, 3, 4), np.random.default_rng(2).integers(0, 12, (3, 2, 5))
    expected = np.take_along_axis(x.reshape(3, 2, 12), index, 2)
    assert np.array_equal(run(rule, input=x, index=index), expected)


def test_embedding() -> None:
    rule = bound("output[*s, d] = weight[v, d] * select(input[*s], v)", "N 4 2", input="N 4", weight="7 2")
    index, w = np.random.default_rng(3).integers(0, 7, (3, 4)), integers(7, 2)
    assert np.array_equal(run(rule, input=index, weight=w), w[index])
    assert any(isinstance(op, Selection) for op in rule.equations[0].diagram.products[0].operands)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "output", "legs"),
    [("N 4 6", "N 24", "n r_1"), ("N 4 6", "N.4 6", "n r_1"), ("2 N 3", "2.N.3", "r_0 n r_2"), ("4 6", "24", "r")],
)
def test_row_major(shape: str, output: str, legs: str) -> None:
    rule = bound("output[...] = input[...]", output, input=shape)
    assert [leg.name for leg in rule.equations[0].legs] == legs.split()
    x = integers(*[3 if f == "N" else int(f) for f in re.split(r"[ .]", shape)])
    assert np.array_equal(run(rule, input=x).ravel(), x.ravel())


def test_constant_index_and_flip_and_diagonal() -> None:
    x = integers(3, 4)
    rule = bound(Rule("output[n] = input[n, k]", constants={"k": 2}), "N", input="N 4")
    assert np.array_equal(run(rule, input=x), x[:, 2])
    assert np.array_equal(run(bound("output[n] = input[n, 0]", "N", input="N 4"), input=x), x[:, 0])
    assert np.array_equal(run(bound("output[n, i] = input[n, I - 1 - i]", "N 4", input="N 4"), input=x), x[:, ::-1])
    square = integers(3, 4, 4)
    diagonal = np.einsum("nii->ni", square)
    assert np.array_equal(run(bound("output[n, i] = input[n, i, i]", "N 4", input="N 4 4"), input=square), diagonal)
    trace = bound("output[n] = sqrt(input[n, i, i]**2)", "N", input="N 4 4")
    np.testing.assert_allclose(run(trace, input=square), np.abs(diagonal).sum(1))


def test_transposed_convolution_scatters_with_a_delta() -> None:
    text = "output[n, o, y] = weight[i, o, k] * input[n, i, h] * delta[y, 2*h + k - 1] + bias[o]"
    rule = bound(text, "N 2 7", input="N 3 4", weight="3 2 3", bias="2")
    x, w, b = integers(3, 3, 4), integers(3, 2, 3), integers(2)
    expected = np.zeros((3, 2, 9)) + b[:, None]
    for h, k in np.ndindex(4, 3):
        expected[:, :, 2 * h + k] += x[:, :, h] @ w[:, :, k]
    assert np.array_equal(run(rule, input=x, weight=w, bias=b), expected[:, :, 1:8])


def test_equal_indices_share_an_image_leg() -> None:
    text = "output[n, h] = input[n, 2*h + k]**2 * input[n, 2*h + k] * w[k]"
    rule = bound(text, "N 3", input="N 8", w="2")
    operands = rule.equations[0].diagram.products[0].operands  # type: ignore[union-attr]
    assert sum(isinstance(op, Window) for op in operands) == 1
    x, w = integers(3, 8), integers(2)
    assert np.array_equal(run(rule, input=x, w=w), sum(w[k] * x[:, k : 5 + k : 2] ** 3 for k in (0, 1)))


def test_numbers_are_exact_and_capitals_are_sizes() -> None:
    rule = bound(Rule("output[] = scale * input[n, *s] / N / S + 0.1", constants={"scale": 0.1}), "", input="N 2 3")
    x = normal(3, 2, 3)
    np.testing.assert_allclose(run(rule, input=x), 0.1 * x.mean() + 0.1)
    scales = [p.scale for p in rule.equations[0].diagram.products]  # type: ignore[union-attr]
    assert float(scales[0].subs(N, 1) * 6) == 0.1
    assert str(scales[1]) == "1/10"


def test_brackets_are_multiplied_out() -> None:
    rule = bound("output[n] = (a[n, i] - b[i]) * (a[n, i] + 2*b[i]) / 2", "N", a="N 4", b="4")
    a, b = integers(3, 4), integers(4)
    assert np.array_equal(run(rule, a=a, b=b), ((a - b) * (a + 2 * b)).sum(1) / 2)
    assert len(rule.equations[0].diagram.products) == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("exp(x)", np.exp),
        ("sigmoid(x)", lambda x: 1 / (1 + np.exp(-x))),
        ("x * sigmoid(x)", lambda x: x / (1 + np.exp(-x))),
        ("softplus(x)", lambda x: np.logaddexp(x, 0)),
        ("logsigmoid(x)", lambda x: -np.logaddexp(-x, 0)),
        ("maximum(x, 0) + minimum(x, 1)", lambda x: np.maximum(x, 0) + np.minimum(x, 1)),
        ("abs(x) * sign(x)", lambda x: x),
        ("x if -1 < x < 1 else (1 if x >= 1 else -1)", lambda x: np.clip(x, -1, 1)),
        ("1 if not (x > 0 or x < -1) else 0", lambda x: ((x <= 0) & (x >= -1)) * 1.0),
        ("x / (1 + abs(x))", lambda x: x / (1 + np.abs(x))),
    ],
)
def test_functions(text: str, function: object) -> None:
    formula = "output[*s] = " + re.sub(r"\bx\b", "input[*s]", text)
    x = np.concatenate([normal(3, 4) * 3, [[-800, 0, 1, 800]] * 3], 1)[:, : 7 if "exp" in text else 8]
    x = np.clip(x, -20, 20) if "exp" in text else x
    rule = bound(formula, f"N {x.shape[1]}", input=f"N {x.shape[1]}")
    assert callable(function)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(run(rule, input=x), function(x), rtol=1e-13, atol=1e-300)


def test_a_function_of_one_read_is_one_map() -> None:
    rule = bound("output[*s] = input[*s] * (1 + erf(input[*s] / sqrt(2))) / 2", "N 4", input="N 4")
    (product,) = rule.equations[0].diagram.products  # type: ignore[union-attr]
    assert [type(op) for op in product.operands] == [Map]
    linear = bound("output[*s] = 2 * (input[*s] + 1) - input[*s]", "N 4", input="N 4")
    assert not any(isinstance(op, Map) for p in linear.equations[0].diagram.products for op in p.operands)  # type: ignore[union-attr]
    x = integers(3, 4)
    assert np.array_equal(run(linear, input=x), x + 2)


def test_legs_of_size_one_are_free() -> None:
    x, w = integers(3, 4), integers(3, 1)
    rule = bound("output[n, a] = 2 * (input[n, a] - other[n, u])", "N 4", input="N 4", other="N 1")
    assert np.array_equal(run(rule, input=x, other=w), 2 * (x - w))
    keepdim = bound("output[n, u] = input[n, a] / A", "N 1", input="N 4")
    assert np.array_equal(run(keepdim, input=x), x.mean(1, keepdims=True))
    expand = bound("output[n, a] = other[n, u]", "N 4", other="N 1")
    assert np.array_equal(run(expand, other=w), np.repeat(w, 4, 1))


def test_a_constant_may_be_a_size_with_the_batch() -> None:
    rule = bound(Rule("output[n] = input[n] / count", constants={"count": 2 * N}), "N", input="N")
    assert np.array_equal(run(rule, input=integers(3)), integers(3) / 6)


# --- declared Jacobians, saved tensors, code ----------------------------------------------------------------


def test_declared_softmax_jacobian() -> None:
    rule = bound(
        Rule(jacobian={"input": SOFTMAX_JACOBIAN}, legs={"input": "n, k", "output": "n, c"}), "N 4", input="N 4"
    )
    (equation,) = rule.equations
    assert equation.diagram is None
    jacobian = equation.jacobians["input_value"]
    assert jacobian.diagram.legs == jacobian.out + jacobian.into
    assert [leg.name for leg in jacobian.into] == ["n'", "k'"]
    p = np.abs(normal(3, 4))
    expected = np.einsum("nc,ck,nm->ncmk", p, np.eye(4), np.eye(3)) - np.einsum("nc,nk,nm->ncmk", p, p, np.eye(3))
    np.testing.assert_allclose(evaluate(jacobian.diagram, {"y": p}, BATCH_SIZE), expected)


def test_declared_elementwise_jacobian_with_a_formula() -> None:
    rule = bound(Rule("output[*s] = tanh(input[*s])", {"input": "1 - output[*s]**2"}), "N.2 3", input="N.2 3")
    jacobian = rule.equations[0].jacobians["input_value"]
    assert [leg.name for leg in jacobian.out] == ["n", "s0_1", "s1"]
    assert all(sum(isinstance(op, Delta) for op in p.operands) == 3 for p in jacobian.diagram.products)
    y = normal(3, 2, 3)
    value = evaluate(jacobian.diagram, {"y": y}, BATCH_SIZE).reshape(18, 18)
    np.testing.assert_allclose(value, np.diag((1 - y**2).ravel()))


def test_saved_and_code_placeholders() -> None:
    rule = bound(
        Rule(
            "output[*s] = input[*s] * mask[*s]",
            saved={"mask[*s]": "torch.rand_like({input}) > 0.5"},
            forward="{input} * {mask}",
            vjp={"input": "{cotangent} * {mask} + {output} + {bias}"},
        ),
        "N 4",
        input="N 4",
        bias=None,
    )
    assert rule.saved[0].name == "y:mask"
    assert rule.saved[0].code == Code.parsed("torch.rand_like({input_value}) > 0.5")
    assert [leg.name for leg in rule.saved[0].legs] == ["n", "s1"]
    value, mask = Hole("input_value"), Hole("y:mask")
    assert rule.forward == Code.of(value, " * ", mask)
    vjp = Code.of(Hole(COTANGENT), " * ", mask, " + ", Hole("y"), " + ", "None")
    assert dict(rule.vjp) == {"input_value": vjp}
    assert rule.equations[0].diagram is not None
    tensors = [op.name for op in rule.equations[0].diagram.products[0].operands if isinstance(op, Tensor)]
    assert tensors == ["input_value", "y:mask"]


def test_a_leg_called_n_that_is_not_the_batch_is_renamed() -> None:
    rule = bound("output[n, m] = input[n, m]", "4 N", input="4 N")
    assert [leg.name for leg in rule.equations[0].legs] == ["n_", "n"]


def test_parsing_is_cached() -> None:
    assert parse_program(LINEAR) is parse_program(LINEAR)
