"""Models that return more than the loss reads: only what it reads counts. Oracle: the model with that one output."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.proof.proof import prove

from ...capturing import Function
from ...oracle_second import diag_ggn
from ...rehearsing import batch, layers

Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Returned:
    logits: Tensor
    hidden: Any = None

    def best(self) -> Tensor:
        return self.logits


class Cache:
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors


class Keyless(OrderedDict[str, Tensor]):
    """As the outputs of diffusers: torch's pytree knows its values and not their keys."""


pytree.register_pytree_node(
    Keyless,
    lambda keyless: (list(keyless.values()), tuple(keyless)),
    lambda values, keys: Keyless(zip(keys, values, strict=True)),
    serialized_type_name="tests.Keyless",
)


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "a dict": (lambda h, o: {"logits": o, "hidden": h}, lambda out: out["logits"]),
    "a tuple": (lambda h, o: (o, h), lambda out: out[0]),
    "a named tuple": (lambda h, o: Pair(o, h), lambda out: out.logits),
    "an ordered dict": (lambda h, o: OrderedDict(logits=o, hidden=h), lambda out: out["logits"]),
    "a dataclass": (lambda h, o: Returned(o, [h, Returned(2 * h)]), lambda out: out.logits),
    "a namespace": (lambda h, o: SimpleNamespace(logits=o, hidden=h), lambda out: out.logits),
    "a cache": (lambda h, o: {"logits": o, "cache": Cache(h)}, lambda out: out["logits"]),
    "a class without keys": (lambda h, o: Keyless(hidden=h, sample=o), lambda out: out["sample"]),
    "None": (lambda h, o: {"loss": None, "logits": o}, lambda out: out["logits"]),
    "numbers and text": (lambda h, o: (o, 3, 0.5, "text", h.shape[1]), lambda out: out[0]),
    "a scalar": (lambda h, o: (h.square().mean(), o), lambda out: out[1]),
    "integers": (lambda h, o: (o.argmax(1), o), lambda out: out[1]),
    "pairs of samples": (lambda h, o: (o, h @ h.T), lambda out: out[0]),
    "what a mask picks": (lambda h, o: (o, h[h > 0]), lambda out: out[0]),
    "complex": (lambda h, o: (o, torch.fft.fft(h)), lambda out: out[0]),
    "a number of the data": (lambda h, o: (o, h.sum() * h.sum().item()), lambda out: out[0]),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("pack,take", OUTPUTS.values(), ids=OUTPUTS)
def test_only_what_the_loss_reads(pack: Callable[..., Any], take: Callable[..., Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x).tanh()
        return pack(h, m.b(h))

    def loss(output: Any, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(take(output), y)

    model, (x, y) = Function(forward, **layers()).double(), batch()
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.DiagGGN()])
    result = program(x, y)
    want = torch.autograd.grad(nn.functional.mse_loss(plain(x), y), list(plain.parameters()))
    torch.testing.assert_close(tuple(result["grad"].values()), want)
    torch.testing.assert_close(take(result.output), plain(x).detach())
    for got, value in zip(result["diag_ggn"].values(), diag_ggn(plain, nn.MSELoss(), x, y).values(), strict=True):
        torch.testing.assert_close(got, value)


class Sparse(OrderedDict[str, Any]):
    """Without the entries that are None, as the outputs of transformers."""

    def __init__(self, **entries: Any) -> None:
        super().__init__({key: value for key, value in entries.items() if value is not None})


pytree.register_pytree_node(
    Sparse,
    lambda sparse: (list(sparse.values()), tuple(sparse)),
    lambda values, keys: Sparse(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.Sparse",
    flatten_with_keys_fn=lambda sparse: ([(pytree.MappingKey(k), v) for k, v in sparse.items()], tuple(sparse)),
)


def test_outputs_that_drop_what_is_left() -> None:
    """The others keep their places, and are compared with their own."""
    model, (x, y) = Function(lambda m, x: Sparse(pairs=m.b(x) @ m.b(x).T, own=m.a(x)), **layers()).double(), batch()
    loss = lambda out, y: (out["own"] - y).square().mean()  # noqa: E731
    program = tn.compile(model, loss, (x, y), [tn.BatchGrad()])
    result = program(x, y)
    assert list(result.output) == ["own"] and torch.equal(result.output["own"], model.a(x))
    assert "checked on 2 samples" in prove(program, (x, y), tn.RULES)


def test_what_is_left_is_told() -> None:
    model, (x, y) = Function(lambda m, x: (m.a(x), m.b(x) @ m.b(x).T), **layers()).double(), batch()
    program = tn.compile(model, lambda out, y: (out[0] - y).square().mean(), (x, y), [tn.Grad()])
    assert "leaves  aten.matmul.default in the model makes a tensor of shape [N, N]" in program.explain("capture")
    assert program(x, y).output[1] is None
    with pytest.raises(tn.UnsupportedError, match="two batch axes"):
        tn.compile(model, lambda out, y: (out[0] - y).square().mean() + out[1].sum(), (x, y), [tn.Grad()])


def test_a_loss_that_is_computed_in_the_model() -> None:
    """The root is at the last output before it, the logits."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        logits = m.b(m.a(x).tanh())
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}

    model, (x, _) = Function(forward, **layers()).double(), batch()
    y = torch.arange(5) % 3
    result = tn.compile(model, lambda out, y: out["loss"], ((x, y), None), [tn.DiagGGN()])((x, y))["diag_ggn"]
    plain = nn.Sequential(model.a, nn.Tanh(), model.b)
    for got, value in zip(result.values(), diag_ggn(plain, nn.CrossEntropyLoss(), x, y).values(), strict=True):
        torch.testing.assert_close(got, value)


SEVERAL: dict[str, Callable[[Any, Tensor], Any]] = {
    "side by side": lambda m, x: {"one": m.a(x), "other": m.b(x)[:, None].tanh()},
    "one of the other": lambda m, x: (lambda h: {"one": h, "other": m.b(h)[:, None]})(m.a(x).tanh()),
}


@pytest.mark.slow
@pytest.mark.parametrize("forward", SEVERAL.values(), ids=SEVERAL)
def test_several_that_the_loss_reads(forward: Callable[[Any, Tensor], Any]) -> None:
    """Curvature is taken at all of them side by side. Oracle: the model that returns them so, with one output."""

    def loss(out: Any, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out["other"][:, 0], y.softmax(1)) + (out["one"] - y).square().mean()

    def joined(m: Any, x: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in forward(m, x).values()], 1)

    def of_joined(out: Tensor, y: Tensor) -> Tensor:
        return loss({"one": out[:, :3], "other": out[:, None, 3:]}, y)

    model, (x, y) = Function(forward, **layers()).double(), batch()
    plain = Function(joined, a=model.a, b=model.b)
    quantities = [tn.DiagGGN(), tn.HessianDiag(), tn.KFAC(), tn.BatchGrad()]
    result = tn.compile(model, loss, (x, y), quantities)(x, y, seed=0)
    want = tn.compile(plain, of_joined, (x, y), quantities)(x, y, seed=0)
    for name, value in diag_ggn(plain, of_joined, x, y).items():
        torch.testing.assert_close(result["diag_ggn"][name], value)
        for key in ("hessian_diag", "batch_grad"):
            torch.testing.assert_close(result[key][name], want[key][name])
        torch.testing.assert_close(result["kfac"][name].to_dense(), want["kfac"][name].to_dense())
    assert list(result.output) == ["one", "other"] and result.output["other"].shape == (5, 1, 3)


def test_outputs_that_do_not_go_side_by_side() -> None:
    """A Jacobian is of each; one that has the batch on another axis has no place among the others."""
    model, (x, y) = Function(lambda m, x: (m.a(x), m.b(x).T), **layers()).double(), batch()

    def loss(out: Any, y: Tensor) -> Tensor:
        return (out[0] - y).square().mean() + out[1].square().mean()

    for quantity in (tn.Jacobians(), tn.DiagGGN()):
        with pytest.raises(tn.UnsupportedError, match=r"the loss reads 2: \[0\] \[N, 3\], \[1\] \[3, N\]"):
            tn.compile(model, loss, (x, y), [quantity])


@pytest.mark.parametrize("kind", ["distribution", "method"])
def test_an_object_whose_methods_the_loss_calls(kind: str) -> None:
    """What is compared with autograd needs the output alone; where only the object knows the loss, that is told."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return torch.distributions.Normal(h, 1.0, validate_args=False) if kind == "distribution" else Returned(h)

    def loss(out: Any, y: Tensor) -> Tensor:
        if kind == "distribution":
            return -out.log_prob(y).mean()
        return (out.best() - y).square().mean()

    model, (x, y) = Model().double(), batch()
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchL2()])
    want = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)


class GivesWeights(nn.Module):
    """A prediction, and weights of the loss that no parameter which is trained reaches."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.t, self.how = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False), how

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        p = self.l(x)
        how = {"input": m, "mask": m > 0.5, "detached": p.detach().sigmoid(), "frozen": self.t(x).sigmoid()}
        return p, how[self.how]


@pytest.mark.parametrize("how", ["input", "mask", "detached", "frozen"])
def test_an_output_that_no_parameter_reaches_is_as_a_label(how: str) -> None:
    """Curvature is by the prediction alone, as the loss is convex in it and not in its weights; in closed form."""
    model, x, y = GivesWeights(how).double(), (torch.randn(4, 4).double(), torch.rand(4, 3).double()), torch.zeros(4, 3)
    loss: Callable[..., Tensor] = lambda f, y: ((f[0] - y).square() * f[1]).sum(1).mean()  # noqa: E731
    result = tn.compute(model, loss, (x, y.double()), [tn.DiagGGN(), tn.KFLR(), tn.HessianDiag()])
    weights = model(*x)[1].double()
    G = 2 * torch.einsum("no,ni->oi", weights, x[0].square()) / 4
    for key in ("diag_ggn", "hessian_diag"):
        torch.testing.assert_close(result[key]["l.weight"], G)
    torch.testing.assert_close(result["kflr"]["l.bias"].factors[0].diagonal(), 2 * weights.mean(0))
