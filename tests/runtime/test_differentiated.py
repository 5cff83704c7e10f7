"""Derivatives through a program: there are none, and the program says so instead of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tnbackprop as tn

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0])
LOSS = nn.CrossEntropyLoss()
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(X),
    "vjp": lambda f: torch.func.vjp(f, X),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "hessian": lambda f: torch.func.hessian(f)(X),
    "linearize": lambda f: torch.func.linearize(f, X),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([X, X])),
    "vmap_grad": lambda f: torch.func.vmap(torch.func.grad(f))(torch.stack([X, X])),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_by_an_input(name: str) -> None:
    model = net()
    program = tn.compile(model, LOSS, (X, Y), [tn.BatchL2()])
    for run, what in (
        (lambda x: program(x, Y).loss, "input 'x'"),
        (lambda x: tn.compute(model, LOSS, (x, Y), [tn.BatchL2()]).loss, "'x'|x comes"),
        (lambda x: tn.compile(model, LOSS, (x, Y), [tn.BatchL2()])(x, Y).loss, "x comes"),
    ):
        comes = r"(torch\.func transform|with a tangent)"
        with pytest.raises(tn.UnsupportedError, match=rf"(?s)({what}).*{comes}.*transform loss\(model"):
            TRANSFORMS[name](run)


def test_by_a_parameter() -> None:
    """Parameters that functional_call puts in, while a program of the model is called."""
    model = net()
    program = tn.compile(model, LOSS, (X, Y), [tn.Grad()])

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return program(x, Y).loss

    theta = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    with pytest.raises(tn.UnsupportedError, match=r"'0\.weight' of the model comes inside a torch\.func transform"):
        torch.func.grad(lambda theta: torch.func.functional_call(Holder(), theta, (X,)))(theta)


def test_by_a_constant_of_the_loss() -> None:
    model = net()
    with pytest.raises(tn.UnsupportedError, match=r"compiling inside a torch\.func transform.*\n.*compile outside"):
        torch.func.grad(lambda w: tn.compute(model, lambda f, y: LOSS(f * w, y), (X, Y), [tn.Grad()]).loss)(
            torch.ones(2, dtype=torch.float64)
        )


def test_tangents() -> None:
    model = net()
    program = tn.compile(model, LOSS, (X, Y), [tn.Grad()])
    with forward_ad.dual_level():
        with pytest.raises(tn.UnsupportedError, match=r"input 'x' comes with a tangent"):
            program(forward_ad.make_dual(X, X), Y)
        with pytest.raises(tn.UnsupportedError, match=r"x comes with a tangent"):
            tn.compute(model, LOSS, (forward_ad.make_dual(X, X), Y), [tn.Grad()])
        program(X, Y)


def test_transforms_of_something_else() -> None:
    """A program that only stands inside is called as ever."""
    program = tn.compile(net(), LOSS, (X, Y), [tn.Grad()])
    want = program(X, Y)["grad"]["0.weight"]
    got = torch.func.grad(lambda a: (a * program(X, Y)["grad"]["0.weight"]).sum())(torch.ones_like(want))
    torch.testing.assert_close(got, want)


def test_inputs_that_require_grad() -> None:
    """The numbers are the same, and no result requires grad: torch says so where one is differentiated."""
    model = net()
    x = X.clone().requires_grad_()
    for result in (
        tn.compile(model, LOSS, (x, Y), [tn.Grad()])(x, Y),
        tn.compile(model, LOSS, (X, Y), [tn.Grad()])(2 * x / 2, Y),
        tn.compute(model, LOSS, (x, Y), [tn.Grad()]),
    ):
        assert not result.loss.requires_grad and not result.output.requires_grad
        want = torch.autograd.grad(LOSS(model(X), Y), model[0].weight)[0]
        torch.testing.assert_close(result["grad"]["0.weight"], want)
        with pytest.raises(RuntimeError, match="does not require grad"):
            result.loss.backward()
    assert x.grad is None


def test_inference_mode() -> None:
    """Compiled and called in it, or on an input made in it; a model that was made in it has no derivatives."""
    model = net()
    want = torch.autograd.grad(LOSS(model(X), Y), model[0].weight)[0]
    with torch.inference_mode():
        inside, made = X.clone(), nn.Linear(3, 2).double()
        for x in (X, inside):
            torch.testing.assert_close(tn.compute(model, LOSS, (x, Y), [tn.Grad()])["grad"]["0.weight"], want)
    for x in (X, inside):
        program = tn.compile(model, LOSS, (x, Y), [tn.Grad()])
        torch.testing.assert_close(program(inside, Y)["grad"]["0.weight"], want)
    with pytest.raises(tn.InputError, match=r"'weight' of the model was made in inference mode.*\n.*outside of"):
        tn.compile(made, LOSS, (X, Y), [tn.Grad()])
