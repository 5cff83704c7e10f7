"""What a call of an attached model is: hooks, names of arguments, compiled calls, graphs that are kept or not."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
Y = torch.tensor([0, 1, 1, 0])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def grads(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def same(model: nn.Module, program: tn.Program, loss: Callable[[], Tensor]) -> tn.Result:
    """The gradients in the block are those without it."""
    want = grads(model, loss)
    with tn.attach(program) as attached:
        got = grads(model, loss)
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    return attached.result


def hooked(model: nn.Module) -> nn.Module:
    """Inputs are scaled in front, and outputs behind."""
    model.register_forward_pre_hook(lambda module, args: ((args[0] - 1) * 2,))
    model.register_forward_hook(lambda module, args, output: output / 0.5)
    return model


def test_hooks_run_once() -> None:
    """They are part of the program, those of the loss too."""
    model = hooked(net())
    same(model, tn.compile(model, tn.HANDED, X, [tn.Grad()]), lambda: F.cross_entropy(model(X), Y))
    loss, plain = nn.CrossEntropyLoss(), net()
    loss.register_forward_hook(lambda module, args, output: output * 2)
    same(plain, tn.compile(plain, loss, (X, Y), [tn.Grad()]), lambda: loss(plain(X), Y))
    with tn.attach(tn.compile(model, tn.HANDED, X, [tn.Grad()])), torch.no_grad():
        inside = model(X)  # a validation
    torch.testing.assert_close(inside, model(X))


def test_compiled_calls() -> None:
    """A module that compiled itself is replaced, too; a wrapper is, where it has no call of its own (torch 2.7)."""
    model = net()
    model.compile(backend="eager")
    same(model, tn.compile(model, tn.HANDED, X, [tn.Grad()]), lambda: F.cross_entropy(model(X), Y))
    wrapper = torch.compile(net(), backend="eager")
    program = tn.compile(wrapper, tn.HANDED, X, [tn.Grad()])
    if type(wrapper).__call__ is nn.Module.__call__:
        same(wrapper, program, lambda: F.cross_entropy(wrapper(X), Y))
        return
    with pytest.raises(tn.InputError, match="OptimizedModule has a __call__ of its own"):
        tn.attach(program).__enter__()


def test_copies_are_not_attached() -> None:
    model = net()
    program = tn.compile(model, tn.HANDED, X, [tn.Grad()])
    with tn.attach(program) as attached:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            F.cross_entropy(other(X), Y).backward()
        assert attached.results == []
        with pytest.raises(tn.InputError, match="attached to a program already"):
            tn.attach(program).__enter__()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(3, 2).double()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        h = self.l(x) if mask is None else self.l(x * mask)
        return h if scale is None else h * scale


MASK = torch.tensor([[1.0, 0.0, 1.0]] * 4).double()
SCALE = torch.full((4, 1), 2.0).double()
CALLS: list[tuple[Any, list[Callable[[nn.Module], Tensor]]]] = [
    (X, [lambda m: m(X), lambda m: m(x=X), lambda m: m(X, mask=None), lambda m: m(X, None, scale=None)]),
    ((X,), [lambda m: m(X), lambda m: m(x=X)]),
    ((X, MASK), [lambda m: m(X, MASK), lambda m: m(X, mask=MASK), lambda m: m(mask=MASK, x=X)]),
    ({"x": X, "scale": SCALE}, [lambda m: m(X, scale=SCALE), lambda m: m(scale=SCALE, x=X)]),
]  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("example,calls", CALLS, ids=["x", "(x,)", "(x, mask)", "names"])
def test_arguments_by_place_and_by_name(example: Any, calls: list[Callable[[nn.Module], Tensor]]) -> None:
    model = Named()
    program = tn.compile(model, tn.HANDED, example, [tn.Grad()])
    for call in calls:
        same(model, program, lambda call=call: F.cross_entropy(call(model), Y))  # type: ignore[misc]
    with tn.attach(program), pytest.raises(tn.InputError, match="structure"):
        model(X, MASK, scale=SCALE)


@pytest.mark.slow
def test_what_is_saved_is_let_go_of() -> None:
    """After a backward pass, unless that was asked to leave its graph; a second one then says so."""
    model = net()
    program = tn.compile(model, nn.CrossEntropyLoss(), (X, Y), [tn.Grad()])
    with tn.attach(program) as attached:
        loss = attached.program.loss(model(X), Y)  # type: ignore[misc]
        loss.backward(retain_graph=True)
        loss.backward()
        assert len(attached.results) == 2
        with pytest.raises(tn.InputError, match=r"second time.*\n.*retain_graph=True"):
            loss.backward()
    handed = tn.compile(model, tn.HANDED, X, [tn.Grad()])
    with tn.attach(handed):
        output = model(X)
        call = output.grad_fn.call
        saved = weakref.ref(call.saved)
        del call
        output.sum().backward()
    gc.collect()
    assert saved() is None


def test_a_frozen_net_between_others() -> None:
    front, critic = nn.Linear(3, 3).double(), net().requires_grad_(False)
    program = tn.compile(critic, tn.HANDED, X, [tn.InputGrad()])
    result = same(front, program, lambda: F.cross_entropy(critic(front(X)), Y))
    assert result["input_grad"]["x"].shape == X.shape


class Keeps(nn.Module):
    """Keeps a term of the loss on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.term = nn.Linear(3, 2).double(), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.l(x)
        scale = 1 if self.term is None else 2
        self.term, self.seen = h.square().mean() * scale, h.detach()
        return h


def test_what_forward_keeps_is_not_that_of_another_call() -> None:
    model = nn.Sequential(Keeps())
    program = tn.compile(model, tn.HANDED, X, [tn.Grad()])
    assert "keeps  not 0.term" in program.explain("capture")
    with tn.attach(program):
        with torch.no_grad():
            model(X)
        assert model[0].term.shape == ()
        output = model(X)
        with pytest.raises(AttributeError, match="term"):
            _ = output.sum() + model[0].term
        with torch.no_grad():
            model(X)  # finds what was there
        model(X)
    assert model[0].term is None


@dataclass
class Output:
    logits: Tensor


class OfAClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Output:
        return Output(self.l(x))


def test_what_is_refused() -> None:
    model = net()
    with pytest.raises(tn.InputError, match="Sequential is no program"):
        tn.attach(model)  # type: ignore[arg-type]
    weighted = tn.compile(model, tn.HANDED, X, [tn.Grad(), tn.WeightedGrad()])
    with pytest.raises(tn.InputError, match="is handed in at a call of the program"):
        tn.attach(weighted)
    with pytest.raises(tn.UnsupportedError, match="an object of a class of its own"):
        tn.compile(OfAClass(), tn.HANDED, X, [tn.Grad()])
    many = torch.eye(8).double().view(8, 4, 2)
    with tn.attach(tn.compile(model, tn.HANDED, X, [tn.Grad()])):
        with pytest.raises(tn.UnsupportedError, match="many cotangents come at once"):
            torch.autograd.grad(model(X), list(model.parameters()), many, is_grads_batched=True)


def test_tensors_of_the_loss_are_read_by_name() -> None:
    """One that is replaced, as class weights are, and one that has another dtype."""
    model, loss = net(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]).double())
    program = tn.compile(model, loss, (X, Y), [tn.Grad()])
    loss.weight = torch.tensor([5.0, 1.0]).double()
    want = grads(model, lambda: loss(model(X), Y))
    for got, other in zip(program(X, Y)["grad"].values(), want, strict=True):
        torch.testing.assert_close(got, other)
    same(model, program, lambda: loss(model(X), Y))
    loss.float()
    with pytest.raises(tn.InputError, match=r"buffer 'loss\.weight' has dtype torch\.float32 now"):
        program(X, Y)


def test_a_loss_of_two_models_is_left_in_any_order() -> None:
    """Two monitors that are switched off one after the other: nothing is left on the loss."""
    models, loss = (net(), net()), nn.CrossEntropyLoss()
    first, second = (tn.attach(tn.compile(model, loss, (X, Y), [tn.Grad(), tn.KFLR()])) for model in models)
    before = set(vars(loss))
    first.__enter__()
    second.__enter__()
    for model in models:
        loss(model(X), Y).backward()
    first.__exit__(None, None, None)
    loss(models[1](X), Y).backward()
    second.__exit__(None, None, None)
    assert (len(first.results), len(second.results)) == (1, 2)
    assert vars(loss).keys() == before and grads(models[0], lambda: loss(models[0](X), Y))


@pytest.mark.parametrize("retain", [False, True])
def test_one_output_and_the_loss_of_two_labels(retain: bool) -> None:
    """Mixup: what is saved is kept until both have gone back."""
    model, loss, other = net(), nn.CrossEntropyLoss(), 1 - Y
    program = tn.compile(model, loss, (X, Y), [tn.Grad(), tn.KFLR()])

    def mixed() -> Tensor:
        output = model(X)
        return 0.3 * loss(output, Y) + 0.7 * loss(output, other)

    want = grads(model, mixed)
    with tn.attach(program) as attached:
        model.zero_grad()
        mixed().backward(retain_graph=retain)
        torch.testing.assert_close([p.grad for p in model.parameters()], want)
        assert len(attached.results) == 2
        one = loss(model(X), Y)
        one.backward()
        with pytest.raises(tn.InputError, match="backward runs a second time"):
            one.backward()


@pytest.mark.parametrize("change", [{"label_smoothing": 0.3}, {"reduction": "sum"}])
def test_a_loss_that_is_another_now(change: dict[str, Any]) -> None:
    """Its value and `.grad` would belong to two losses."""
    model, loss = net(), nn.CrossEntropyLoss()
    program = tn.compile(model, loss, (X, Y), [tn.Grad()])
    vars(loss).update(change)
    with tn.attach(program):
        value = loss(model(X), Y)
        with pytest.raises(tn.InputError, match=r"the loss gives \S+ and that of the program \S+: an option"):
            value.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


class Optional(nn.Module):
    """Options, and a tensor that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, scale: Tensor | None = None, twice: bool = False, *, how: str = "sum") -> Tensor:
        h = self.net(x) if scale is None else self.net(x) * scale
        return h * 2 if twice else h


DEFAULTS: dict[str, Callable[[nn.Module], Tensor]] = {
    "named": lambda m: m(X, twice=False),
    "all named": lambda m: m(x=X, scale=None, twice=False, how="sum"),
    "by place": lambda m: m(X, None, False),
    "a keyword alone": lambda m: m(X, how="sum"),
}


@pytest.mark.parametrize("call", DEFAULTS.values(), ids=DEFAULTS)
def test_defaults_written_out(call: Callable[[nn.Module], Tensor]) -> None:
    model = Optional()
    same(model, tn.compile(model, tn.HANDED, X, [tn.Grad()]), lambda: F.cross_entropy(call(model), Y))


def test_an_option_that_is_not_as_by_default() -> None:
    model = Optional()
    with tn.attach(tn.compile(model, tn.HANDED, X, [tn.Grad()])):
        with pytest.raises(tn.InputError, match=r"called with twice=True, not False as by default.*before tn.compile"):
            model(X, twice=True)
        with pytest.raises(tn.InputError, match=r"called with how='mean', not 'sum' as by default"):
            model(X, None, how="mean")
