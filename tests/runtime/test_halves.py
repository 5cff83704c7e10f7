"""The halves of a program: together they are the whole, and what is between them is small."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..cases import CASES
from ..second_order import assert_equal

BY_NAME = {case.name: case for case in CASES}
FIRST = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.Variance(), tn.ClippedGrad())
SECOND = (tn.DiagGGN(), tn.DiagGGNMC(), tn.KFAC())


def both(program: tn.Program, x: Any, y: Any, **options: Any) -> tuple[tn.Result, tn.Result, Any]:
    torch.manual_seed(0)
    whole = program(x, y, **options)
    torch.manual_seed(0)
    output, saved = program.forward(x)
    return whole, program.backward(saved, y, **options), output


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", tuple(BY_NAME))
def test_halves_are_the_whole(name: str) -> None:
    problem = BY_NAME[name].build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), list(FIRST), check=False)
    whole, later, output = both(program, problem.x, problem.y)
    torch.testing.assert_close(output, whole.output)
    torch.testing.assert_close(later.loss, whole.loss)
    for key in whole:
        assert_equal(later[key], whole[key], key)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ("mlp_sum", "conv2d_stride_padding", "cross_entropy_image", "layer_norm"))
def test_halves_of_curvature(name: str) -> None:
    problem = BY_NAME[name].build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), list(SECOND), check=False)
    whole, later, _ = both(program, problem.x, problem.y, seed=3)
    for key in ("diag_ggn", "diag_ggn_mc"):
        assert_equal(later[key], whole[key], key)
    for n, K in whole["kfac"].items():
        torch.testing.assert_close(later["kfac"][n].to_dense(), K.to_dense())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("pooled", [False, True], ids=["linear", "pooled"])
def test_halves_of_rounds_of_columns(pooled: bool) -> None:
    """A loop over columns reads what the second half has under another name."""
    torch.manual_seed(0)
    body = (nn.Conv1d(1, 2, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 4)) if pooled else (nn.Linear(10, 4),)
    model = nn.Sequential(*body, nn.Tanh(), nn.Linear(4, 30)).double()
    x, y = torch.randn(64, *[1] * pooled, 10, dtype=torch.float64), torch.randint(30, (64,))
    quantities = [tn.Grad(), tn.KFAC(mc_samples=4), tn.DiagGGN(), tn.ClippedGrad()]
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities, check=False)
    assert program.compiled.plan.loops
    whole, later, _ = both(program, x, y, seed=3)
    for key in ("grad", "diag_ggn", "clipped_grad"):
        assert_equal(later[key], whole[key], key)
    for n, K in whole["kfac"].items():
        torch.testing.assert_close(later["kfac"][n].to_dense(), K.to_dense())


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3), nn.Hardtanh(), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(75, 4),
    ).double()  # fmt: skip


X, Y = torch.randn(6, 1, 16, 16, dtype=torch.float64), torch.randint(4, (6,))


@pytest.mark.slow
def test_other_batches_draws_and_operands() -> None:
    """Layers that draw do so in forward; seeds and operands are for backward, which may run twice."""
    model, loss = convolutions(), nn.CrossEntropyLoss()
    quantities = [tn.Grad(), tn.DiagGGNMC(mc_samples=2), tn.WeightedGrad(), tn.InputGrad()]
    program = tn.compile(model, loss, (X, Y), quantities)
    for size in (6, 1, 4):
        x, y, operands = X[:size], Y[:size], {"weights": torch.randn(size, dtype=torch.float64)}
        whole, later, _ = both(program, x, y, seed=1, operands=operands)
        for key in whole:
            assert_equal(later[key], whole[key], key)
    _, saved = program.forward(X)
    one, two = (program.backward(saved, Y, seed=1, operands=program.some_operands(X, Y)) for _ in range(2))
    assert_equal(one["grad"], two["grad"], "grad")
    plain = torch.autograd.grad(loss(model.eval()(X), Y), list(model.parameters()))  # drawn otherwise: other numbers
    assert not torch.allclose(one["grad"]["0.weight"], plain[0])


def saved_by_autograd(model: nn.Module, x: Tensor) -> int:
    """Bytes of the memory that autograd keeps for the output, without parameters, buffers and inputs."""
    outside = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(size for at, size in found.items() if at not in outside)


def only(model: nn.Module, kept: Any) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(kept(name))
    return model


CASES_OF_TUNING = {
    "all": (lambda name: True, 1.0),
    "head": (lambda name: name.startswith("7"), 1.0),
    "biases": (lambda name: name.endswith("bias"), 0.5),
    "first layer": (lambda name: name.startswith("0"), 0.5),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CASES_OF_TUNING)
def test_saved_bytes(name: str) -> None:
    """No more than autograd's; half where only gates and places are read."""
    kept, most = CASES_OF_TUNING[name]
    model = only(convolutions().eval(), kept)
    program = tn.compile(model, nn.CrossEntropyLoss(), (X, Y), [tn.Grad()])
    output, saved = program.forward(X)
    assert saved.nbytes - output.nbytes <= most * saved_by_autograd(model, X)
    planned = program.halves.cut.bytes(len(X), 8)
    assert planned == pytest.approx(saved.nbytes, rel=0.05)


def test_a_gate_is_not_saved_next_to_the_values_themselves() -> None:
    """Dropout in eval mode gives its input: what is kept for the layer behind it is kept for the gate, too."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double().eval()
    x = torch.randn(5, 6).double()
    program = tn.compile(model, tn.HANDED, x, [tn.Grad()])
    _, saved = program.forward(x)
    assert saved.nbytes == 5 * 8 * 8 == program.halves.cut.bytes(5, 8)  # and not the output


class Adapted(nn.Module):
    """A frozen layer with an update of low rank, which views its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.mT) @ self.up.mT


def test_views_of_parameters_take_no_memory() -> None:
    model, x = nn.Sequential(Adapted(), nn.Tanh()).double(), torch.randn(4, 6).double()
    program = tn.compile(model, tn.HANDED, x, [tn.Grad(), tn.InputGrad()])
    output, saved = program.forward(x)
    assert saved.nbytes - output.nbytes == saved_by_autograd(model, x) - output.nbytes == 4 * 2 * 8
    assert program.halves.cut.bytes(4, 8) == saved.nbytes


def test_what_is_saved_is_shown() -> None:
    model = only(convolutions().eval(), lambda name: name.startswith("0"))
    program = tn.compile(model, nn.CrossEntropyLoss(), (X, Y), [tn.Grad()])
    kinds = {str(saving.value): saving.what for saving in program.halves.cut.saved.values()}
    assert kinds["layer_1_gate"] == "8 bits" and kinds["layer_2_index_small"] == "8 bits"
    assert re.match(r"Halves\([\d.e-]+ MB saved for 6 samples\)$", repr(program.halves))
    text = program.explain()
    assert "Saved between the halves" in text and "layer_1_gate" in text and "8 bits" in text
    assert repr(program.forward(X)[1]).startswith("Saved(")


# -- handed in


def test_a_cotangent_is_handed_in() -> None:
    """Any gradient of the output: quantities are those of Σ ⟨cotangent, output⟩."""
    model = convolutions().eval()
    program = tn.compile(model, tn.HANDED, X, [tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.InputGrad()])
    x = X.clone().requires_grad_()
    output = model(x)
    cotangent = torch.randn_like(output)
    wanted = torch.autograd.grad(output, [x, *model.parameters()], cotangent)
    mine, saved = program.forward(X)
    result = program.backward(saved, cotangent)
    torch.testing.assert_close(mine, output.detach())
    for n, want in zip(dict(model.named_parameters()), wanted[1:], strict=True):
        torch.testing.assert_close(result["grad"][n], want)
        torch.testing.assert_close(result["batch_grad"][n].sum(0), want)
    torch.testing.assert_close(result["input_grad"]["x"], wanted[0])
    with pytest.raises(tn.UnsupportedError, match="'kfac' propagates Draws, which needs the curvature of a loss"):
        tn.compile(model, tn.HANDED, X, [tn.KFAC()])


# -- what is refused


def test_saved_values_are_checked() -> None:
    model, loss = convolutions().eval(), nn.CrossEntropyLoss()
    program, other = (tn.compile(model, loss, (X, Y), [tn.Grad()], check=False) for _ in range(2))
    output, saved = program.forward(X)
    with pytest.raises(tn.InputError, match="backward takes what forward saved"):
        program.backward(output, Y)
    with pytest.raises(tn.InputError, match="of another program"):
        other.backward(saved, Y)
    with pytest.raises(tn.InputError, match="y has 3 samples, and forward had 6"):
        program.backward(saved, Y[:3])
    with pytest.raises(tn.InputError, match="the structure"):
        program.backward(saved, (Y, Y))
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(saved)
    with torch.no_grad():
        model[3].weight.add_(1)
    with pytest.raises(tn.InputError, match=r"parameter '3\.weight' was written over in place after forward"):
        program.backward(saved, Y)
    output, saved = program.forward(X)
    output.add_(1)
    with pytest.raises(tn.InputError, match=r"the model's output \(.*\) was written over in place after forward"):
        program.backward(saved, Y)


class Detached(nn.Module):
    """A recurrent net, and a value that takes no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.net(x)[0][:, -1]) * x.detach().sum((1, 2), keepdim=True)[:, 0]
        return found


def test_inputs_of_what_is_cut() -> None:
    torch.manual_seed(0)
    model, x, y = Detached().double(), torch.randn(4, 3, 2).double(), torch.randn(4, 2).double()
    result = tn.compute(model, nn.MSELoss(), (x, y), [tn.InputGrad(), tn.BatchL2()])
    given = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(nn.MSELoss()(model(given), y), given)
    torch.testing.assert_close(result["input_grad"]["x"], wanted)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(2, 3), nn.Tanh()).requires_grad_(False), nn.Tanh()], ids=str)
def test_inputs_alone(model: nn.Module) -> None:
    """Of a model that is frozen, or has no parameters, there are gradients by its inputs, and no others."""
    model, x = model.double(), torch.randn(4, 2).double()
    y = torch.randn_like(model(x))
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.InputGrad()])
    given = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(nn.MSELoss()(model(given), y), given)
    _, saved = program.forward(x)
    for result in (program(x, y), program.backward(saved, y)):
        torch.testing.assert_close(result["input_grad"]["x"], wanted)
    with pytest.raises(tn.InputError, match=r"grad: .*so there is nothing to differentiate by"):
        tn.compile(model, nn.MSELoss(), (x, y), [tn.InputGrad(), tn.Grad()])


def test_an_infinite_cotangent_does_not_pass_a_shut_gate() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, -9.0]))
        model[2].weight[:, 1] = torch.inf
    x, cotangent = torch.rand(3, 2).double(), torch.rand(3, 2).double()
    program = tn.compile(model, tn.HANDED, x, [tn.Grad()], check=False)
    assert any("8 bits" in line for line in program.halves.lines(None))
    _, saved = program.forward(x)
    got, own = program.backward(saved, cotangent)["grad"], [model[0].weight, model[0].bias]
    for name, want in zip(("0.weight", "0.bias"), torch.autograd.grad(model(x), own, cotangent), strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got[name], want, rtol=1e-14, atol=0)
