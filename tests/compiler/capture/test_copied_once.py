"""One copy of the model's tensors for several runs of a forward: as good as a new one for each."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.capture import state
from tnbackprop.compiler.capture.export import Wrapped
from tnbackprop.compiler.capture.state import copied, copied_once


def wrapped() -> Wrapped:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return Wrapped(model, nn.MSELoss(), False)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def weight(of: Wrapped) -> nn.Parameter:
    found = of.get_parameter("model.0.weight")
    assert isinstance(found, nn.Parameter)
    return found


def test_one_memory_that_is_not_the_model_s() -> None:
    model = wrapped()
    own = {memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen = []
    with copied_once():
        for _ in range(3):
            with copied(model):
                seen.append([memory(tensor) for tensor in (*model.parameters(), *model.buffers())])
    assert seen[0] == seen[1] == seen[2] and not own & set(seen[0])
    assert own == {memory(tensor) for tensor in (*model.parameters(), *model.buffers())}


def test_each_alone_without_it() -> None:
    model = wrapped()
    with copied(model):
        first = weight(model)
    with copied(model):
        assert memory(weight(model)) != memory(first)


def test_nothing_but_the_values_is_handed_on() -> None:
    model = wrapped()
    called: list[Tensor] = []
    with copied_once():
        with copied(model):
            first = weight(model)
            first.register_hook(called.append)
            first.grad = torch.ones_like(first)
            first.requires_grad_(False)
            first.marked = True  # type: ignore[attr-defined]
        with copied(model):
            again = weight(model)
            assert again is not first and again.grad is None and again.requires_grad and not hasattr(again, "marked")
            again.sum().backward()
    assert not called and weight(model).grad is None


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.detach().mul_(2),
    "data": lambda w: w.data.mul_(2),
    "numpy": lambda w: w.detach().numpy().fill(3),
    "NaN": lambda w: w.data.fill_(math.nan),
    "one element": lambda w: w.data[0, 0].add_(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_what_is_written_to_a_copy_is_not_in_the_next(write: Callable[[Tensor], object]) -> None:
    model = wrapped()
    want = weight(model).detach().clone()
    with copied_once():
        with copied(model):
            write(weight(model))
        with copied(model):
            assert torch.equal(weight(model), want)
    assert torch.equal(weight(model), want)


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_what_is_written_to_the_model_is_in_the_next(write: Callable[[Tensor], object]) -> None:
    model = wrapped()
    with copied_once():
        with copied(model):
            pass
        write(weight(model))
        with copied(model):
            found = weight(model).detach().clone()
    assert torch.equal(found.nan_to_num(7.0), weight(model).detach().nan_to_num(7.0))


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.half, lambda w: w.T.contiguous().T])
def test_what_is_another_tensor_now(change: Callable[[Tensor], Tensor]) -> None:
    """`.data =` leaves the parameter what it is."""
    model = wrapped()
    with copied_once():
        with copied(model):
            pass
        weight(model).data = change(weight(model).detach())
        with copied(model):
            found = weight(model)
            told = found.dtype, found.stride()
    assert told == (weight(model).dtype, weight(model).stride())


def test_other_threads_have_their_own() -> None:
    model, seen = wrapped(), []

    def run() -> None:
        with copied(model):
            seen.append(memory(weight(model)))

    with copied_once():
        with copied(model):
            first = memory(weight(model))
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen != [first]


def test_a_capture_copies_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = list[Tensor](), state.Kept

    def counted(original: Tensor, memory: Tensor, version: int) -> state.Kept:
        made.append(original)
        return kept(original, memory, version)

    monkeypatch.setattr(state, "Kept", counted)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    tn.compile(model, nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)), [tn.BatchGrad(), tn.KFAC()])
    assert [id(each) for each in made] == [id(p) for p in model.parameters()]
