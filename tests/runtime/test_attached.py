"""Programs inside of the user's own backward: gradients as autograd leaves them, quantities, what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..second_order import assert_equal
from .test_halves import X, Y, convolutions


class Several(nn.Module):
    """Two outputs in a dictionary, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.one(a) * b)
        return {"hidden": h, "output": self.two(h), "best": h.argmax(1)}


@pytest.mark.slow
def test_a_mean_is_handed_in() -> None:
    """∇ℓ_n are as large as those of a program that has the loss."""
    model, loss = convolutions().eval(), nn.CrossEntropyLoss()
    quantities = [
        tn.Grad(), tn.BatchGrad(scale=tn.Scale.UNSCALED), tn.Variance(), tn.BatchL2(), tn.ClippedGrad(max_norm=0.3),
        tn.KFAC(fisher=tn.Fisher.EMPIRICAL),
    ]  # fmt: skip
    want = tn.compile(model, loss, (X, Y), quantities)(X, Y)
    program = tn.compile(model, tn.HANDED_MEAN, X, quantities)
    with tn.attach(program) as attached:
        loss(model(X), Y).backward()
    for key in ("grad", "batch_grad", "variance", "batch_l2", "clipped_grad"):
        assert_equal(attached.result[key], want[key], key)
    for name, K in want["kfac"].items():
        torch.testing.assert_close(attached.result["kfac"][name].to_dense(), K.to_dense())
    assert attached.result.loss is None and pickle.loads(pickle.dumps(tn.HANDED_MEAN)) == tn.HANDED_MEAN
    with pytest.raises(tn.InputError, match=r"(?s)fails on the example.*the example is x alone"):
        tn.compile(model, tn.HANDED, (X, Y), [tn.Grad()])


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_trees_of_inputs_and_outputs(order: str) -> None:
    """Names have no order: neither in the block, nor in a call of the program."""
    torch.manual_seed(0)
    model = Several().double()
    x = {"a": torch.randn(5, 3).double(), "b": torch.rand(5, 4).double()}
    program = tn.compile(model, tn.HANDED, x, [tn.Grad(), tn.InputGrad()])
    x["b"].requires_grad_()
    with tn.attach(program) as attached:
        found = model(**{key: x[key] for key in order})
        (found["hidden"].square().sum() + found["output"].sin().sum()).backward()
    got, mine = x["b"].grad, {n: p.grad for n, p in model.named_parameters()}
    x["b"].grad = None
    model.zero_grad()
    found = model(**x)
    (found["hidden"].square().sum() + found["output"].sin().sum()).backward()
    torch.testing.assert_close(got, x["b"].grad)
    for n, p in model.named_parameters():
        torch.testing.assert_close(mine[n], p.grad)
    assert_equal(attached.result["grad"], {n: p.grad for n, p in model.named_parameters()}, "grad")
    turned = program.forward({key: x[key].detach() for key in order})[0]
    torch.testing.assert_close(turned["output"], found["output"].detach())


def test_an_output_that_is_written_over() -> None:
    """As in autograd: what no derivative reads may be, and a last layer that has its derivative of it says so."""
    model, wide = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()

    def step(model: nn.Module) -> None:
        output = model(wide)
        output /= 2
        output.sin().sum().backward()

    step(model)
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with tn.attach(tn.compile(model, tn.HANDED, wide, [tn.Grad()])):
        step(model)
    assert_equal({n: p.grad for n, p in model.named_parameters()}, wanted, "grad")
    last = nn.Sequential(*model, nn.Tanh())
    with (
        tn.attach(tn.compile(last, tn.HANDED, wide, [tn.Grad()])),
        pytest.raises(tn.InputError, match=r"the model's output \(.*\) was written over in place"),
    ):
        step(last)


def test_attached_to_any_loss() -> None:
    """Terms, a factor, accumulation, a gradient in front of the model: as autograd has it; nothing is left behind."""
    model, target = convolutions().eval(), torch.randn(6, 4, dtype=torch.float64)
    program = tn.compile(model, tn.HANDED, X, [tn.Grad(), tn.BatchGrad(), tn.InputGrad()])
    shift = torch.zeros_like(X, requires_grad=True)

    def step() -> None:
        for part in (slice(0, 4), slice(4, 6)):
            output = model(X[part] + shift[part])
            term = nn.functional.cross_entropy(output, Y[part]) / 3
            (term + 0.1 * (output - target[part]).abs().sum()).backward()

    with tn.attach(program) as attached:
        step()
    got = [p.grad for p in (shift, *model.parameters())]
    assert len(attached.results) == 2 and "forward" not in vars(model)
    for p in (shift, *model.parameters()):
        p.grad = None
    step()
    for mine, p in zip(got, (shift, *model.parameters()), strict=True):
        torch.testing.assert_close(mine, p.grad)
    rows = torch.cat([r["batch_grad"]["0.weight"] for r in attached.results])
    torch.testing.assert_close(rows.sum(0), got[1])


@pytest.mark.parametrize("module", [True, False], ids=["module", "function"])
def test_attached_to_its_loss(module: bool) -> None:
    """Curvature of the loss as written, and .grad with the factor behind it."""
    model = convolutions().eval()
    loss: Any = nn.CrossEntropyLoss() if module else nn.functional.cross_entropy
    program = tn.compile(model, loss, (X, Y), [tn.Grad(), tn.DiagGGN(), tn.KFAC()])
    with tn.attach(program) as attached:
        with torch.no_grad():
            torch.testing.assert_close(model(X), program(X, Y).output)
        found = (loss if module else attached.loss)(model(X), Y)
        (found / 2).backward()
    wanted = torch.autograd.grad(loss(model(X), Y) / 2, list(model.parameters()))
    for p, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want)
    assert_equal(attached.result["diag_ggn"], program(X, Y)["diag_ggn"], "diag_ggn")


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
def test_gradients_in_front_of_a_program_with_a_loss(named: bool) -> None:
    model, loss = convolutions().eval(), nn.CrossEntropyLoss()
    program = tn.compile(model, loss, (X, Y), [tn.Grad(), tn.DiagGGNMC(), tn.InputGrad()])
    shift = torch.zeros_like(X, requires_grad=True)

    def step() -> None:
        output = model(X + shift)
        (3 * (loss(input=output, target=Y) if named else loss(output, Y))).backward()

    with tn.attach(program):
        step()
    got = [p.grad for p in (shift, *model.parameters())]
    for p in (shift, *model.parameters()):
        p.grad = None
    step()
    for mine, p in zip(got, (shift, *model.parameters()), strict=True):
        torch.testing.assert_close(mine, p.grad)


def test_bits_of_autograd() -> None:
    """Where the kernels are the same, so are the bits of the loss and of .grad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y, loss = torch.randn(5, 6), torch.randint(3, (5,)), nn.CrossEntropyLoss()
    program = tn.compile(model, tn.HANDED, x, [tn.Grad(), tn.BatchL2()])
    with tn.attach(program):
        mine = loss(model(x), y)
        mine.backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    want = loss(model(x), y)
    want.backward()
    assert torch.equal(mine, want)
    for one, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_attached() -> None:
    model, loss = convolutions().eval(), nn.CrossEntropyLoss()
    with pytest.raises(tn.InputError, match=r"has no tn.Grad\(\)"):
        tn.attach(tn.compile(model, loss, (X, Y), [tn.BatchL2()], check=False))
    program = tn.compile(model, loss, (X, Y), [tn.Grad()], check=False)
    with tn.attach(program) as attached:
        with pytest.raises(tn.InputError, match="no backward pass has run"):
            _ = attached.result
        output = model(X)
        with pytest.raises(tn.UnsupportedError, match="a loss of its own, and something else was made"):
            (loss(output, Y) + output.sum()).backward()
        with pytest.raises(tn.InputError, match="the model is attached to a program already"):
            tn.attach(program).__enter__()
        with pytest.raises(tn.InputError, match=r"compile with tn\.InputGrad"):
            model(X.clone().requires_grad_())
        for made in (loss(model(X), Y), model(X).sum()):
            with pytest.raises(tn.UnsupportedError, match=r"is to be differentiated again \(create_graph=True\)"):
                torch.autograd.grad(made, model[0].weight, create_graph=True)
        with pytest.raises(tn.InputError, match="the model is attached to a program: leave the block"):
            tn.compile(model, loss, (X, Y), [tn.Grad()])
        output, y = model(X), Y.clone()
        found = loss(output, y)
        y.zero_()
        with pytest.raises(tn.InputError, match="y was written over in place after the loss"):
            found.backward()
        output = model(X)
        output.register_hook(lambda g: g / 10)
        with pytest.raises(tn.UnsupportedError, match="output has a hook, or retains its gradient"):
            loss(output, Y)
    program = tn.compile(model, nn.functional.mse_loss, (X, torch.rand(6, 4).double()), [tn.Grad()], check=False)
    with tn.attach(program) as attached:
        with pytest.raises(tn.InputError, match="y requires grad, and a program has no gradient by it"):
            attached.loss(model(X), torch.rand(6, 4).double().requires_grad_())
        with pytest.raises(tn.InputError, match=r"gets 3 arguments; it was compiled as loss\(output, y\)"):
            attached.loss(model(X), torch.rand(6, 4).double(), reduction="sum")
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    scaled = lambda output, y: nn.functional.cross_entropy(output * scale, y)  # noqa: E731
    with tn.attach(tn.compile(model, scaled, (X, Y), [tn.Grad()], check=False)) as attached:
        with pytest.raises(tn.InputError, match="reads a tensor that requires grad besides the output"):
            attached.loss(model(X), Y)
    with pytest.raises(tn.UnsupportedError, match="InputGrad: no input is of floating numbers"):
        tn.compile(nn.Embedding(3, 2), tn.HANDED, torch.tensor([[0, 1]]), [tn.Grad(), tn.InputGrad()])


class Turned(nn.Module):
    """The samples are not in front, or nothing floats."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.linear, self.whole = nn.Linear(3, 2), whole

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).argmax(1) if self.whole else self.linear(x).T


NO_COTANGENT = [(False, r"shape \[2, 4\], and a cotangent .*the 4 samples"), (True, "no output of floating numbers")]


@pytest.mark.parametrize(("whole", "message"), NO_COTANGENT)
def test_outputs_that_take_no_cotangent(whole: bool, message: str) -> None:
    with pytest.raises(tn.UnsupportedError, match=message):
        tn.compile(Turned(whole), tn.HANDED, torch.randn(4, 3), [tn.Grad()])


class Heads(nn.Module):
    """Two heads, and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        return self.one(x), self.two(x), None


def test_what_nothing_arrives_at_has_no_gradient() -> None:
    model, x = Heads().double(), torch.randn(4, 3).double()
    with tn.attach(tn.compile(model, tn.HANDED, x, [tn.Grad()])):
        one, _, none = model(x)
        one.square().sum().backward()
    assert none is None and model.two.weight.grad is None
    torch.testing.assert_close(model.one.weight.grad, 2 * one.detach().T @ x)


def test_the_loss_gets_the_whole_output() -> None:
    """Of a program with a loss of its own: parts, other orders and mixed calls would have the gradient of the whole."""
    model, x, y = Heads().double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()

    def loss(output: Any, y: Tensor) -> Tensor:
        return (output[0] - y).square().mean() + (output[1] * y).mean()

    with tn.attach(tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchL2()])) as attached:
        one, two = model(x), model(x)
        for wrong in ((one[1], one[0], None), (one[0], 3 * one[1], None), (one[0], two[1], None), (one[0], one[1], 3)):
            with pytest.raises(tn.UnsupportedError, match=r"Call that loss on the output itself \(`attached.loss`"):
                attached.loss(wrong, y)
        attached.loss(one, y).backward()
    got = [p.grad for p in model.parameters()]
    for mine, want in zip(got, torch.autograd.grad(loss(model(x), y), list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, want)


def test_copies_and_transforms_in_the_block() -> None:
    """A copy has its own forward; torch.func, forward AD and products see the model as it is."""
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    program = tn.compile(model, tn.HANDED, x, [tn.Grad()])
    theta = {name: p.detach() for name, p in model.named_parameters()}
    with tn.attach(program):
        copied, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        wanted = torch.func.jacrev(lambda t: torch.func.functional_call(model, t, x).sum())(theta)
        output = model(x)
        output.mul_(2)
    assert wanted["weight"].shape == (2, 3)
    torch.testing.assert_close(output, 2 * model(x))
    for each in (copied, again):
        with torch.no_grad():
            each.weight.mul_(2)
        torch.testing.assert_close(each(x), x @ (2 * theta["weight"]).T + theta["bias"])
        with tn.attach(tn.compile(each, nn.MSELoss(), (x, y), [tn.Grad()])):
            pass
        assert "forward" not in vars(each) and pickle.loads(pickle.dumps(each))(x).shape == (4, 2)
