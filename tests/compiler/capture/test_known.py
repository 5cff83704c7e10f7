"""What forward asks of buffers and other constants, in numbers and shapes: the values that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

MASK = torch.tensor([True, False, True, True])
PAIRS = torch.ones(4, 4).triu(1).bool()
ONE = torch.tensor(2.5)
FEW = torch.tensor([2, 0])
COUNTS = torch.tensor([2, 0, 2, 1])


class Asks(nn.Module):
    """A head on what a function makes of a linear layer's output, with a buffer k."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], k: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.function = nn.Linear(4, 4, dtype=torch.float64), function
        self.register_buffer("k", k.clone())
        self.head = nn.Linear(function(torch.randn(2, 4), k).shape[1], 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.l(x), self.k))


def wrote(h: Tensor, k: Tensor) -> Tensor:
    made = h.clone()
    made[:, k] = h[:, :3]
    return made


def combined(h: Tensor, k: Tensor) -> Tensor:
    pairs = torch.combinations(torch.arange(4))
    return h[:, pairs[:, 0]] * h[:, pairs[:, 1]]


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Tensor]] = {
    "mask": (lambda h, k: h[:, k], MASK),
    "mask behind an ellipsis": (lambda h, k: h[..., k] * 2, MASK),
    "mask of pairs": (lambda h, k: (h[:, :, None] * h[:, None])[:, k], PAIRS),
    "written": (wrote, MASK),
    "nonzero": (lambda h, k: h[:, k.nonzero().squeeze(1)], MASK),
    "masked_select": (lambda h, k: h[:, torch.arange(4).masked_select(k)], MASK),
    "item": (lambda h, k: h * k.item(), ONE),
    "float": (lambda h, k: h * float(k), ONE),
    "int": (lambda h, k: h[:, : int(k)], ONE),
    "range": (lambda h, k: h + sum(h[:, :1] * j for j in range(k[0])), FEW),
    "branch": (lambda h, k: h.relu() if k > 0 else h, ONE),
    "branch on what is made of it": (lambda h, k: h.tanh() if (k * 2).exp().sum() > 1e9 else h.sin(), ONE),
    "list": (lambda h, k: torch.stack([h[:, j] for j in k.tolist()], 1), FEW),
    "numpy": (lambda h, k: h[:, k.numpy()], FEW),
    "unique": (lambda h, k: h[:, k.unique()], COUNTS),
    "repeat_interleave": (lambda h, k: h.repeat_interleave(k, 1), COUNTS),
    "split": (lambda h, k: torch.cat([p.sum(1, True) for p in h.split(k.tolist(), 1)], 1), torch.tensor([3, 1])),
    "combinations": (combined, ONE),
    "a mask that is made": (lambda h, k: h[:, torch.arange(4) % 2 == 0], ONE),
    "each time another": (lambda h, k: torch.cat([h * k[j].item() for j in range(2)], 1), FEW),
}  # fmt: skip


def data(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return tuple(torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (4, 2))  # type: ignore[return-value]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("function,k", CASES.values(), ids=CASES)
def test_values(function: Callable[[Tensor, Tensor], Any], k: Tensor) -> None:
    """Individual gradients for several batch sizes, against autograd of each sample."""
    model = Asks(function, k)
    program = tn.compile(model, nn.MSELoss(reduction="sum"), data(5), [tn.BatchGrad()])
    for size in (5, 1):
        x, y = data(size)
        found = program(x, y)["batch_grad"]
        for n in range(size):
            loss = F.mse_loss(model(x[n : n + 1]), y[n : n + 1], reduction="sum")
            want = torch.autograd.grad(loss, list(model.parameters()))
            for (name, _), value in zip(model.named_parameters(), want, strict=True):
                torch.testing.assert_close(found[name][n], value, rtol=0, atol=1e-10)


class Half(nn.Module):
    def forward(self, f: Tensor, y: Any) -> Tensor:
        return f.square().sum() / 2


class Entries(nn.Module):
    """Entries of data and of a parameter, where what is not data says which."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.l, self.w, self.function = nn.Linear(4, 2), nn.Parameter(torch.randn(2)), function
        self.register_buffer("times", torch.tensor([1, 2]))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


ENTRIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "along an axis": lambda m, x: m.l(x).repeat_interleave(m.times, dim=1),
    "by name": lambda m, x: torch.repeat_interleave(m.l(x), repeats=m.times, dim=-1),
    "a number as a tensor": lambda m, x: m.l(x).repeat_interleave(torch.tensor(2), dim=1),
    "one as a tensor": lambda m, x: m.l(x).repeat_interleave(torch.tensor([2]), dim=1),
    "of a parameter": lambda m, x: m.l(x) * m.w.repeat_interleave(m.times)[1:],
    "flattened": lambda m, x: m.l(x) @ (m.l.weight[:, :1] * m.w).repeat_interleave(2).view(2, 4),
    "flattened samples": lambda m, x: m.l(x).repeat_interleave(2).view(-1, 4),
    "combinations": lambda m, x: x[:, :1] * torch.combinations(m.l.weight[0]).prod(1),
    "masked_select": lambda m, x: m.l(x) * m.l.weight.masked_select(m.times[:, None] == 2)[:2],
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("function", ENTRIES.values(), ids=ENTRIES)
def test_entries(function: Callable[[Any, Tensor], Tensor]) -> None:
    model = Entries(function)
    x = data(5)[0]
    program = tn.compile(model, Half(), (x, x), [tn.BatchGrad()])
    for size in (5, 1):
        x = data(size)[0]
        found = program(x, x)["batch_grad"]
        for n in range(size):
            loss, own = Half()(model(x[n : n + 1]), None), list(model.parameters())
            want = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
            for (name, _), value in zip(model.named_parameters(), want, strict=True):
                torch.testing.assert_close(found[name][n], value, rtol=0, atol=1e-10)


NAMED = ("mask", "written", "item", "branch", "list", "numpy", "each time another")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_other_values_are_refused(name: str) -> None:
    """At the call, and not by `compute`, which compiles again; `explain` names the buffer."""
    function, k = CASES[name]
    model = Asks(function, k)
    program = tn.compile(model, nn.MSELoss(), data(5), [tn.Grad()])
    assert "holds  numbers or shapes made of k" in program.explain("capture")
    with pytest.raises(tn.UnsupportedError, match="values of buffer 'k', and a file"):
        tn.generate(model, [tn.Grad()], loss=nn.MSELoss(), example=data(5))
    before = tn.compute(model, nn.MSELoss(), data(5), [tn.Grad()])["grad"]["l.weight"]
    model.k.copy_(model.k.flip(0) if model.k.ndim else model.k * -1)
    with pytest.raises(tn.InputError, match=r"buffer 'k' has other values now.*compile again"):
        program(*data(5))
    after = tn.compute(model, nn.MSELoss(), data(5), [tn.Grad()])["grad"]["l.weight"]
    want = torch.autograd.grad(F.mse_loss(model(data(5)[0]), data(5)[1]), model.l.weight)[0]
    torch.testing.assert_close(after, want, rtol=0, atol=1e-10)
    assert not torch.allclose(before, after)


def test_a_buffer_in_another_dtype_is_another_one() -> None:
    model = Asks(*CASES["item"])
    program = tn.compile(model, nn.MSELoss(), data(5), [tn.Grad()])
    model.k = model.k.double()
    with pytest.raises(tn.InputError, match=r"buffer 'k' has other values now"):
        program(*data(5))


def filled(h: Tensor, k: Tensor) -> Tensor:
    """Written to by an index, which gives nothing back."""
    first = torch.zeros(1, dtype=h.dtype)
    first[0] = h.detach()[0].max()  # the same for any number of the example's samples
    return h * first.item()


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "filled by an index": filled,
    "data": lambda h, k: h * h.max().item(),
    "written to a constant": lambda h, k: h * torch.zeros(()).copy_(h.detach().max()).item(),
    "of as many as there are samples": lambda h, k: h * float(torch.arange(len(h)).sum() + 1),
    "random": lambda h, k: h * (2 if torch.rand(()) > 0.5 else 3),
    "parameters": lambda h, k: h * nn.Parameter(torch.ones(1)).item() * h.sum().item(),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_same_in_every_call_is_refused(function: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(tn.UnsupportedError):
        tn.compile(Asks(function, ONE), nn.MSELoss(), data(5), [tn.Grad()])


COLD = """
def signed(h, k):
    yes = bool((k == k.abs()).all())
    return h.sin() if yes else h
"""


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_function_that_python_has_not_run_yet(calls: int) -> None:
    """Python rewrites the instructions of a function that it has run some times; what asks stays where it was."""
    made: dict[str, Any] = {}
    exec(COLD, made)
    model = nn.Linear(4, 4, dtype=torch.float64)

    class Cold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = model
            self.k: Tensor
            self.register_buffer("k", FEW)

        def forward(self, x: Tensor) -> Any:
            h = self.l(x)
            for _ in range(calls):
                h = made["signed"](h, self.k)
            return h

    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    result = tn.compute(Cold(), F.mse_loss, (x, y), [tn.Grad()])["grad"]
    (want,) = torch.autograd.grad(F.mse_loss(Cold()(x), y), model.weight)
    torch.testing.assert_close(result["l.weight"], want)
