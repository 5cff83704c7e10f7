"""A forward that changes its own tensors, and one that asks for the batch size: right, or refused by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import InputError, UnsupportedError

from ...capturing import Function
from ...rehearsing import LOSS, batch, check, compiled, layers, refused

# what a forward writes to


def written(name: str, write: Callable[..., Any]) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        write(m, x)
        return m.b(m.a(x)) * m.count * m.average

    model = Function(forward, **layers()).double()
    model.register_buffer("count", torch.ones((), dtype=torch.float64))
    model.register_buffer("average", torch.ones((), dtype=torch.float64))
    model.plain = torch.ones((), dtype=torch.float64)
    return model


def count(m: Any, x: Tensor) -> None:
    m.count += 1


def count_anew(m: Any, x: Tensor) -> None:
    m.count = m.count + 1


def average(m: Any, x: Tensor) -> None:
    with torch.no_grad():
        m.average.mul_(0.9).add_(0.1 * m.a(x).mean())


def average_anew(m: Any, x: Tensor) -> None:
    m.average = 0.9 * m.average + 0.1 * m.a(x).mean().detach()


def clamp(m: Any, x: Tensor) -> None:
    m.a.weight.data.clamp_(-0.1, 0.1)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "name,write",
    [
        ("count", count),
        ("count", count_anew),
        ("average", average),
        ("average", average_anew),
        ("average", lambda m, x: m.average.data.mul_(0.9)),
        ("plain", lambda m, x: m.plain.add_(1)),
        (r"a\.weight", clamp),
    ],
)
def test_writes(name: str, write: Callable[..., Any]) -> None:
    """Refused, and every tensor is as it was, the very same object."""
    model = written(name, write)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers()), "plain": model.plain}
    values = {key: tensor.clone() for key, tensor in before.items()}
    refused(model, f"writes to '{name}'")
    after = {**dict(model.named_parameters()), **dict(model.named_buffers()), "plain": model.plain}
    assert all(after[key] is tensor and torch.equal(tensor, values[key]) for key, tensor in before.items())


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.BatchNorm1d(3),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.utils.spectral_norm(nn.Linear(3, 3)),
    ],
    ids=["instance", "batch", "spectral", "old spectral"],
)
def test_running_statistics(layer: nn.Module) -> None:
    """In train mode refused, in eval mode right; buffers are as they were after both."""
    positions = [nn.Unflatten(1, (3, 1)), nn.Upsample(2), layer, nn.Flatten(), nn.Linear(6, 3)]
    middle = positions if isinstance(layer, nn.InstanceNorm1d) else [layer]
    model = nn.Sequential(nn.Linear(3, 3), *middle).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused(model, r"model\.eval\(\)")
    check(model.eval())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_table_made_anew_is_no_state() -> None:
    """A plain attribute that each forward sets is nothing that a program would have to change."""

    def forward(m: Any, x: Tensor) -> Any:
        m.table = m.a(x).detach().cos()
        return m.b(m.table + m.a(x))

    model = Function(forward, **layers())
    model.table = torch.zeros(5, 3)
    before = model.table
    check_model = compiled(model)
    assert model.table is before and check_model is not None


# the batch size


def branch(condition: Callable[[int], bool]) -> nn.Module:
    return Function(lambda m, x: m.a(x) * 3 if condition(x.shape[0]) else m.b(m.a(x)), **layers())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("condition", [lambda n: n == 1, lambda n: n > 1, lambda n: 3 * n < 4])
def test_a_branch_on_one_sample(condition: Callable[[int], bool]) -> None:
    """Compiled with one it is refused; compiled with more, one is refused when it comes, and the others are right."""
    model = branch(condition)
    with pytest.raises(UnsupportedError, match="for one sample"):
        compiled(model, 1)
    program = compiled(model, 4)
    assert "for N >= 2" in program.explain("capture")
    for size in (2, 3, 7):
        x, y = batch(size)
        options = {"allow_unused": True, "materialize_grads": True}
        want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()), **options)
        got = program(x, y)["grad"]
        for (name, _), value in zip(model.named_parameters(), want, strict=True):
            torch.testing.assert_close(got[name], value)
    with pytest.raises(InputError, match=r"(?s)one sample.*branches on the batch size"):
        program(*batch(1))


def test_no_file_of_a_branch_on_one_sample() -> None:
    with pytest.raises(UnsupportedError, match="for one sample"):
        tn.generate(branch(lambda n: n == 1).double(), [tn.BatchGrad()], loss=LOSS, example=batch())


def test_a_branch_that_changes_only_the_gradient() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        return m.b(h.detach() if x.shape[0] == 1 else h)

    with pytest.raises(InputError, match="one sample"):
        compiled(Function(forward, **layers()), 3)(*batch(1))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_sizes_in_numbers_and_squeezed_axes(size: int) -> None:
    check(Function(lambda m, x: m.b(m.a(x)[:, None].squeeze(1)) * torch.ones(x.shape[0], 1).double(), **layers()), size)


def test_draws_of_one_sample() -> None:
    """Masks are drawn from one seed for the comparison, which leaves torch's own state alone."""
    model = Function(lambda m, x: m.b(nn.functional.dropout(m.a(x), 0.5, True)), **layers())
    state = torch.get_rng_state()
    program = compiled(model, 1)
    assert torch.equal(state, torch.get_rng_state())
    program(*batch(1))


# parameters that are others than when the program was compiled


def pair(tied: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    if tied:
        model[2].weight = model[0].weight
    return model


def untie(model: Any) -> None:
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())


def tie(model: Any) -> None:
    model[2].weight = model[0].weight


def add(model: Any) -> None:
    model.register_parameter("more", nn.Parameter(torch.zeros(2)))


def grow(model: Any) -> None:
    model[2].bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "tied,change,message",
    [
        (True, untie, r"'0\.weight' is no longer the same as '2\.weight'"),
        (False, tie, r"'0\.weight' is the same as '2\.weight' now"),
        (False, add, "'more' was not there"),
        (False, lambda m: m[0].weight.requires_grad_(False), r"'0\.weight' has requires_grad=False now"),
        (True, lambda m: delattr(m[2], "bias"), r"no parameter '2\.bias' any more"),
        (False, grow, r"'2\.bias' has shape"),
    ],
)
def test_other_parameters_now(tied: bool, change: Callable[[Any], Any], message: str) -> None:
    model = pair(tied)
    program = compiled(model)
    change(model)
    with pytest.raises(InputError, match=f"(?s){message}.*[Cc]ompile again"):
        program(*batch())


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_may_be_replaced_by_others_like_them(tied: bool) -> None:
    """A program is of the parameters' names, not of the tensors."""
    model = pair(tied)
    program = compiled(model)
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())
    if tied:
        model[2].weight = model[0].weight
    x, y = batch()
    want = torch.autograd.grad(LOSS(model(x), y), model[0].weight)[0]
    torch.testing.assert_close(program(x, y)["grad"]["0.weight"], want)


def cached(m: Any, x: Tensor) -> Tensor:
    """As vision transformers keep their position biases in evaluation mode."""
    if "cpu" not in m.kept:
        m.kept["cpu"] = m.a.weight.tanh()
    return m.b(x @ m.kept["cpu"].T)


def listed(m: Any, x: Tensor) -> Tensor:
    m.seen.append(m.a(x))
    m.nested["all"].append(len(m.seen))
    return m.b(m.seen[-1]) * len(m.seen)


def queued(m: Any, x: Tensor) -> Tensor:
    m.queue.append(m.a(x))
    return m.b(m.queue[-1]) * len(m.queue)


def in_a_tuple(m: Any, x: Tensor) -> Tensor:
    m.pair[1].append(m.a(x))
    return m.b(m.pair[1][-1]) * len(m.pair[1])


def of_an_object(m: Any, x: Tensor) -> Tensor:
    if m.state.weight is None:
        m.state.weight = m.a.weight.tanh()
    m.state.calls.append(x)
    return m.b(x @ m.state.weight.T) * len(m.state.calls)


def of_an_object_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.states[0].calls += 1
    m.states[0].last = m.a(x)
    return m.b(m.states[0].last) * m.states[0].calls


@pytest.mark.parametrize("forward", [cached, listed, queued, in_a_tuple, of_an_object, of_an_object_in_a_list])
def test_what_a_forward_keeps_in_containers(forward: Callable[[Any, Tensor], Tensor]) -> None:
    """Each run finds them as they were, so a program computes what is kept; afterwards they are as they were."""
    model = Function(forward, **layers()).double()
    model.kept, model.seen, model.nested = dict[str, Tensor](), list[Tensor](), {"all": list[int]()}
    model.queue, model.pair = deque[Tensor](maxlen=3), (0, list[Tensor]())
    model.state, model.states = SimpleNamespace(weight=None, calls=[]), [SimpleNamespace(calls=0)]
    held = (model.kept, model.seen, model.nested, model.queue, model.pair, model.state, model.states)
    before = repr(held)
    program, (x, y) = compiled(model), batch()
    assert repr(held) == before
    parameters = list(model.parameters())
    want = torch.autograd.grad(LOSS(model(x), y), parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)


def test_what_a_forward_kept_before() -> None:
    """A weight that a call before has read is a constant for torch.export, and none for autograd."""
    model = Function(cached, **layers()).double()
    model.kept = {}
    model(batch()[0])
    with pytest.raises(UnsupportedError, match=r"'a.weight' has a gradient, but not .* \(a cache\)"):
        compiled(model)


class Frozen(dict[str, int]):
    """As libraries keep configurations."""

    def clear(self) -> None:
        raise TypeError("frozen")

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("frozen")


def test_a_mapping_that_may_not_be_written_to_is_left_alone() -> None:
    model = Function(lambda m, x: m.b(m.a(x)) * m.config["scale"], **layers()).double()
    config = model.config = Frozen(scale=2)
    program, (x, y) = compiled(model), batch()
    assert model.config is config and config == {"scale": 2}
    want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)
