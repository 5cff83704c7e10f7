"""Rows where they could be silently wrong: kinks, large arguments, NaN, empty targets; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop.rules.activation as activation
from tnbackprop.compiler.capture.export import capture
from tnbackprop.compiler.translate.graph import Call, Value
from tnbackprop.diagram.core import N
from tnbackprop.diagram.derivatives import differentiate
from tnbackprop.errors import RuleError, TnError, UnsupportedError
from tnbackprop.notation.bind import COTANGENT, BoundRule, bind
from tnbackprop.notation.code import Code
from tnbackprop.notation.rule import Rule
from tnbackprop.rules import RULES
from tnbackprop.rules.declared import Declared
from tnbackprop.table import Table

from ..models import Apply
from .test_rules import code, reference

aten = torch.ops.aten
POINTS = torch.tensor(
    [-900.0, -90.0, -20.0, -6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 20.0, 90.0, 900.0]
).double()
SPECIAL = {
    aten.threshold.default: {"threshold": 0.5, "value": 3.0},
    aten.hardtanh.default: {"min_val": -0.5, "max_val": 3.0},
    aten.clamp.default: {"min": -0.5, "max": 3.0},
    aten.clamp_min.default: {"min": -0.5},
    aten.clamp_max.default: {"max": 3.0},
    aten.pow.Tensor_Scalar: {"exponent": 3},
    aten.pow.Scalar: {},
}
# functions with a pole or a domain, and those whose range is beyond float64 at 900
INNER = {
    aten.log.default, aten.log1p.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.exp.default, aten.expm1.default, aten.pow.Scalar, aten.asin.default, aten.acos.default, aten.acosh.default,
}  # fmt: skip


def pointwise_calls() -> list[Any]:
    found = []
    for target in activation.TABLE:
        names = [a.name for a in target._schema.arguments]
        if target == aten.pow.Scalar:
            continue  # its operand is the exponent
        if names[0] == "self" and not {"weight", "dim", "train", "mask"} & set(names):
            found.append(pytest.param(target, id=str(target)))
    return found


def single(target: Any, **arguments: Any) -> Call:
    """A call on one vector of samples."""
    defaults = {a.name: a.default_value for a in target._schema.arguments[1:]}
    x = Value("x", ((N,),), torch.float64, frozenset({"p"}))
    output = Value("out", ((N,),), torch.float64, frozenset({"p"}))
    return Call(target, {"input": x} | defaults | arguments, output)


def slope(call: Call, x: Tensor, y: Tensor) -> Tensor:
    """The diagonal of the Jacobian of the row."""
    rule = bind(RULES[call.target](call), {"input": ((N,),)}, {"input": "x"}, "out", ((N,),), call.where)
    last = rule.equations[-1]
    jacobian = last.jacobians.get("x") or (differentiate(last.diagram, "x") if last.diagram else None)
    assert jacobian is not None
    found = [
        reference(jacobian.diagram, {"x": a[None], "out": b[None]}, 1).squeeze() for a, b in zip(x, y, strict=True)
    ]
    native = [
        code(v, {"x": x, "out": y, COTANGENT: torch.ones_like(x)}) for name, v in rule.vjp.items() if name == "x"
    ]
    for vjp in native:
        torch.testing.assert_close(vjp, torch.stack(found))
    return torch.stack(found)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("target", pointwise_calls())
def test_kinks_and_large_arguments(target: Any) -> None:
    """The derivative is autograd's at every kink, and finite where autograd's is."""
    points = POINTS[(POINTS.abs() < 100) & (POINTS > 0)] if target in INNER else POINTS
    call = single(target, **SPECIAL.get(target, {}))
    x = points.clone().requires_grad_()
    arguments = {k: v for k, v in call.arguments.items() if k != "input"}
    y = target(x, **arguments)
    (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope(call, points, y.detach()), expected, equal_nan=target in INNER)


@pytest.mark.parametrize("target", [aten.relu.default, aten.hardtanh.default, aten.max_pool2d.default], ids=str)
def test_nan_stays_nan(target: Any) -> None:
    """A NaN of the input is not turned into a number by the saved values or the code of a row."""
    x = torch.tensor([[[[1.0, float("nan")], [0.0, 2.0]]]]).double()
    if target != aten.max_pool2d.default:
        assert target(x).isnan().any()
        assert slope(single(target), torch.tensor([float("nan")]).double(), torch.tensor([float("nan")]).double()) == 1
        return
    values, rule = pooled(x, "cpu")
    assert code(rule.forward, values).isnan().all()


def pooled(x: Tensor, device: str) -> tuple[dict[str, Any], BoundRule]:
    """Everything that a maximum over 2 x 2 windows saves, by the rule for this device, and the rule."""
    axes = ((N,), *((size,) for size in x.shape[1:]))
    options = {"kernel_size": (2, 2), "stride": (), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False}
    output = Value("out", (*axes[:2], *((size // 2,) for size in x.shape[2:])), torch.float64)
    call = Call(
        aten.max_pool2d.default, {"input": Value("x", axes, torch.float64, device=device)} | options, output
    )
    rule = bind(RULES[call.target](call), {"input": axes}, {"input": "x"}, "out", output.axes, call.where)
    values: dict[str, Any] = {"x": x}
    for saved in rule.saved:
        values[saved.name] = code(saved.code, values)
    return values, rule


def test_a_maximum_reads_channels_last_on_a_cpu() -> None:
    """The same values and, among equal ones, the same choice as torch's own kernel; row-major again."""
    x = torch.randint(3, (4, 5, 6, 8)).double()
    want = aten.max_pool2d_with_indices(x, [2, 2])
    for device, copied in (("cpu", True), ("cuda", False)):
        values, rule = pooled(x, device)
        assert any("channels_last" in str(saved.code) for saved in rule.saved) == copied
        found = (code(rule.forward, values), values[rule.saved[-1].name])
        for got, expected in zip(found, want, strict=True):
            assert torch.equal(got, expected) and got.is_contiguous()


def refused(
    model: nn.Module, shape: tuple[int, ...], loss: Callable[..., Any] | None = None, y: Tensor | None = None
) -> str:
    """The message of the refusal, by capture, row or bind."""
    x = torch.randn(3, *shape)
    with pytest.raises(UnsupportedError) as caught:
        graph = capture(
            model, loss or (lambda output, target: output.sum()), (x, torch.randn(3) if y is None else y), RULES
        )
        for call in graph.calls:
            row = RULES[call.target](call)
            axes = {name: value.axes for name, value in call.tensors.items()}
            names = {name: value.name for name, value in call.tensors.items()}
            bind(row, axes, names, call.output.name, call.output.axes, call.where)
    return str(caught.value)


def chain(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), Apply(function))


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda t: t[:1], (3,)),
        (lambda t: t[0], (3,)),
        (lambda t: torch.softmax(t, 0), (3,)),
        (lambda t: t - t.mean(0), (3,)),
        (lambda t: F.pad(t, (0, 0, 1, 1)), (3,)),
        (lambda t: t.max(0).values, (3,)),
        (lambda t: t @ t.T, (3,)),
    ],
    ids=["slice", "select", "softmax", "centre", "pad", "max", "gram"],
)
def test_mixing_samples_is_refused(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    assert "samples" in refused(chain(function), shape)


def test_batch_norm_in_train_mode_is_refused() -> None:
    message = refused(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).train(), (3,))
    assert "mixes samples" in message and "BatchNorm1d" in message and "eval()" in message


def test_broadcast_targets_are_refused() -> None:
    """[N, 1] against [N] is [N, N]: every output with every target."""
    assert "samples" in refused(nn.Linear(3, 1), (3,), nn.MSELoss(), torch.randn(3))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_at_its_limits(reduction: str, ignored: int, smoothing: float) -> None:
    """Large logits, and targets that are all ignored (torch: the mean is NaN, its gradient 0)."""
    logits = torch.tensor([[900.0, -900.0], [0.0, 0.0], [1.0, -2.0]]).double()
    target = torch.tensor([0, 1, 1])
    target[:ignored] = -100
    axes: dict[str, Any] = {"input": ((N,), (2,)), "target": ((N,),)}
    call = Call(
        aten.cross_entropy_loss.default,
        {"input": Value("x", axes["input"], torch.float64), "target": Value("y", axes["target"], torch.int64)}
        | {
            "weight": None,
            "reduction": 1 if reduction == "mean" else 2,
            "ignore_index": -100,
            "label_smoothing": smoothing,
        },
        Value("out", (), torch.float64),
    )
    row = RULES[call.target](call)
    rule = bind(row, axes | {"weight": None}, {"input": "x", "target": "y"}, "out", (), call.where)
    env = {"x": logits, "y": target}
    for saved in rule.saved:
        env[saved.name] = code(saved.code, env)
    found = reference(rule.equations[-1].jacobians["x"].diagram, env, 3)
    logits.requires_grad_()
    loss = F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("padding", "message"), [("reflect", "reflect"), ("circular", "circular")])
def test_padding_modes_are_selections(padding: str, message: str) -> None:
    """Every mode of pad has a formula; none is treated as zeros."""
    x = Value("x", ((N,), (4,)), torch.float64)
    call = Call(
        aten.pad.default,
        {"input": x, "pad": (2, 1), "mode": padding, "value": None},
        Value("out", ((N,), (7,)), x.dtype),
    )
    rule = RULES[aten.pad.default](call)
    assert isinstance(rule, Rule) and message in next(iter(rule.saved.values())) and "select" in rule.formula


def test_two_rows_for_a_target_is_an_error() -> None:
    table = Table()
    table.row(Rule("output[...] = input[...]"), aten.relu.default)
    with pytest.raises(RuleError, match="two rules"):
        table.row(Rule("output[...] = input[...]"), aten.relu.default)
    table.rule(aten.relu.default, override=True)(lambda call: "output[...] = input[...]")


def test_every_target_is_an_operator_of_aten() -> None:
    """But for the modules that bring their own rule."""
    assert Declared in RULES
    for target in RULES.keys() - {Declared}:
        assert isinstance(target, torch._ops.OpOverload), target
        assert not target._schema.is_mutable, target


def test_error_of_a_row_is_ours() -> None:
    with pytest.raises(TnError):
        RULES[aten.alpha_dropout.default](single(aten.alpha_dropout.default, p=1.0, train=True))


@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_an_index_is_read_where_the_values_are(there: str) -> None:
    """torch takes an index on the CPU for values on a GPU; where it is looked up or scattered it may not differ."""
    x = Value("x", ((N,), (4,)), torch.float64, device="cuda")
    at = Value("at", ((2,),), torch.int64, device=there)
    out = Value("out", ((N,), (2,)), torch.float64, device="cuda")
    rule = RULES[aten.index.Tensor](Call(aten.index.Tensor, {"input": x, "indices": (None, at)}, out))
    (saved,) = rule.saved.values()
    assert (".to({input}.device)" in saved) == (there == "cpu")


@pytest.mark.parametrize("columns", [(), (3,)])
def test_a_maximum_takes_several_cotangents(columns: tuple[int, ...]) -> None:
    """One, or columns in front of the samples: each is pulled back as torch does, where windows overlap as well."""
    x = torch.randint(3, (4, 5, 7, 9)).double()
    options = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "ceil_mode": False}
    y, index = aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])
    values = Value("x", ((N,), (5,), (7,), (9,)), torch.float64)
    output = Value("y", ((N,), (5,), (4,), (5,)), torch.float64)
    rule = RULES[aten.max_pool2d.default](Call(aten.max_pool2d.default, {"input": values} | options, output))
    g = torch.randint(-3, 4, (*columns, *y.shape)).double()
    got = code(Code.parsed(rule.vjp["input"]), {"index": index, "cotangents": g})
    back = [aten.max_pool2d_with_indices_backward(each, x, [3, 3], [2, 2], [1, 1], [1, 1], False, index)
            for each in g.reshape(-1, *y.shape)]  # fmt: skip
    assert torch.equal(got.reshape(-1, *x.shape), torch.stack(back))
