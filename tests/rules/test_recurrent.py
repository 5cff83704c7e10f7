"""Recurrent layers as scans: every quantity against `torch.func`, and against the steps written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import tnbackprop as tn
from tnbackprop.table import written_out

from .. import oracle, oracle_second
from ..models import Apply, First
from ..second_order import TOLERANCE, assert_equal, error

N, T = 3, 4


class Started(nn.Module):
    """First states that are parameters; h and c are one of them."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.layer, self.shared = nn.LSTM(2, 2, batch_first=True), shared
        self.hidden, self.cell = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden.expand(1, len(x), 2)
        return self.layer(x, (hidden, hidden if self.shared else self.cell.expand(1, len(x), 2)))[0]


class Translation(nn.Module):
    """The last states of one layer are the first of another, which goes the other way."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = kind(2, 2, batch_first=True), kind(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output, last = self.first(x)
        return self.second(x.flip(1), last)[0] * output


class Last(nn.Module):
    """The last cell alone: what is not the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1][1][0]


class Tied(nn.Module):
    """Two layers with one recurrent weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(2, 2, batch_first=True), nn.GRU(2, 2, batch_first=True)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(x)[0])[0]
        return output


def time_first(layer: nn.Module) -> nn.Module:
    turn = Apply(lambda t: t.transpose(0, 1))
    return nn.Sequential(turn, First(layer), turn)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: First(nn.LSTM(2, 2, batch_first=True)),
    "LSTM, two layers, both ways": lambda: First(nn.LSTM(2, 1, 2, batch_first=True, bidirectional=True)),
    "LSTM, time first, no bias": lambda: time_first(nn.LSTM(2, 2, bias=False)),
    "LSTM, learned states": lambda: Started(shared=False),
    "LSTM, one learned state": lambda: Started(shared=True),
    "LSTM, last cell": Last,
    "LSTM to LSTM": lambda: Translation(nn.LSTM),
    "GRU": lambda: First(nn.GRU(2, 2, batch_first=True)),
    "GRU, two layers, both ways": lambda: First(nn.GRU(2, 1, 2, batch_first=True, bidirectional=True)),
    "GRU, time first, no bias": lambda: time_first(nn.GRU(2, 2, bias=False)),
    "GRU to GRU": lambda: Translation(nn.GRU),
    "tanh, both ways": lambda: First(nn.RNN(2, 2, batch_first=True, bidirectional=True)),
    "relu, time first": lambda: time_first(nn.RNN(2, 2, nonlinearity="relu")),
    "tanh to tanh": lambda: Translation(nn.RNN),
    "tied": Tied,
    "weight norm": lambda: First(weight_norm(nn.LSTM(2, 2, batch_first=True), "weight_hh_l0")),
    "in a network": lambda: nn.Sequential(nn.Linear(2, 2), First(nn.LSTM(2, 2, batch_first=True)), nn.Linear(2, 1)),
}


def problem(name: str, steps: int = T) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, x = MODELS[name]().double(), torch.randn(N, steps, 2, dtype=torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, nn.MSELoss(), x, torch.randn_like(model(x))


TWINS = (
    "LSTM, two layers, both ways", "LSTM, learned states", "GRU", "GRU, time first, no bias", "GRU to GRU",
    "tanh, both ways", "tanh to tanh",
)  # fmt: skip
"""What others here differ from in their cell alone, or that stand in another test below."""


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", [n if n not in TWINS else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_individual_gradients_and_curvature(name: str) -> None:
    model, loss, x, y = problem(name)
    program = tn.compile(model, loss, (x, y), [tn.BatchGrad(), tn.BatchL2(), tn.DiagGGN()])
    result = program(x, y)
    assert "_forward(" in program.source, "the steps are written out"
    trained = [name for name, p in model.named_parameters() if name in result["batch_grad"]]
    assert_equal(result["batch_grad"], oracle.batch_grad(model, loss, x, y), "individual gradient")
    assert_equal(result["batch_l2"], oracle.batch_l2(model, loss, x, y), "norm")
    want = oracle_second.diag_ggn(model, loss, x, y)
    assert_equal(result["diag_ggn"], {name: want[name] for name in trained}, "diagonal of the GGN")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LSTM", "GRU, time first, no bias", "tanh to tanh"])
def test_second_derivatives_go_through_the_steps(name: str) -> None:
    """The Hessian has what a scan does not know."""
    model, loss, x, y = problem(name, steps=2)
    program = tn.compile(model, loss, (x, y), [tn.HessianDiag()])
    assert_equal(program(x, y)["hessian_diag"], oracle_second.hessian_diag(model, loss, x, y), "Hessian")
    assert "_forward(" not in program.source


FACTORS = [
    ("LSTM", tn.KFLR), ("LSTM", tn.KFAC), ("GRU", tn.KFAC), ("GRU", tn.KFLR), ("relu, time first", tn.KFLR),
    ("relu, time first", tn.KFAC),
]  # fmt: skip


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name, kind", FACTORS)
def test_factors_are_those_of_the_steps(name: str, kind: type[tn.KFLR]) -> None:
    """Positions of one use, or uses of one position each."""
    model, loss, x, y = problem(name)
    rules = written_out(tn.RULES)
    found = tn.compile(model, loss, (x, y), [kind()])(x, y, seed=0)[kind().name]
    want = tn.compile(model, loss, (x, y), [kind()], rules=rules)(x, y, seed=0)[kind().name]
    for parameter, factors in found.items():
        assert error(factors.to_dense(), want[parameter].to_dense()) <= TOLERANCE, parameter


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "ih"])
def test_frozen_weights_and_one_step(frozen: str) -> None:
    layer = nn.LSTM(2, 2, batch_first=True).double()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in name)
    model, x = First(layer), torch.randn(N, 1, 2, dtype=torch.float64)
    y = torch.randn_like(model(x))
    found = tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchGrad()])(x, y)["batch_grad"]
    want = oracle.batch_grad(model, nn.MSELoss(), x, y)
    assert found and not any(frozen in name for name in found)
    assert_equal(found, {name: want[name] for name in found}, "individual gradient")


def test_the_source_does_not_grow_with_the_steps() -> None:
    model, loss = First(nn.LSTM(2, 2, batch_first=True)), nn.MSELoss()
    sources = []
    for steps in (5, 80):
        x, y = torch.randn(N, steps, 2), torch.randn(N, steps, 2)
        sources.append(tn.compile(model, loss, (x, y), [tn.BatchL2(), tn.KFAC()]).source.count("\n"))
    assert sources[0] == sources[1]


def test_a_program_for_any_batch() -> None:
    model, loss, x, y = problem("LSTM, two layers, both ways")
    program = tn.compile(model, loss, (x, y), [tn.BatchGrad()])
    for size in (1, 7):
        x, y = torch.randn(size, T, 2, dtype=torch.float64), torch.randn(size, T, 2, dtype=torch.float64)
        assert_equal(program(x, y)["batch_grad"], oracle.batch_grad(model, loss, x, y), f"batch of {size}")


KERNEL = "lstm_layer_backward("


def in_single(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, loss, x, y = problem(name)
    return model.float(), loss, x.float(), y.float()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if "GRU" not in name and "anh" not in name])
def test_the_gradient_alone_is_from_kernels_of_whole_layers(name: str) -> None:
    """For any batch, by the input, too; in float32, which is what they are for."""
    model, loss, x, y = in_single(name)
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.InputGrad()])
    assert (KERNEL in program.source) == ("LSTM" in name or name == "in a network"), "a weight that is made of others"
    assert "_forward(" in program.source, "the steps are written out"
    for size in (N, 1, 7):
        x, y = torch.randn(size, T, 2, requires_grad=True), torch.randn(size, *y.shape[1:])
        result = program(x.detach(), y)
        *want, by_x = torch.autograd.grad(loss(model(x), y), [*model.parameters(), x], materialize_grads=True)
        for found, wanted in zip(result["grad"].values(), want, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["input_grad"]["x"], by_x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantity", [tn.BatchL2(), tn.Variance(), tn.KFAC(), tn.ClippedGrad()], ids=lambda q: q.name)
def test_what_is_finer_than_the_gradient_is_from_the_steps(quantity: tn.Quantity) -> None:
    """And the gradient beside it is that of the kernels."""
    model, loss, x, y = in_single("LSTM, two layers, both ways")
    both = tn.compile(model, loss, (x, y), [tn.Grad(), quantity])
    assert KERNEL not in both.source and "lstm_backward(" in both.source
    alone = tn.compile(model, loss, (x, y), [tn.Grad()])(x, y)["grad"]
    for name, found in both(x, y, **{"seed": 0} if quantity.name == "kfac" else {})["grad"].items():
        torch.testing.assert_close(found, alone[name], rtol=1e-4, atol=1e-5)


def test_other_numbers_and_machines_go_by_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y = problem("LSTM")
    assert KERNEL not in tn.compile(model, loss, (x, y), [tn.Grad()]).source
    model, loss, x, y = in_single("LSTM")
    own = tn.RULES | {torch.ops.aten.linear.default: lambda call: tn.RULES[torch.ops.aten.linear.default](call)}
    assert KERNEL not in tn.compile(model, loss, (x, y), [tn.Grad()], rules=own).source
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert KERNEL not in tn.compile(model, loss, (x, y), [tn.Grad()]).source


def test_a_weight_of_two_layers_goes_by_the_steps() -> None:
    """A kernel gives what one of its uses has."""
    torch.manual_seed(0)
    model = Translation(nn.LSTM)
    model.second.weight_hh_l0 = model.first.weight_hh_l0
    loss, x, y = nn.MSELoss(), torch.randn(N, T, 2), torch.randn(N, T, 2)
    program = tn.compile(model, loss, (x, y), [tn.Grad()])
    assert KERNEL not in program.source
    want = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for found, wanted in zip(program(x, y)["grad"].values(), want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_frozen_weights_of_a_layer_have_no_result() -> None:
    model, loss, x, y = in_single("LSTM")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("weight_hh" in name)
    program = tn.compile(model, loss, (x, y), [tn.Grad()])
    assert KERNEL in program.source
    (found,), (trained,) = program(x, y)["grad"].values(), [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(found, torch.autograd.grad(loss(model(x), y), trained)[0], rtol=1e-4, atol=1e-5)


def test_halves_with_a_kernel() -> None:
    """What the forward keeps serves several cotangents, and results are in memory of their own."""
    model, loss, x, y = in_single("LSTM")
    program = tn.compile(model, loss, (x, y), [tn.Grad()])
    want = {name: value.clone() for name, value in program(x, y)["grad"].items()}
    _, saved = program.forward(x)
    for _ in range(2):
        for name, value in program.backward(saved, y)["grad"].items():
            torch.testing.assert_close(value, want[name])
            value.zero_()
    with torch.inference_mode():
        assert_equal(program(x, y)["grad"], want, "gradient")


def test_the_report_names_the_kernel() -> None:
    model, loss, x, y = in_single("LSTM")
    program = tn.compile(model, loss, (x, y), [tn.Grad()])
    assert "layer.weight_hh_l0   grad: from the kernel that pulls back to the input" in program.explain("plan")
    assert "tnbackprop.layer.default" in program.explain("capture")
    assert f"gradient = {KERNEL}" in program.explain("derive"), program.explain("derive")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["LSTM, two layers, both ways", "LSTM, learned states", "LSTM, time first, no bias"])
def test_the_source_runs_in_double_precision(name: str) -> None:
    """Autograd takes the place of the kernels there: the program is verified so."""
    model, loss, x, y = in_single(name)
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.InputGrad()])
    assert KERNEL in program.source and tn.verify(program).ok
