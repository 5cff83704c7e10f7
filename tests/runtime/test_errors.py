"""Bad input: each message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.errors import InputError, RuleError, TnError, UnsupportedError

from ..models import Apply, Written

Loss = Callable[[Tensor, Tensor], Tensor] | None
MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
X, Y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


@pytest.fixture(scope="module")
def program() -> tn.Program:
    return tn.compile(MODEL, nn.MSELoss(), (X, Y), [tn.Grad()])


# ---------------------------------------------------------------- calls of a program

CALLS: dict[str, tuple[Any, Any, str]] = {
    "dtype": (X.float(), Y, r"input 'x' has dtype torch.float32, but .* torch.float64.*compile again"),
    "dtype of y": (X, Y.long(), r"input 'y' has dtype torch.int64, but .* torch.float64"),
    "features": (X[:, :2], Y, r"input 'x' has shape \[5, 2\], but .* \[N, 3\].*compile again"),
    "rank": (X[None], Y, r"input 'x' has shape \[1, 5, 3\], but .* \[N, 3\]"),
    "scalar": (X[0, 0], Y, r"input 'x' has shape \[\], but .* \[N, 3\]"),
    "batch sizes": (X, Y[:4], r"input 'y' has 4 samples, but 'x' has 5"),
    "empty batch": (X[:0], Y[:0], r"the batch is empty"),
    "no y": (X, None, r"input 'y' is NoneType, not a tensor"),
    "dict instead of tensor": ({"x": X}, Y, r"structure"),
    "tuple instead of tensor": ((X, X), Y, r"structure"),
    "array instead of tensor": (X.numpy(), Y, r"input 'x' is ndarray, not a tensor"),
    "number instead of tensor": (X, 3, r"input 'y' is int, not a tensor"),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("what", CALLS)
def test_calls(program: tn.Program, what: str) -> None:
    x, y, message = CALLS[what]
    with pytest.raises(InputError, match=message):
        program(x, y)


def test_a_good_call_after_a_bad_one(program: tn.Program) -> None:
    before = program(X, Y)["grad"]["0.weight"]
    with pytest.raises(InputError):
        program(X, Y[:4])
    assert torch.equal(program(X, Y)["grad"]["0.weight"], before)


def test_unknown_quantity(program: tn.Program) -> None:
    with pytest.raises(InputError, match=r"no quantity 'variance' in this result; it has: grad"):
        program(X, Y)["variance"]


def test_what_torch_raises_in_a_program() -> None:
    """A class that is none, a dtype that no kernel has: with the layer and the line of the source."""
    classes = torch.zeros(5, dtype=torch.long)
    program = tn.compile(MODEL, nn.CrossEntropyLoss(), (X, classes), [tn.Grad()])
    with pytest.raises(InputError, match=r"(?s)fails in loss: cross_entropy_loss.default: .*out of bounds.*line \d+"):
        program(X, classes + 7)


class Centred(nn.Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return (input - target).square().sum() / (input.shape[0] - 1)


@dataclass(frozen=True)
class Sample(tn.Quantity):
    """The variance of a sample: it divides by N - 1."""

    name: str = "sample"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        D = ((J.T @ g) - (J.T @ g).sum("n") / tn.N).part()
        return (D * D).sum("n") / (tn.N - 1)


@pytest.mark.parametrize("where", ["loss", "quantity"])
def test_a_scale_that_divides_by_zero(where: str) -> None:
    """1/(N - 1) is right for every batch but that of one sample."""
    rules = tn.RULES | {Centred: "output[] = (input[n, c] - target[n, c])**2 / (N - 1)"}
    loss: nn.Module = Centred() if where == "loss" else nn.MSELoss()
    program = tn.compile(MODEL, loss, (X, Y), [Sample()] if where == "quantity" else [tn.Grad()], rules=rules)
    result = program(X, Y)
    assert all(bool(value.isfinite().all()) for by in result.values() for value in by.values())
    place = "loss" if where == "loss" else "sample of "
    with pytest.raises(InputError, match=rf"(?s)fails in {place}.*divides by zero at this batch size.*more samples"):
        program(X[:1], Y[:1])


SEEDS: list[dict[str, Any]] = [{"seed": "a"}, {"seed": 1.5}, {"seed": True}, {"seed": 2**70}, {"generator": 3}]


@pytest.mark.parametrize("options", SEEDS, ids=str)
def test_seeds(program: tn.Program, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"(seed|generator)=.*: give seed= a whole number of 64 bits, or gen"):
        program(X, Y, **options)
    with pytest.raises(InputError, match=r"seed=1 and a generator: give one of them"):
        program(X, Y, seed=1, generator=torch.Generator())


def test_seeds_of_numpy(program: tn.Program) -> None:
    program(X, Y, seed=np.random.default_rng(0).integers(2**31))


def test_the_model_has_other_layers_now() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    program = tn.compile(model, nn.MSELoss(), (X, Y), [tn.Grad()])
    model[0], model[1] = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
    with pytest.raises(InputError, match=r"'0.weight' has shape \[5, 3\] now, but .* \[4, 3\]: compile again"):
        program(X, Y)
    del model[1]
    model[0] = nn.Linear(3, 4).double()
    with pytest.raises(InputError, match=r"no parameter '1.weight' any more: compile again"):
        program(X, Y)


# ---------------------------------------------------------------- compilation


@dataclass(frozen=True)
class Bad:
    """A model or loss that cannot be compiled, and what the message must say."""

    error: type[TnError]
    message: str
    model: Callable[[], nn.Module] = lambda: MODEL
    loss: Callable[[], Loss] = nn.MSELoss
    x: Tensor = X
    y: Tensor = Y
    quantities: tuple[tn.Quantity, ...] = (tn.Grad(),)


class Regularised(nn.Module):
    """The output and the squared norm of a parameter, for the loss to add."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer.weight.square().sum()


def mixed(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 2), Apply(function)).double()


BAD = {
    "train mode batch norm": Bad(
        UnsupportedError,
        r"(?s)module '1' \(BatchNorm1d\).*mixes samples.*model.eval\(\)",
        lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().train(),
    ),
    "softmax over samples": Bad(UnsupportedError, r"(?s)module '1'.*mix samples", mixed(lambda t: torch.softmax(t, 0))),
    "samples minus their mean": Bad(UnsupportedError, "mixes samples", mixed(lambda t: t - t.mean(0))),
    "flipped samples": Bad(UnsupportedError, "mix|sample", mixed(lambda t: t.flip(0))),
    "sum of two samples": Bad(UnsupportedError, "mix|sample", mixed(lambda t: t + t.roll(1, 0))),
    "complex input": Bad(TnError, "complex", x=X.to(torch.complex128)),
    "complex parameter": Bad(TnError, "complex", lambda: nn.Linear(3, 2).to(torch.complex128)),
    "loss of every sample": Bad(TnError, r"(?s)scalar.*reduction|scalar", loss=lambda: nn.MSELoss(reduction="none")),
    "regulariser": Bad(
        UnsupportedError,
        r"(?s)layer.weight.*belongs to no sample.*without it",
        lambda: Regularised().double(),
        lambda: Written(lambda f, y: F.mse_loss(f[0], y) + f[1]),
    ),
    "square root of the mean": Bad(
        UnsupportedError,
        "not a sum over samples|not linear",
        loss=lambda: Written(lambda f, y: F.mse_loss(f, y).sqrt()),
    ),
    "product of two means": Bad(
        UnsupportedError,
        "not a sum over samples|not linear",
        loss=lambda: Written(lambda f, y: F.mse_loss(f, y) * F.l1_loss(f, y)),
    ),
    "mean plus sum": Bad(
        UnsupportedError,
        "both averages and sums",
        loss=lambda: Written(lambda f, y: F.mse_loss(f, y) + (f - y).abs().sum()),
        quantities=(tn.SecondMoment(),),
    ),
    "batch sizes": Bad(TnError, "sample|batch", y=Y[:4]),
    "empty batch": Bad(InputError, "empty", x=X[:0], y=Y[:0]),
    "no name": Bad(InputError, "NaturalGradientSMW: name=0.1: the key in the result is a text",
                   quantities=(tn.NaturalGradientSMW(0.1),)),  # type: ignore[arg-type]
    "two of one name": Bad(InputError, "two quantities are called 'grad'", quantities=(tn.Grad(), tn.Grad())),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("what", BAD)
def test_compilation(what: str) -> None:
    bad = BAD[what]
    with pytest.raises(bad.error, match=bad.message) as raised:
        tn.compile(bad.model(), bad.loss(), (bad.x, bad.y), bad.quantities)
    assert "Traceback" not in str(raised.value)


def test_two_of_a_kind_stand_side_by_side() -> None:
    quantities = (
        tn.Variance(),
        tn.Variance("centred", centred=True),
        tn.BatchGrad(),
        tn.BatchGrad("raw", tn.Scale.UNSCALED),
    )
    result = tn.compute(MODEL, nn.MSELoss(), (X, Y), quantities)
    assert list(result) == ["variance", "centred", "batch_grad", "raw"]
    torch.testing.assert_close(result["raw"]["0.bias"], 5 * result["batch_grad"]["0.bias"])
    torch.testing.assert_close(result["centred"]["0.bias"], result["variance"]["0.bias"])


def test_quantities_without_a_loss_are_refused() -> None:
    """Not zeros."""
    with pytest.raises(TnError, match="loss"):
        tn.compile(MODEL, None, (X, Y), [tn.Grad()])


def test_a_program_without_a_loss() -> None:
    result = tn.compile(MODEL, None, (X, None), [])(X)
    assert result.loss is None
    torch.testing.assert_close(result.output, MODEL(X).detach())


def test_nothing_to_differentiate() -> None:
    """All parameters frozen: a quantity without entries is refused; the loss alone is not."""
    model = nn.Linear(3, 2).double().requires_grad_(False)
    with pytest.raises(InputError, match=r"grad: all 2 parameters of Linear are frozen.*\n.*requires_grad_\(True\)"):
        tn.compute(model, nn.MSELoss(), (X, Y), [tn.Grad()])
    result = tn.compute(model, nn.MSELoss(), (X, Y), [])
    torch.testing.assert_close(result.loss, nn.functional.mse_loss(model(X), Y))


def test_the_model_has_another_dtype_now() -> None:
    model = nn.Linear(3, 2).double()
    program = tn.compile(model, nn.MSELoss(), (X, Y), [tn.Grad()])
    model.float()
    with pytest.raises(InputError, match=r"(?s)weight.*torch.float32.*torch.float64|compile again"):
        program(X, Y)


# ---------------------------------------------------------------- rules


class Scaled(nn.Module):
    """A layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.scale


def compiled_with(rule: Callable[[Any], Any]) -> tn.Result:
    model = nn.Sequential(Scaled(), nn.Linear(3, 2)).double()
    rules = tn.RULES | {Scaled: rule}
    return tn.compile(model, nn.MSELoss(), (X, Y), [tn.Grad()], rules=rules)(X, Y)


RULES = {
    "typo in a tensor": ("output[n, i] = input[n, i] * scal[i]", r"(?s)'scal'.*\^.*'scale'"),
    "wrong number of axes": ("output[n, i] = input[n, i, j] * scale[i]", r"(?s)'input'.*2 axes.*\^"),
    "leg on the left only": ("output[n, o] = input[n, i] * scale[i]", r"(?s)'o'.*\^"),
    "size conflict": ("output[n, n] = input[n, i] * scale[i]", r"(?s)'n'.*\^"),
    "syntax": ("output[n, i] = input[n, i] * * scale[i]", r"(?s)not a formula.*\^"),
    "empty": ("", "empty|neither"),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", [tn.Grad(), tn.DiagGGN(), tn.Jacobians()])
@pytest.mark.parametrize(
    ("text", "name"), [("output[n, i] = input[n, i]", "scale"), ("output[n, i] = ONE * scale[i]", "input")]
)
def test_a_rule_that_leaves_out_an_operand(text: str, name: str, quantity: tn.Quantity) -> None:
    """It would have zero derivatives; frozen it may be left out."""
    model = nn.Sequential(nn.Linear(3, 3), Scaled(), nn.Linear(3, 2)).double()
    rules = tn.RULES | {Scaled: tn.Rule(text, constants={"ONE": 1})}
    with pytest.raises(RuleError, match=rf"never reads '{name}': its derivatives would be zero\nadd {name}\[legs\]"):
        tn.compile(model, nn.MSELoss(), (X, Y), [quantity], rules=rules)
    model[1].requires_grad_(False)
    if name == "scale":
        assert list(tn.compile(model, nn.MSELoss(), (X, Y), [quantity], rules=rules)(X, Y)[quantity.name])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("what", RULES)
def test_rules_point_into_the_text(what: str) -> None:
    text, message = RULES[what]
    with pytest.raises(RuleError, match=message) as raised:
        compiled_with(lambda layer: text)
    assert not text or text in str(raised.value)


def test_a_good_rule_for_the_same_layer() -> None:
    result = compiled_with(lambda layer: "output[n, i] = input[n, i] * scale[i]")
    assert result["grad"]["0.scale"].shape == (3,)


def test_a_rule_of_the_wrong_output_shape() -> None:
    with pytest.raises(RuleError, match="output"):
        compiled_with(lambda layer: "output[n] = input[n, i] * scale[i]")


def test_two_rules_for_one_target() -> None:
    table = tn.Table()
    table.row(tn.Rule("output[n, i] = input[n, i]"), Scaled)
    with pytest.raises(RuleError, match=r"two rules for .*Scaled.*override=True"):
        table.row(tn.Rule("output[n, i] = input[n, i]"), Scaled)


def test_an_op_without_a_rule_is_named() -> None:
    """It falls back on torch.func, and `explain` says so; or it is refused. It is never left out."""
    model = nn.Sequential(nn.Linear(3, 3), Apply(lambda t: torch.cumprod(t, 1)), nn.Linear(3, 2)).double()
    try:
        program = tn.compile(model, nn.MSELoss(), (X, Y), [tn.Grad(), tn.BatchL2()])
    except UnsupportedError as error:
        assert "cumprod" in str(error) and "0.weight" in str(error)
        return
    result = program(X, Y)
    want = torch.autograd.grad(nn.MSELoss()(model(X), Y), list(model.parameters()))
    for got, expected in zip(result["grad"].values(), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert "cumprod" in program.explain() and "torch.func" in program.explain()


def test_errors_have_one_base() -> None:
    for error in (InputError, RuleError, UnsupportedError):
        assert issubclass(error, TnError)


def test_a_tensor_where_none_was_compiled() -> None:
    model = nn.Linear(3, 2).double()
    program = tn.compile(model, lambda output, y: output.square().mean(), (X, None), [tn.Grad()])
    assert "grad" in program(X)
    with pytest.raises(InputError, match="compiled for None"):
        program(X, Y)


class Tempered(nn.Module):
    """Cross-entropy at a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(input / self.temperature, target)


def test_a_trainable_parameter_of_the_loss() -> None:
    """It would have no result; one of the model, or a frozen one, is as any other."""
    loss = Tempered()
    with pytest.raises(InputError, match=r"(?s)loss Tempered has .* of its own, temperature.*requires_gr"):
        tn.compile(MODEL, loss, (X, Y), [tn.Grad()])
    loss.requires_grad_(False)
    found = tn.compute(MODEL, loss, (X, Y), [tn.Grad()])["grad"]
    want = torch.autograd.grad(loss(MODEL(X), Y), tuple(MODEL.parameters()))
    for value, expected in zip(found.values(), want, strict=True):
        torch.testing.assert_close(value, expected)


def test_sums_that_are_stacked() -> None:
    """A loss may add up several sums over the batch in a tensor."""
    loss = lambda f, y: torch.stack([(f - y).square().mean(), (f - y).abs().mean()]).sum()  # noqa: E731
    found = tn.compute(MODEL, loss, (X, Y), [tn.Grad(), tn.BatchGrad()])
    want = torch.autograd.grad(loss(MODEL(X), Y), tuple(MODEL.parameters()))
    for (name, value), expected in zip(found["grad"].items(), want, strict=True):
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(found["batch_grad"][name].sum(0), expected)
