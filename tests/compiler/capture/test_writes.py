"""What a forward writes to that is not of the run: refused, and as it was; and what it draws at compile."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tnbackprop.errors import TnError

from ...capturing import Function
from ...rehearsing import LOSS, batch, check, compiled, layers, refused

GLOBAL = torch.ones(3, dtype=torch.float64)


def in_a_list(m: Any, x: Tensor) -> None:
    m.box[0].add_(1)


def in_a_dict(m: Any, x: Tensor) -> None:
    with torch.no_grad():
        m.named["mean"].copy_(x.detach().mean(0))


def in_an_object(m: Any, x: Tensor) -> None:
    m.state.mean[0] = 2


def through_a_view(m: Any, x: Tensor) -> None:
    m.box[0].view(-1)[1:].zero_()


def as_out(m: Any, x: Tensor) -> None:
    torch.add(torch.ones(3, dtype=x.dtype), 1, out=m.box[0])


def several(m: Any, x: Tensor) -> None:
    torch._foreach_add_([torch.zeros(3, dtype=x.dtype), m.box[0]], 1.0)


def a_global(m: Any, x: Tensor) -> None:
    GLOBAL.mul_(2)


@pytest.mark.parametrize(
    "write,message",
    [
        (in_a_list, r"writes to 'box\[0\]' during forward.*m.box\[0\].add_\(1\)"),
        (in_a_dict, r"writes to \"named\['mean'\]\" during forward"),
        (in_an_object, r"writes to 'state\.mean' during forward"),
        (through_a_view, r"writes to 'box\[0\]'"),
        (as_out, r"writes to 'box\[0\]'"),
        (several, r"writes to 'box\[0\]'"),
        (a_global, r"writes to 24 bytes that it does not make.*GLOBAL.mul_\(2\)"),
    ],
)
def test_memory_that_was_there_before(write: Callable[[Any, Tensor], None], message: str) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        write(m, x)
        return m.b(m.a(x)) * m.box[0] * m.named["mean"] * m.state.mean * GLOBAL

    model, ones = Function(forward, **layers()).double(), torch.ones(3, dtype=torch.float64)
    model.box, model.named, model.state = [ones.clone()], {"mean": ones.clone()}, SimpleNamespace(mean=ones.clone())
    refused(model, message)
    assert all(torch.equal(each, ones) for each in (model.box[0], model.named["mean"], model.state.mean, GLOBAL))


def of_numbers(x: Tensor) -> Tensor:
    made = torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)
    made[0] = 4
    return made


def of_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.ones(3)).add_(1)


def of_the_batch(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def of_empty(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    return made.copy_(x).clamp_(min=0)


@pytest.mark.parametrize("make", [of_numbers, of_numpy, of_the_batch, of_empty])
def test_memory_of_the_run_is_written_to(make: Callable[[Tensor], Tensor]) -> None:
    model = Function(lambda m, x: m.b(m.a(x.clone()) * make(x.clone())), **layers())
    check(model)


def python(m: Any, h: Tensor) -> Tensor:
    return h * random.random()


def numpy(m: Any, h: Tensor) -> Tensor:
    return h * np.random.rand()


def own(m: Any, h: Tensor) -> Tensor:
    return h + torch.rand(h.shape, generator=m.generator, dtype=h.dtype)


def in_a_container(m: Any, h: Tensor) -> Tensor:
    return h * torch.bernoulli(torch.full_like(h, 0.5), generator=m.several[0])


def own_of_numpy(m: Any, h: Tensor) -> Tensor:
    return h * float(m.several[1].random())


@pytest.mark.parametrize(
    "draw,message",
    [
        (python, "random numbers that are not torch's"),
        (numpy, "random numbers that are not torch's"),
        (own_of_numpy, "random numbers that are not torch's"),
        (own, r"a generator of its own in the model.*generator=m\.generator"),
        (in_a_container, r"a generator of its own in the model"),
    ],
)
def test_draws_at_compile_are_for_free(draw: Callable[[Any, Tensor], Tensor], message: str) -> None:
    """Refused, and everybody draws afterwards what would have been drawn."""
    model: Any = Function(lambda m, x: m.b(draw(m, m.a(x))), **layers()).double()
    model.generator, model.several = torch.Generator(), [torch.Generator(), np.random.default_rng(0)]

    def next_numbers() -> list[Any]:
        generators = (torch.default_generator, model.generator, model.several[0])
        states = [each.get_state().tolist() for each in generators]
        return [random.getstate(), np.random.get_state()[1].tolist(), model.several[1].bit_generator.state, *states]

    before = next_numbers()
    refused(model, message)
    assert next_numbers() == before


class Slotted:
    __slots__ = ("__dict__", "calls", "weight")

    def __init__(self) -> None:
        self.calls, self.more = 0, 0


class Derived(Slotted):
    __slots__ = "other"


def test_an_object_with_slots_is_as_it_was() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        m.state.calls, m.state.more, m.state.other = m.state.calls + 1, m.state.more + 1, m.a(x)
        m.state.weight = m.b.weight * m.state.calls
        return m.state.other @ m.state.weight.T

    model, state = Function(forward, **layers()).double(), Derived()
    model.state = state
    program, (x, y) = compiled(model), batch()
    assert (state.calls, state.more) == (0, 0) and not hasattr(state, "weight") and not hasattr(state, "other")
    want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)


def test_a_generator_in_the_loss() -> None:
    generator = torch.Generator()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return ((f - y) * torch.rand(f.shape, generator=generator, dtype=f.dtype)).square().mean()

    before = generator.get_state()
    with pytest.raises(TnError, match="a generator of its own in"):
        check(nn.Sequential(nn.Linear(3, 3)), loss=loss)
    assert torch.equal(generator.get_state(), before)
