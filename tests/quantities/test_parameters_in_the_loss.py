"""Losses that read parameters themselves, as `F.linear_cross_entropy` reads the head: curvature is past all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

FUSED = hasattr(F, "linear_cross_entropy")
fused = pytest.mark.skipif(not FUSED, reason="new in torch 2.13")
PLAIN = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment())
CURVED = (tn.DiagGGN(), tn.DiagGGNMC(), tn.GGNTrace(), tn.KFAC(), tn.KFLR(), tn.HessianDiag())


class Body(nn.Module):
    """The head is a parameter that forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Any:
        return self.features(x)


class Whole(Body):
    """The oracle: forward has the head."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class WithHead(Body):
    def forward(self, x: Tensor) -> Any:
        return self.features(x), self.head.weight, self.head.bias


class OwnLoss(Body):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return head_loss(self.features(x), self.head.weight, y, self.head.bias)


def head_loss(f: Tensor, weight: Tensor, y: Tensor, bias: Tensor, **options: Any) -> Tensor:
    if not FUSED:
        return F.cross_entropy(F.linear(f, weight, bias), y, **options)
    return F.linear_cross_entropy(f, weight, y, linear_bias=bias, **options)


def from_model(model: Body, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: head_loss(f, model.head.weight, y, model.head.bias, **options)


def batch(shape: tuple[int, ...] = (7,)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(*shape, 4, dtype=torch.float64), torch.randint(5, shape)


def alike(kind: type[Body]) -> Body:
    torch.manual_seed(1)
    return kind().double()


def compare(model: nn.Module, loss: Any, x: Any, y: Tensor, whole: Any, shape: tuple[int, ...] = (7,)) -> tn.Program:
    """All quantities, with the draws of one seed, are those of the model with its head."""
    program = tn.compile(model, loss, (x, y), [*PLAIN, *CURVED])
    found = program(x, y, seed=3)
    expected = tn.compile(alike(Whole), whole, (batch(shape)[0], y), [*PLAIN, *CURVED])(batch(shape)[0], y, seed=3)
    for quantity in expected:
        for name, value in expected[quantity].items():
            own = found[quantity][name]
            dense = (each if isinstance(each, Tensor) else each.to_dense() for each in (own, value))
            torch.testing.assert_close(*dense, msg=lambda text, at=(quantity, name): f"{at}: {text}")
    return program


def test_the_head_of_the_model() -> None:
    x, y = batch()
    model = alike(Body)
    program = compare(model, from_model(model), x, y, nn.CrossEntropyLoss())
    assert program(x, y).output.shape == (7, 6)  # still the model's
    loss = nn.CrossEntropyLoss()(alike(Whole)(x), y)
    torch.testing.assert_close(program(x, y).loss, loss.detach())
    torch.testing.assert_close(program(x, y)["diag_ggn"]["head.weight"], diagonal(alike(Whole), x)["head.weight"])


def diagonal(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """diag (1/N) Σ_n Jᵀ (diag p - p pᵀ) J, row by row with autograd."""
    parameters, logits = dict(model.named_parameters()), model(x)
    p = logits.detach().softmax(1)
    found = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for n in range(len(x)):
        rows = [torch.autograd.grad(logits[n, c], list(parameters.values()), retain_graph=True) for c in range(5)]
        hessian = torch.diag(p[n]) - torch.outer(p[n], p[n])
        for name, columns in zip(parameters, zip(*rows, strict=True), strict=True):
            jacobian = torch.stack(columns)
            found[name] += torch.einsum("c...,ck,k...->...", jacobian, hessian, jacobian) / len(x)
    return found


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"ignore_index": 1}, {"reduction": "sum"}], ids=str)
def test_options(options: dict[str, Any]) -> None:
    x, y = batch()
    model = alike(Body)
    compare(model, from_model(model, **options), x, y, nn.CrossEntropyLoss(**options))


def test_a_loss_of_positions() -> None:
    """[N, T, features] flattened, as language models have it."""
    x, y = batch((3, 4))
    model = alike(Body)
    loss = from_model(model)
    whole = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
    compare(model, lambda f, y: loss(f.flatten(0, 1), y.flatten()), x, y, whole, (3, 4))


def test_a_model_that_gives_its_loss() -> None:
    x, y = batch()
    compare(alike(OwnLoss), lambda loss, y: loss, {"x": x, "y": y}, y, nn.CrossEntropyLoss())


def test_a_model_that_gives_its_head() -> None:
    x, y = batch()
    compare(alike(WithHead), lambda o, y: head_loss(o[0], o[1], y, o[2]), x, y, nn.CrossEntropyLoss())


@fused
def test_in_chunks() -> None:
    """With a backward pass of its own there: it is captured without."""
    x, y = batch()
    model = alike(Body)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=3)
    compare(model, from_model(model, options=options), x, y, nn.CrossEntropyLoss())


@fused
def test_the_logits_are_there_once() -> None:
    """As one softmax head: no log-softmax is kept beside them."""
    x, y = batch()
    model = alike(Body)
    source = tn.compile(model, from_model(model), (x, y), [tn.BatchL2()]).source
    assert "cross_entropy_loss.default" in source and "log_softmax" not in source
    assert source.count("softmax.int") == source.count("linear.default(tanh") == 1


@fused
def test_a_loss_module_of_the_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.loss = nn.Linear(4, 6), nn.LinearCrossEntropyLoss(6, 5)

        def forward(self, x: Tensor) -> Any:
            return torch.tanh(self.body(x))

    x, y = batch()
    model = Net().double()
    result = tn.compile(model, model.loss, (x, y), [tn.Grad(), tn.DiagGGN()])(x, y)
    own = torch.autograd.grad(model.loss(model(x), y), list(model.parameters()))
    for value, expected in zip(result["grad"].values(), own, strict=True):
        torch.testing.assert_close(value, expected)
    assert result["diag_ggn"]["loss.linear.weight"].min() > 0
    with pytest.raises(tn.InputError, match="Make them parameters of the model"):
        tn.compile(nn.Linear(4, 6).double(), nn.LinearCrossEntropyLoss(6, 5).double(), (x, y), [tn.Grad()])


def test_a_frozen_head_is_a_loss_of_the_output() -> None:
    """Convex in the features: H = Wᵀ (diag p - p pᵀ) W."""
    x, y = batch()
    model = alike(Body)
    weight, bias = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    del model.head
    found = tn.compile(model, lambda f, y: head_loss(f, weight, y, bias), (x, y), [tn.DiagGGN()])(x, y)["diag_ggn"]
    expected = diagonal(alike(Whole), x)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_what_is_not_convex_past_the_parameters() -> None:
    """The curvature is there, of either sign, and no root of it."""
    x, y = batch()
    model = alike(Body)
    loss = lambda f, y: -head_loss(f, model.head.weight, y, model.head.bias)  # noqa: E731
    program = tn.compile(model, loss, (x, y), [tn.DiagGGN()], check=False)
    with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
        program(x, y)


def test_refusals() -> None:
    x, y = batch()
    model = alike(Body)
    loss = from_model(model)
    said = r"DiagGGN: the loss itself reads 'head.weight', 'head.bias'"
    with pytest.raises(tn.UnsupportedError, match=said):  # the Jacobians are of the features
        tn.compile(model, loss, (x, y), [tn.Jacobians(), tn.DiagGGN()])
    twice = lambda f, y: loss(f, y) + head_loss(f.square(), model.head.weight, y, model.head.bias)  # noqa: E731
    with pytest.raises(tn.UnsupportedError, match=said):  # two values are past the parameters
        tn.compile(model, twice, (x, y), [tn.DiagGGN()])
    tn.compile(model, twice, (x, y), [tn.BatchL2()])


@pytest.mark.parametrize("product", [tn.ggn_product, tn.hessian_product])
def test_products(product: Callable[..., Any]) -> None:
    """They have the derivatives by the output, which are zero by a head that the loss reads."""
    x, y = batch()
    model = alike(Body)
    with pytest.raises(tn.UnsupportedError, match=r"the loss itself reads 'head\.weight'"):
        product(model, from_model(model), (x, y))
    weight, bias = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    options = {"options": nn.LinearCrossEntropyOptions()} if FUSED else {}
    found = product(model, lambda f, y: head_loss(f, weight, y, bias, **options), (x, y))
    plain = product(model, lambda f, y: F.cross_entropy(F.linear(f, weight, bias), y), (x, y))
    vector = torch.randn(found.shape[0], dtype=torch.float64)
    torch.testing.assert_close(found @ vector, plain @ vector)
    held = model.head.weight.detach()  # its shape and device may be asked
    product(model, lambda f, y: F.cross_entropy(F.linear(f, held), y) * len(model.head.weight) / 5, (x, y))
