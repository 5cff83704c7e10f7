"""tn.compute after something changed: the numbers are those of autograd on the model and loss as they are now."""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import math
import weakref
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import tnbackprop as tn
from tnbackprop import api as front

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(5, 2, generator=GENERATOR, dtype=torch.float64)
SETTINGS = SimpleNamespace(factor=1.0)
FACTOR = [1.0]


def factor_of_the_module() -> float:
    return FACTOR[0]


class Options(nn.Module):
    """Reads an attribute, a class attribute, a method, a property, a slot, a global and a tensor of its own."""

    kind = 1.0
    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.factor, self.options, self.function = 1.0, {"scale": [1.0]}, torch.tanh
        self.constant = torch.ones(2, dtype=torch.float64)
        self.inner = SimpleNamespace(deep=SimpleNamespace(factor=1.0))

    @property
    def twice(self) -> float:
        return 2.0

    def unused(self) -> float:
        return FACTOR[0]

    def last(self, h: Tensor) -> Tensor:
        return h * factor_of_the_module()

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.layer(x)) * self.factor * self.options["scale"][0] * self.constant
        return self.last(h * self.kind * self.twice * self.inner.deep.factor * SETTINGS.factor)


class Loss:
    """A callable object, with slots."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.factor * F.mse_loss(output, y)

    def method(self, output: Tensor, y: Tensor) -> Tensor:
        return self(output, y)


def scaled(output: Tensor, y: Tensor, factor: Any = 1.0) -> Tensor:
    return float(factor) * F.mse_loss(output, y)


def with_default(output: Tensor, y: Tensor, factor: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return scaled(output, y, factor[0])


def with_attribute(output: Tensor, y: Tensor) -> Tensor:
    return scaled(output, y, getattr(with_attribute, "factor", 1.0))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def layers(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), *modules, nn.Linear(4, 2))


def closed_over(factor: Any) -> Callable[..., Tensor]:
    return lambda output, y: scaled(output, y, factor[0])


def captured(function: Any) -> Any:
    return function.__closure__[0].cell_contents


def doubled(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(2 * x, self.weight, self.bias)  # type: ignore[arg-type]


def untied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    return model


CELL, ARRAY, RATE, PARTIAL, BOUND = [1.0], numpy.array([1.0]), torch.tensor([1.0]), {"factor": 1.0}, Loss()
MSE = nn.MSELoss()
Change = Callable[[Any, Any], Any]
# The model, the loss, what is changed of (model, loss)
CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Change]] = {
    "layer": (mlp, nn.MSELoss, lambda m, _: m.__setitem__(1, nn.ReLU())),
    "layer_in_a_list": (mlp, nn.MSELoss, lambda m, _: m.insert(1, nn.ReLU())),
    "power": (lambda: layers(nn.Softplus()), nn.MSELoss, lambda m, _: setattr(m[1], "beta", 3)),
    "epsilon": (lambda: layers(nn.LayerNorm(4)), nn.MSELoss, lambda m, _: setattr(m[1], "eps", 0.5)),
    "probability": (lambda: layers(nn.Dropout(0.0)), nn.MSELoss, lambda m, _: setattr(m[1], "p", 1.0)),
    "slope": (lambda: layers(nn.LeakyReLU()), nn.MSELoss, lambda m, _: setattr(m[1], "negative_slope", 0.9)),
    "mode": (lambda: layers(nn.Dropout(1.0)).eval(), nn.MSELoss, lambda m, _: m.train()),
    "frozen": (mlp, nn.MSELoss, lambda m, _: m[0].requires_grad_(False)),
    "untied": (untied, nn.MSELoss, lambda m, _: setattr(m[1], "weight", nn.Parameter(2 * m[0].weight.detach()))),
    "tied": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)),
        nn.MSELoss,
        lambda m, _: setattr(m[1], "weight", m[0].weight),
    ),
    "forward_hook": (mlp, nn.MSELoss, lambda m, _: m[1].register_forward_hook(lambda module, args, out: 2 * out)),
    "forward_pre_hook": (mlp, nn.MSELoss, lambda m, _: m[1].register_forward_pre_hook(lambda _, args: (-args[0],))),
    "parametrization": (mlp, nn.MSELoss, lambda m, _: parametrizations.weight_norm(m[0])),
    "no_bias": (mlp, nn.MSELoss, lambda m, _: setattr(m[0], "bias", None)),
    "forward_of_one": (mlp, nn.MSELoss, lambda m, _: setattr(m[0], "forward", doubled.__get__(m[0]))),
    "attribute": (Options, nn.MSELoss, lambda m, _: setattr(m, "factor", 2.0)),
    "sign_of_zero": (Options, nn.MSELoss, lambda m, _: setattr(m, "factor", -1.0)),
    "attribute_inside": (Options, nn.MSELoss, lambda m, _: m.options["scale"].__setitem__(0, 2.0)),
    "attribute_deep": (Options, nn.MSELoss, lambda m, _: setattr(m.inner.deep, "factor", 2.0)),
    "function": (Options, nn.MSELoss, lambda m, _: setattr(m, "function", torch.sin)),
    "constant": (Options, nn.MSELoss, lambda m, _: setattr(m, "constant", 3 * m.constant)),
    "constant_in_place": (Options, nn.MSELoss, lambda m, _: m.constant.mul_(3)),
    "data_of_a_constant": (Options, nn.MSELoss, lambda m, _: setattr(m.constant, "data", 3 * m.constant.data)),
    "class_attribute": (Options, nn.MSELoss, lambda m, _: setattr(Options, "kind", Options.kind + 1)),
    "property": (Options, nn.MSELoss, lambda m, _: setattr(Options, "twice", property(lambda self: 3.0))),
    "method": (Options, nn.MSELoss, lambda m, _: setattr(Options, "last", lambda self, h: 5 * h)),
    "global_of_a_method": (Options, nn.MSELoss, lambda m, _: setattr(SETTINGS, "factor", SETTINGS.factor + 1)),
    "global_of_a_helper": (Options, nn.MSELoss, lambda m, _: FACTOR.__setitem__(0, FACTOR[0] + 1)),
    "loss_option": (mlp, nn.MSELoss, lambda _, loss: setattr(loss, "reduction", "sum")),
    "loss_delta": (mlp, nn.HuberLoss, lambda _, loss: setattr(loss, "delta", 0.1)),
    "loss_attribute": (mlp, Loss, lambda _, loss: setattr(loss, "factor", 2.0)),
    "bound_method": (mlp, lambda: BOUND.method, lambda _, loss: setattr(BOUND, "factor", BOUND.factor + 1)),
    "partial": (mlp, lambda: functools.partial(scaled, **PARTIAL), lambda _, loss: loss.keywords.update(factor=2.0)),
    "closure": (mlp, lambda: closed_over(CELL), lambda _, loss: CELL.__setitem__(0, CELL[0] + 1)),
    "array": (mlp, lambda: closed_over(ARRAY), lambda _, loss: ARRAY.__setitem__(0, ARRAY[0] + 1)),
    "default": (mlp, lambda: with_default, lambda _, loss: with_default.__defaults__[0].__setitem__(0, 2.0)),
    "function_attribute": (mlp, lambda: with_attribute, lambda _, loss: setattr(with_attribute, "factor", 2.0)),
    "loss_of_a_model": (mlp, lambda: closed_over([1, Options()]), lambda _, loss: captured(loss).__setitem__(0, 4)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Any:
    """Whatever a case changes of this module, and of the class."""
    kept = {name: vars(Options)[name] for name in ("kind", "twice", "last")}
    yield
    for name, value in kept.items():
        setattr(Options, name, value)
    SETTINGS.factor = FACTOR[0] = 1.0


def assert_right(model: nn.Module, loss: Any) -> None:
    got = tn.compute(model, loss, (X, Y), [tn.Grad(), tn.BatchGrad()])
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, want in zip(
        theta, torch.autograd.grad(loss(model(X), Y), list(theta.values()), materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(got["grad"][name], want)
        torch.testing.assert_close(got["batch_grad"][name].sum(0), want)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", CHANGES)
def test_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right before and after, compiled again for the change, and not again for nothing."""
    build, build_loss, change = CHANGES[name]
    torch.manual_seed(0)
    model, loss = build().double(), build_loss()
    compiled = counted(monkeypatch)
    assert_right(model, loss)
    assert_right(model, loss)
    assert len(compiled) == 1
    change(model, loss)
    assert_right(model, loss)
    assert_right(model, loss)
    assert len(compiled) == 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    compiled: list[int] = []
    original = front.compile_program

    def once_more(*args: Any, **options: Any) -> Any:
        compiled.append(1)
        return original(*args, **options)

    monkeypatch.setattr(front, "compile_program", once_more)
    return compiled


def test_forward_of_a_class_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp().double()
    assert_right(model, MSE)
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: 2 * x.tanh())
    rules = {target: row for target, row in tn.RULES.items() if target is not nn.Tanh}
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = tn.compute(model, MSE, (X, Y), [tn.Grad()], rules=rules)["grad"]
    for name, want in zip(theta, torch.autograd.grad(MSE(model(X), Y), list(theta.values())), strict=True):
        torch.testing.assert_close(got[name], want)


def test_what_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, new tensors of one kind, equal functions, and what only other code reads: nothing is compiled again."""
    model, compiled = Options().double(), counted(monkeypatch)
    assert_right(model, closed_over([1.0]))
    with torch.no_grad():
        model.layer.weight.mul_(2)
    model.layer.bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
    Options.unused.__globals__["GENERATOR"].manual_seed(1)
    assert_right(model, closed_over([1.0]))
    tn.compute(model, closed_over([1.0]), (X[:2], Y[:2]), [tn.Grad(), tn.BatchGrad()])
    assert len(compiled) == 1


def test_running_statistics_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled = layers(nn.BatchNorm1d(4)).double().eval(), counted(monkeypatch)
    assert_right(model, MSE)
    model.train()(X)
    assert_right(model.eval(), MSE)
    assert len(compiled) == 1


def test_what_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that hides what it holds: compiled anew each time."""
    model, compiled = mlp().double(), counted(monkeypatch)
    model.counter = itertools.count()  # type: ignore[assignment]
    assert_right(model, MSE)
    assert_right(model, MSE)
    assert len(compiled) == 1  # which is told by where it stands
    model.hidden = (k for k in range(3))  # type: ignore[assignment]
    assert_right(model, MSE)
    assert_right(model, MSE)
    assert len(compiled) == 3


def test_loggers_and_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that leads back to the model, a logger and a weak reference: told apart as anything else."""
    model, compiled = mlp().double(), counted(monkeypatch)
    model.owner = SimpleNamespace(model=model, log=logging.getLogger("x"), self=weakref.ref(model))  # type: ignore[assignment]
    assert_right(model, MSE)
    model.owner.log.setLevel(logging.ERROR)
    assert_right(model, MSE)
    assert len(compiled) == 1


@pytest.mark.slow
def test_kept_programs_are_few() -> None:
    model = mlp().double()
    for k in range(front.KEPT + 3):
        tn.compute(model, functools.partial(scaled, factor=float(k)), (X, Y), [tn.Grad()])
    assert len(front._PROGRAMS[model]) == front.KEPT


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp, lambda: tn.einsum_layer("output[n, o] = W[o, i] * input[n, i]", W=(2, 3))])
def test_a_loss_does_not_keep_its_model(build: Callable[[], nn.Module]) -> None:
    """A loss that reads the model, a hook that closes over it, a layer with a rule as the model."""
    model = build().double()
    loss = lambda output, y, model=model: F.mse_loss(output, y) * len(list(model.parameters()))  # noqa: E731
    model.register_forward_hook(lambda module, args, out, model=model: out)
    tn.compute(model, loss, (X, Y), [tn.Grad()])
    gone = weakref.ref(model)
    del model, loss
    gc.collect()
    assert gone() is None


def test_the_options_of_compile() -> None:
    """indefinite=, memory_limit=, mappings that are no dicts, and the sentence for a model that is a function."""
    model, x = nn.Linear(3, 2).double(), X
    curved = lambda f, y: (f[:, 0] ** 2 - f[:, 1] ** 2).mean()  # noqa: E731
    for _ in range(2):
        with pytest.raises(tn.InputError, match="indefinite"):
            tn.compute(model, curved, (x, Y), [tn.DiagGGN()])
        got = tn.compute(model, curved, (x, Y), [tn.DiagGGN()], indefinite=tn.Indefinite.CLIP)["diag_ggn"]
        want = torch.stack([2 * x.square().mean(0), torch.zeros(3, dtype=x.dtype)])
        torch.testing.assert_close(got["weight"], want)
    with pytest.raises(tn.InputError, match="memory_limit"):
        tn.compute(model, MSE, (x, Y), [tn.Grad()], memory_limit="much")
    with pytest.raises(tn.InputError, match=r"model is function, not a torch\.nn\.Module"):
        tn.compute(lambda x: x, MSE, (x, Y), [tn.Grad()])  # type: ignore[arg-type]
    with pytest.raises(tn.InputError, match=r"the pair \(x, y\)"):
        tn.compute(model, MSE, x, [tn.Grad()])  # type: ignore[arg-type]


@pytest.mark.parametrize("run", [lambda *a: tn.compute(*a), lambda m, loss, b, q: tn.compile(m, loss, b, q)(*b)])
def test_other_mappings(run: Any) -> None:
    """As keyword arguments where forward has their names; else as one argument, dicts excepted."""
    for model, x in (
        (_With(lambda inner, d: inner(d["x"])), UserDict(x=X)),
        (_Named(), UserDict(x=X)),
        (_Any(), {"x": X}),
        (_HandsOn(), {"x": X}),
    ):
        model = model.double()
        got = run(model, MSE, (x, Y), [tn.Grad()])["grad"]["inner.weight"]
        torch.testing.assert_close(got, torch.autograd.grad(MSE(model.inner(X), Y), model.inner.weight)[0])


def test_a_mapping_and_a_dict() -> None:
    """One argument or keyword arguments: two programs."""
    model = _With(lambda inner, d=None, x=None: inner(x) if d is None else 2 * inner(d["x"])).double()
    for x, factor in ((UserDict(x=X), 2), ({"x": X}, 1), (UserDict(x=X), 2)):
        got = tn.compute(model, MSE, (x, Y), [tn.Grad()])["grad"]["inner.weight"]
        torch.testing.assert_close(got, torch.autograd.grad(MSE(factor * model.inner(X), Y), model.inner.weight)[0])


class _With(nn.Module):
    """A layer, and a function of it and the input."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.function = nn.Linear(3, 2), function

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.function(self.inner, *inputs, **named)


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Any(_Named):
    def forward(self, **named: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(named["x"])


class _HandsOn(_Named):
    def forward(self, *args: Any, **named: Any) -> Tensor:
        return super().forward(*args, **named)


def test_no_axes_and_one_axis() -> None:
    """A batch axis or none are two programs."""
    model, weight = nn.Linear(3, 2).double(), torch.tensor(2.0, dtype=torch.float64)
    loss = lambda f, y: (f * y["w"].reshape(-1, 1)).square().mean()  # noqa: E731
    for w in (weight, weight.expand(5)):
        got = tn.compute(model, loss, (X, {"w": w}), [tn.Grad()])["grad"]["weight"]
        torch.testing.assert_close(got, torch.autograd.grad(loss(model(X), {"w": w}), model.weight)[0])


def test_rules_that_changed() -> None:
    """A row whose closure changed is another rule."""
    power = [1]
    rules = tn.RULES | {Cube: lambda layer: f"output[n, i] = x[n, i]**{power[0]} * w[i]"}
    for power[0] in (1, 2):
        got = tn.compute(Cube().double(), None, (X, None), [tn.Jacobians()], rules=rules, check=False)["jacobians"]["w"]
        torch.testing.assert_close(got.diagonal(dim1=1, dim2=2), X ** power[0])


class Cube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_default_dtype() -> None:
    """Numbers that the model makes itself are in torch's default dtype."""
    model = _With(lambda inner, x: inner(x) * torch.tensor(math.pi)).double()
    assert_right(model, MSE)
    torch.set_default_dtype(torch.float64)
    try:
        assert_right(model, MSE)
    finally:
        torch.set_default_dtype(torch.float32)
