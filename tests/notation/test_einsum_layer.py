"""tn.einsum_layer: a module from a formula; its forward and gradients against torch, its state, its errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop import RuleError, layer

from .. import oracle, oracle_second
from ..second_order import assert_equal

LINEAR = "output[n, *s, o] = weight[o, i] * input[n, *s, i] + bias[o]"


@dataclass(frozen=True)
class Written:
    """A formula, what it is given, the same in torch, and the shapes of the inputs for N = 4."""

    formula: str
    tensors: dict[str, Any]
    torch: Callable[..., Tensor]
    inputs: tuple[tuple[int, ...], ...]

    def make(self) -> tuple[tn.EinsumLayer, list[Tensor]]:
        torch.manual_seed(0)
        made = tn.einsum_layer(self.formula, **self.tensors).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_()
        return made, [torch.randn(shape, dtype=torch.float64) for shape in self.inputs]


CASES = {
    "linear": Written(LINEAR, {"weight": (2, 3), "bias": (2,)}, lambda m, x: F.linear(x, m.weight, m.bias), ((4, 3),)),
    "positions": Written(
        LINEAR, {"weight": (2, 3), "bias": (2,)}, lambda m, x: F.linear(x, m.weight, m.bias), ((4, 5, 2, 3),)
    ),
    "convolution": Written(
        "output[n, o, h, w] = weight[o, i, k, l] * input[n, i, 2*h + k - 1, w + l] + bias[o]",
        {"weight": (3, 2, 3, 2), "bias": (3,), "H": 3, "W": 4},
        lambda m, x: F.conv2d(x, m.weight, m.bias, (2, 1), (1, 0)),
        ((4, 2, 5, 5),),
    ),
    "layer norm": Written(
        """mean[n, *s] = input[n, *s, i] / I
           centred[n, *s, i] = input[n, *s, i] - mean[n, *s]
           variance[n, *s] = centred[n, *s, i]**2 / I
           output[n, *s, i] = centred[n, *s, i] * (variance[n, *s] + eps)**(-1/2) * weight[i]""",
        {"weight": (5,), "eps": 1e-3},
        lambda m, x: F.layer_norm(x, (5,), m.weight, None, 1e-3),
        ((4, 2, 5),),
    ),
    "two inputs": Written(
        "output[n, o] = weight[o, i, j] * left[n, i] * right[n, j]",
        {"weight": (2, 3, 4)},
        lambda m, left, right: F.bilinear(left, right, m.weight),
        ((4, 3), (4, 4)),
    ),
    "batch on axis 1": Written(
        "output[t, n, o] = weight[o, i] * input[t, n, i]",
        {"weight": (2, 3)},
        lambda m, x: F.linear(x, m.weight),
        ((5, 4, 3),),
    ),
    "star before the batch": Written(
        "output[*s, n, o] = weight[o, i] * input[*s, n, i]",
        {"weight": (2, 3)},
        lambda m, x: F.linear(x, m.weight),
        ((2, 5, 4, 3),),
    ),
    "another name of the batch": Written(
        "output[b, i] = sin(gain[i] * input[b, i])",
        {"gain": (3,)},
        lambda m, x: (m.gain * x).sin(),
        ((4, 3),),
    ),
    "star is the batch": Written(
        "output[*s] = scale * tanh(input[*s]) + shift[]",
        {"shift": (), "scale": 0.5},
        lambda m, x: 0.5 * x.tanh() + m.shift,
        ((4, 3),),
    ),
    "groups": Written(
        "output[n, g.o] = weight[g, o, i] * input[n, g.i]",
        {"weight": (2, 3, 2)},
        lambda m, x: torch.einsum("goi,ngi->ngo", m.weight, x.unflatten(1, (2, 2))).flatten(1),
        ((4, 4),),
    ),
    "buffer": Written(
        "output[n, u] = gain[u] * graph[u, v] * input[n, v]",
        {"gain": (3,), "graph": torch.eye(3).roll(1, 0)},
        lambda m, x: m.gain * (x @ m.graph.T),
        ((4, 3),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str) -> None:
    """Values and both gradients are those of torch, at two batch sizes."""
    case = CASES[name]
    made, inputs = case.make()
    for inputs in (inputs, [x.repeat_interleave(2, _batch(name)) for x in inputs]):  # noqa: B020
        leaves = [x.clone().requires_grad_() for x in inputs]
        got, want = made(*leaves), case.torch(made, *leaves)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        cotangent, wanted = torch.randn_like(want), [*leaves, *made.parameters()]
        pairs = zip(*(torch.autograd.grad(value, wanted, cotangent) for value in (got, want)), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def _batch(name: str) -> int:
    return {"batch on axis 1": 1, "star before the batch": 2}.get(name, 0)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.inputs) == 1 and not _batch(name)])
def test_compiled(name: str) -> None:
    """As a layer of a model: one call with its own rule, and the quantities of the oracles."""
    made, (x,) = CASES[name].make()
    width = x.shape[-1]
    model = nn.Sequential(nn.Linear(width, width), made, nn.Tanh()).double()
    y, loss = torch.randn_like(model(x)), nn.MSELoss()
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchGrad(), tn.Variance(), tn.DiagGGN(), tn.KFLR()])
    assert [call.target for call in program.compiled.graph.calls].count(tn.Declared) == 1
    result = program(x, y)
    for key in ("grad", "batch_grad", "variance"):
        assert_equal(result[key], getattr(oracle, key)(model, loss, x, y), key)
    assert_equal(result["diag_ggn"], oracle_second.diag_ggn(model, loss, x, y), "diag_ggn")
    assert set(result["kflr"]) == set(result["grad"])


def test_captured_as_operations() -> None:
    """Rules without the one for such modules: the forward is torch calls like any other."""
    made, (x,) = CASES["layer norm"].make()
    rules = {target: row for target, row in tn.RULES.items() if target is not tn.Declared}
    y = torch.randn_like(x)
    program = tn.compile(made, nn.MSELoss(), (x, y), [tn.BatchGrad()], rules=rules)
    assert tn.Declared not in [call.target for call in program.compiled.graph.calls]
    want = oracle.batch_grad(made, nn.MSELoss(), x, y)
    assert_equal(program(x, y)["batch_grad"], want, "batch_grad")


def test_embedding() -> None:
    """An input of integers."""
    made = tn.einsum_layer("output[n, t, d] = table[w, d] * select(index[n, t], w)", table=(5, 3)).double()
    index = torch.randint(5, (4, 2))
    assert torch.equal(made(index), made.table[index])
    y, loss = torch.randn(4, 2, 3, dtype=torch.float64), nn.MSELoss()
    result = tn.compute(made, loss, (index, y), [tn.BatchGrad(), tn.DiagGGN()])
    assert_equal(result["batch_grad"], oracle.batch_grad(made, loss, index, y), "batch_grad")
    assert_equal(result["diag_ggn"], oracle_second.diag_ggn(made, loss, index, y), "diag_ggn")


def test_two_inputs_compiled() -> None:
    made, inputs = CASES["two inputs"].make()
    y = torch.randn(4, 2, dtype=torch.float64)
    result = tn.compute(made, nn.MSELoss(), (tuple(inputs), y), [tn.BatchGrad()])["batch_grad"]["weight"]
    for n in range(4):
        output = made(*(x[n : n + 1] for x in inputs))
        (want,) = torch.autograd.grad(F.mse_loss(output, y[n : n + 1]) / 4, made.weight)
        torch.testing.assert_close(result[n], want)


def test_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan for every batch size; another for other shapes."""
    planned: list[int] = []
    original = layer.formula_function

    def counted(*args: Any) -> Any:
        planned.append(1)
        return original(*args)

    monkeypatch.setattr(layer, "formula_function", counted)
    made = tn.einsum_layer("output[n, *s, o] = mine[o, i] * input[n, *s, i]", mine=(2, 3))
    for shape in ((4, 3), (7, 3), (4, 3), (4, 5, 3)):
        assert made(torch.zeros(shape)).shape == (*shape[:-1], 2)
    assert len(planned) == 2


def test_training() -> None:
    """Plain autograd and an optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(tn.einsum_layer(LINEAR, weight=(8, 3), bias=(8,)), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 3)
    y, optimizer = x.prod(1, keepdim=True), torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(F.mse_loss(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 5


def test_state() -> None:
    """Parameters, buffers, constants, and what the state holds; copies and pickles."""
    graph = torch.eye(3)
    made = tn.einsum_layer(
        "output[n, u] = scale * gain[u] * graph[u, v] * input[n, v]", gain=((3,), nn.init.ones_), graph=graph, scale=2
    )
    assert [name for name, _ in made.named_parameters()] == ["gain"]
    assert list(made.state_dict()) == ["gain", "graph"]
    x = torch.randn(4, 3)
    torch.testing.assert_close(made(x), 2 * x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x)) and twin.gain is not made.gain
    other = tn.einsum_layer(made.rule.formula, gain=(3,), graph=torch.zeros(3, 3), scale=2)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(input=x), made(x))


def test_initialisers() -> None:
    """Kaiming's bound 1/√(fan in), as nn.Linear; zeros for one leg; one's own; a parameter as it is."""
    own = nn.Parameter(torch.full((4,), 3.0))
    torch.manual_seed(1)
    made = tn.einsum_layer(
        "output[n, o] = gain[o] * weight[o, i] * input[n, i] + bias[o] + shift[o]",
        weight=(4, 9), bias=(4,), shift=((4,), nn.init.ones_), gain=own,
    )  # fmt: skip
    torch.manual_seed(1)
    assert torch.equal(made.weight, nn.Linear(9, 4).weight)
    assert not made.bias.any() and made.shift.eq(1).all() and made.gain is own
    before = made.weight.clone()
    made.reset_parameters()
    assert not torch.equal(made.weight, before) and made.weight.abs().max() <= 1 / 3 and own.eq(3).all()


GAIN = [
    ("output[n, i] = p[i] * input[n, i]", "ones"),
    ("output[n, i] = input[n, i] / p[i]", "ones"),
    ("output[n, i] = -(2 * p[i]**2) * input[n, i]", "ones"),
    ("output[n, i] = tanh(p[i] * input[n, i])", "ones"),
    ("output[n, i] = p[] * input[n, i]", "ones"),
    ("h[n, i] = p[i] * input[n, i]\noutput[n, i] = h[n, i] + p[i]", "ones"),
    ("output[n, i] = input[n, i] + p[i]", "zeros"),
    ("output[n, i] = input[n, i] + 2 * p[i]", "zeros"),
    ("output[n, i] = (1 + p[i]) * input[n, i]", "zeros"),
    ("output[n, i] = exp(p[i]) * input[n, i]", "zeros"),
    ("output[n] = p[i] * input[n, i]", "uniform"),
]


@pytest.mark.parametrize(("formula", "kind"), GAIN)
def test_a_gain_is_one(formula: str, kind: str) -> None:
    """A factor starts at one, what is added or inside of a function at zero, what is summed over is drawn."""
    p = tn.einsum_layer(formula, p=() if "p[]" in formula else (16,)).p
    if kind == "uniform":
        assert 0.1 < p.abs().max() <= 0.25 and p.unique().numel() == 16
    else:
        assert torch.equal(p, getattr(torch, kind)(p.shape))


def test_tied() -> None:
    """One parameter in two layers is one parameter."""
    first = tn.einsum_layer("output[n, o] = weight[o, i] * input[n, i]", weight=(3, 3))
    second = tn.einsum_layer("output[n, i] = weight[o, i] * tanh(input[n, o])", weight=first.weight)
    model = nn.Sequential(first, second).double()
    x, y = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    result = tn.compute(model, nn.MSELoss(), (x, y), [tn.BatchGrad()])["batch_grad"]
    assert_equal(result, oracle.batch_grad(model, nn.MSELoss(), x, y), "batch_grad")


def test_repr() -> None:
    assert repr(tn.einsum_layer(LINEAR, weight=(8, 5), bias=(8,))) == (
        "EinsumLayer(\n  output[n, *s, o] = weight[o, i] * input[n, *s, i] + bias[o]\n  weight [8, 5], bias [8]\n)"
    )
    assert "mean[n] = input[n, i] / I\n" in repr(
        tn.einsum_layer("mean[n] = input[n, i] / I\n  output[n, i] = gain * (input[n, i] - mean[n])", gain=2.0)
    )


def test_torch_compile() -> None:
    """Dynamo does not trace the planner."""
    made = tn.einsum_layer(LINEAR, weight=(8, 5), bias=(8,))
    x = torch.randn(4, 5)
    torch.testing.assert_close(torch.compile(made, backend="eager")(x), made(x))


# ---------------------------------------------------------------- errors

NO_SHAPE = "(?s)weight=.* is none of what a name can be.*a shape"
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no formula": ("weight * input", {"weight": (2, 3)}, "name.legs. = expression"),
    "empty": ("", {}, "the formula is empty"),
    "no output": ("result[n, o] = weight[o, i] * input[n, i]", {"weight": (2, 3)}, "it must define 'output'"),
    "unknown tensor": (LINEAR, {"weight": (2, 3), "bias": (2,), "wieght": (2, 3)}, "(?s)'wieght' is given.*'weight'"),
    "no axes": ("output[n, i] = input[n, i] + shift", {"shift": ()}, r"without axes is read as shift\[\]"),
    "unknown number": (LINEAR, {"weight": (2, 3), "bias": (2,), "eps": 1e-3}, "'eps' is given, but"),
    "missing parameter": (LINEAR, {"weight": (2, 3)}, r"(?s)'bias' is not given and has no batch leg 'n'.*\^.*bias=\("),
    "missing, other batch": ("output[b, o] = weight[o, i] * input[b, i]", {}, r"'weight' is not given.* leg 'b'"),
    "no batch leg": ("output[o] = weight[o, i] * input[i]", {"weight": (2, 3)},
                     r"(?s)'input' is not given.*the formula has no batch leg: write input\[n, i\] and output\[n, "),
    "no input": ("output[i] = weight[i]", {"weight": (3,)}, "reads no input"),
    "axes": (LINEAR, {"weight": (2, 3, 4), "bias": (2,)}, r"(?s)'weight' has 3 axes \[2, 3, 4\].*names 2.*\^"),
    "sizes": (LINEAR, {"weight": (2, 3), "bias": (3,)}, r"(?s)leg 'o' has size 2 in 'weight' .*but 3 in 'bias'.*\^"),
    "size of a constant": (LINEAR, {"weight": (2, 3), "bias": (2,), "O": 3}, "'o' has size 3 in the constant O but 2"),
    "formula": (3, {}, "formula of a tn.Rule is int, not text"),
    "initialiser fails": (LINEAR, {"weight": (2, 3), "bias": ((2,), nn.init.xavier_uniform_)},
                          r"the initialiser of 'bias' fails on shape \[2\]: Fan in"),
    "initialiser makes another": (LINEAR, {"weight": ((2, 3), torch.randn_like), "bias": (2,)},
                                  "(?s)the initialiser of 'weight' does not fill it in place.*torch.nn.init"),
    "no shape": (LINEAR, {"weight": "2, 3", "bias": (2,)}, NO_SHAPE),
    "size zero": (LINEAR, {"weight": (2, 0), "bias": (2,)}, NO_SHAPE),
    "float size": (LINEAR, {"weight": (2, 3.0), "bias": (2,)}, NO_SHAPE),
    "bool": (LINEAR, {"weight": True, "bias": (2,)}, NO_SHAPE),
    "number for a tensor": (LINEAR, {"weight": (2, 3), "bias": 2}, "'bias' is a number, but the formula reads bias"),
    "taken name": ("output[n, i] = half[i] * input[n, i]", {"half": (3,)}, "'half' is an attribute of every module"),
    "own name": ("output[n, i] = rule[i] * input[n, i]", {"rule": (3,)}, "'rule' is an attribute of every module"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str) -> None:
    formula, tensors, message = BAD[what]
    with pytest.raises(RuleError, match=message):
        tn.einsum_layer(formula, **tensors)


CALLS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "features": ((torch.zeros(4, 2),), RuleError, r"(?s)leg 'i' has size 3 in 'weight' .*but 2 in 'input'.*einsum_l"),
    "axes": ((torch.zeros(3),), RuleError, r"(?s)'input' has 1 axes.*names 2 or more"),
    "no axes": ((torch.zeros(()),), tn.InputError, r"'input' has 0 axes, but the formula says input\[n, \*s, i\]"),
    "nothing": ((), TypeError, "missing a required argument: 'input'"),
    "too much": ((torch.zeros(4, 3), 1), TypeError, "too many positional"),
    "no tensor": (([[1.0, 2.0, 3.0]],), tn.InputError, "'input' is list, not a tensor"),
}


@pytest.mark.parametrize(
    ("formula", "leg"),
    [
        ("output[n, o] = weight[o, i] * input[n, j] + bias[o]", "leg 'i' is summed in 'weight' alone.*mean 'j'"),
        ("output[n, o] = weight[o, i] * sin(input[n, j]) * bias[o]", "leg 'i' is summed in 'weight' alone"),
    ],
)
def test_a_slip_in_a_leg(formula: str, leg: str) -> None:
    """Two sums of one size, each in one factor, are a typing error; in lines of their own they are what they say."""
    made = tn.einsum_layer(formula, weight=(2, 3), bias=(2,))
    with pytest.raises(RuleError, match=f"(?s){leg}.*a line of its own"):
        made(torch.ones(4, 3))
    assert made(torch.ones(4, 5)).shape == (4, 2)
    separate = tn.einsum_layer("s[n] = input[n, j]\noutput[n, o] = weight[o, i] * s[n]", weight=torch.ones(2, 3))
    assert torch.equal(separate(torch.ones(4, 3)), torch.full((4, 2), 9.0))
    pooled = tn.einsum_layer("output[n, c] = gain[c] * input[n, c, h, w]", gain=torch.ones(2))
    assert torch.equal(pooled(torch.ones(4, 2, 3, 3)), torch.full((4, 2), 9.0))


def test_a_scale_that_divides_by_zero() -> None:
    made = tn.einsum_layer("output[n, i] = gain[i] * input[n, i] / (N - 1)", gain=torch.ones(3))
    assert torch.equal(made(torch.ones(3, 3)), torch.full((3, 3), 0.5))
    with pytest.raises(tn.InputError, match=r"divides by zero at this batch size.*: give more samples"):
        made(torch.ones(1, 3))


@pytest.mark.parametrize("what", CALLS)
def test_refused_call(what: str) -> None:
    arguments, kind, message = CALLS[what]
    with pytest.raises(kind, match=message):
        tn.einsum_layer(LINEAR, weight=(2, 3), bias=(2,))(*arguments)
