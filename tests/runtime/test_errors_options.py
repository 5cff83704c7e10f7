"""Options, quantities and arguments of the wrong kind: refused where they are given, never taken for a default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import InputError

MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
FROZEN = nn.Linear(3, 2).double().requires_grad_(False)
X, Y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


def computed(*quantities: Any, **options: Any) -> Callable[[], object]:
    return lambda: tn.compile(MODEL, nn.MSELoss(), (X, Y), quantities, **options)


class Returns(tn.Quantity):
    """Whatever is put into it."""

    value: Any = None

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> Any:
        return self.value(J, g)


def returns(value: Callable[[Any, Any], Any]) -> Callable[[], object]:
    quantity = Returns("mine")
    object.__setattr__(quantity, "value", value)
    return computed(quantity)


OPTIONS: dict[str, tuple[Callable[[], object], str]] = {
    "a text for an enum": (lambda: tn.BatchGrad(scale="unscaled"), "BatchGrad: scale='unscaled': .*tn.Scale.UNSCALED"),
    "a name's place": (lambda: tn.BatchGrad(tn.Scale.UNSCALED), "BatchGrad: name=<Scale.*is Scale, not str"),
    "fisher": (lambda: tn.KFAC(fisher="mc"), "KFAC: fisher='mc': give one of tn.Fisher.MC"),
    "sharing": (lambda: tn.KFLR(sharing="reduce"), "sharing='reduce': give one of tn.Sharing.EXPAND"),
    "bias": (lambda: tn.KFRA(bias="joined"), "bias='joined': give one of tn.Bias.OWN"),
    "per_sample": (lambda: tn.DiagGGN(per_sample=1), "per_sample=1 is int, not bool"),
    "a narrow sum": (
        computed(tn.SecondMoment(), accumulate=torch.float32),
        "accumulate=torch.float32 would round squares and factors of parameter '0.weight', torch.float64: give a wider",
    ),
    "no device": (lambda: tn.compute(MODEL, nn.MSELoss(), (X, Y), [tn.Grad()]).to("gpu1"), "'gpu1' is no device: give"),
    "no samples": (lambda: tn.KFAC(mc_samples=0), "KFAC: mc_samples=0: draw at least one"),
    "half a sample": (lambda: tn.SqrtGGNMC(mc_samples=1.5), "mc_samples=1.5 is float, not int"),
    "no rows": (lambda: tn.ProjectedFactors(rows=0), "rows=0: a block of a factor has at least one row"),
    "no name": (lambda: tn.Grad(""), "Grad: name='': the key in the result"),
    "a class": (computed(tn.Grad), r"Grad is a class: give an instance, Grad\(\)"),
    "a text": (computed("grad"), "'grad' is no tn.Quantity: give instances"),
    "no list": (lambda: tn.compute(MODEL, nn.MSELoss(), (X, Y), tn.Grad()), "quantities is Grad, not a list"),
    "indefinite": (computed(tn.DiagGGN(), indefinite="refuse"), "indefinite='refuse': give one of tn.Indef"),
    "memory": (computed(tn.Grad(), memory_limit=-1), "memory_limit=-1 is no amount of memory"),
    "no limit": (computed(tn.Grad(), memory_limit=float("inf")), "memory_limit=inf is no amount .*None is no limit"),
    "a truth": (computed(tn.Grad(), memory_limit=True), "memory_limit=True is no amount of memory"),
    "no memory": (computed(tn.Grad(), memory_limit="0B"), "memory_limit='0B' is no amount of memory"),
    "endless memory": (computed(tn.Grad(), memory_limit="9" * 400 + "B"), "9B' is no amount of memory"),
    "frozen": (lambda: tn.compile(FROZEN, nn.MSELoss(), (X, Y), [tn.Grad(), tn.KFAC()]),
               r"(?s)grad, kfac: all 2 parameters of Linear are frozen.*\n.*requires_grad_\(True\)"),
    "frozen, once": (lambda: tn.compute(FROZEN, nn.MSELoss(), (X, Y), [tn.Grad()]), "grad: all 2 parameters of Linear"),
    "no parameter": (lambda: tn.compile(nn.ReLU(), None, (X, None), [tn.NTK()]), "ntk: ReLU has no parameters"),
    "a frozen file": (lambda: tn.generate(FROZEN, "grad", example=(X, Y), loss=nn.MSELoss()), "grad: all 2 parameters"),
    "a frozen kernel": (lambda: tn.ntk(FROZEN, X), r"no tangent kernel: requires_grad_\(True\)"),
    "a model's class": (lambda: tn.compile(nn.Linear, nn.MSELoss(), (X, Y), []), "model is the class Linear"),
    "a loss's class": (lambda: tn.compile(MODEL, nn.MSELoss, (X, Y), []), "loss is the class MSELoss: give"),
    "a lazy layer": (lambda: tn.compile(nn.LazyLinear(2), nn.MSELoss(), (X, Y), []), "'weight' has no shape yet: run"),
    "a loss raises": (lambda: tn.compile(MODEL, lambda f, y: f.nope, (X, Y), []),
                      r"the loss fails on the example: .*nope.*\n  .*test_errors_options\.py, line \d+: .*f\.nope"),
    "a loss of more": (lambda: tn.compile(MODEL, nn.GaussianNLLLoss(), (X, Y), []), "the loss fails .*argument: 'var'"),
    "no kernel": (lambda: tn.ntk(3, X), "model is int, not a torch.nn.Module"),
    "nothing extracted": (returns(lambda J, g: None), r"'mine': extract returns NoneType: return a tn.Diagram"),
    "no leg": (returns(lambda J, g: (J.T @ g).sum("k")), r"(?s)KeyError: .*no leg .*options.py, line"),
    "a number added": (returns(lambda J, g: (J.T @ g) + 1), r"raises TypeError: .*\+: 'Diagram' and 'int'"),
    "a ratio": (returns(lambda J, g: (J.T @ g) / (J.T @ g)), r"raises TypeError: .* /: 'Diagram' and 'Diagram'"),
    "J J": (returns(lambda J, g: J.T @ J), r"raises TypeError: .* @: 'Transposed' and 'Uses'"),
    "not finite": (returns(lambda J, g: (J.T @ g) * float("nan")), "the scale of a diagram is not finite"),
}  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("what", OPTIONS)
def test_options(what: str) -> None:
    attempt, message = OPTIONS[what]
    with pytest.raises(InputError, match=message):
        attempt()


def test_memory_in_scientific_notation() -> None:
    computed(tn.Grad(), memory_limit=1e9)()


def test_a_model_without_a_parameter_has_loss_and_output() -> None:
    result = tn.compile(nn.ReLU(), nn.MSELoss(), (X, X), [])(X, X)
    torch.testing.assert_close(result.loss, (X.relu() - X).square().mean())


def test_a_loss_that_depends_on_the_data(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """It is the loss, with the line of the user's code; torch's graph is not on stderr, what the user prints is."""

    def loss(f: Tensor, y: Tensor) -> Tensor:
        print("mine", file=sys.stderr)
        return (f - y).square().mean() if f.sum() > 0 else (f - y).abs().mean()

    words = r"the graph of the loss depends on the data: .*\n  .*options\.py, line \d+: return .* if f\.sum\(\)"
    with pytest.raises(tn.UnsupportedError, match=words):
        tn.compile(MODEL, loss, (X, Y), [tn.Grad()])
    printed = capfd.readouterr().err
    assert "mine" in printed and "def forward" not in printed
    assert "user code" not in caplog.text


def test_a_model_that_depends_on_the_data() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    words = r"the graph of the model depends on the data, in module '1' \(Branch\): .*\n  .*line \d+: return x if"
    with pytest.raises(tn.UnsupportedError, match=words):
        tn.compile(nn.Sequential(nn.Linear(3, 2).double(), Branch()), nn.MSELoss(), (X, Y), [tn.Grad()])


def test_torch_logs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """What does not fit is said once, by the error."""
    with pytest.raises(InputError, match=r"module '0' \(Linear\)"):
        tn.compile(MODEL, nn.MSELoss(), (X[:, :2], Y), [tn.Grad()])
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([tn.Grad], r"Grad is a class: give an instance, Grad\(\)"),
        (tn.Grad, r"quantities is Grad, not a list"),
        (tn.Grad(), r"quantities is Grad, not a list"),
        ([tn.Grad(), tn.Grad()], "two quantities are called 'grad'"),
    ],
)
def test_quantities_are_instances_in_a_list(given: Any, message: str) -> None:
    """Wherever they are asked for."""
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(tn.InputError, match=message):
        tn.verify(layer, (4, 3), quantities=given)
    with pytest.raises(tn.InputError, match=message):
        tn.generate(layer, given, example=x)
    with pytest.raises(tn.InputError, match=message):
        tn.compile(layer, nn.MSELoss(), (x, torch.randn(4, 2)), given)


@dataclass(frozen=True)
class Norms(tn.Quantity):
    """Has an option that is called as one of ours."""

    name: str = "norms"
    rows: bool = False

    def extract(self, J: Any, g: Any) -> Any:
        return ((J.T @ g) * (J.T @ g)).sum_parameter()


def test_an_option_of_ones_own_means_what_it_means() -> None:
    assert Norms().rows is False and Norms(rows=True).rows is True
