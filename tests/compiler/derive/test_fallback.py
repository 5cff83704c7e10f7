"""Ops without a rule: VJPs by torch.func, right, and named in the report; an op that mixes samples is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import tnbackprop as tn

from ... import oracle
from ...models import Apply
from ...quantities.test_first_order import QUANTITIES, assert_equal


class Unknown(nn.Module):
    """i0 of a value, hypot of a value and a parameter, the inverse of a parameter: none has a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.matrix, self.leg = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.special.i0(self.first(x))
        return self.last(torch.hypot(hidden, self.leg) @ torch.linalg.inv(self.matrix))


def test_values_and_report() -> None:
    torch.manual_seed(0)
    model, loss = Unknown().double(), nn.MSELoss()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    program = tn.compile(model, loss, (x, y), QUANTITIES)
    for batch in (5, 1):
        result = program(x[:batch], y[:batch])
        for quantity in QUANTITIES:
            want = getattr(oracle, quantity.name)(model, loss, x[:batch], y[:batch])
            assert_equal(result[quantity.name], want, quantity.name)
    report = program.explain()
    for op in ("aten.special_i0.default", "aten.hypot.default", "aten.linalg_inv.default"):
        assert op in report
    assert report.count("torch.func") >= 3


@torch.library.custom_op("tnbackprop_tests::halved", mutates_args=())
def halved(value: Tensor) -> Tensor:
    return value / 2


@halved.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return halved(self.first(x))


def test_an_op_without_a_derivative() -> None:
    """Told when it is compiled, not when it runs."""
    with pytest.raises(tn.UnsupportedError, match=r"(?s)halved.default in .* no derivative of it.*Declare one"):
        tn.compile(Halved(), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])


@torch.library.custom_op("tnbackprop_tests::centred", mutates_args=())
def centred(value: Tensor) -> Tensor:
    return value - value.mean(0)


@centred.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class Mixing(nn.Module):
    """Every sample sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return centred(self.first(x))


def test_an_op_that_mixes_samples() -> None:
    with pytest.raises(tn.UnsupportedError, match=r"centred.*mixes samples"):
        tn.compile(Mixing(), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])


def total(output: Tensor, y: Tensor) -> Tensor:
    return torch.nansum(output - y)


@pytest.mark.parametrize("loss", [torch.dist, total])
def test_a_reduction_over_samples_is_refused(loss: Callable[..., Tensor]) -> None:
    """One VJP per sample says nothing of a sum over them; left out, it would be a gradient of zero."""
    with pytest.raises(tn.UnsupportedError, match=r"reduces over the samples of .*\n.*Declare one"):
        tn.compile(nn.Linear(3, 2), loss, (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])


# torch's vmap over the derivative of these is wrong, or there is none: the program has a loop.


class Pairs(nn.Module):
    """Distances to points that are parameters, or between two values of one sample."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.first, self.points = nn.Linear(2, 2), None if own else nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cdist(h, h.tanh() + 1 if self.points is None else self.points).flatten(1)


class Single(nn.Module):
    """A distance matrix of parameters alone, read by every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.more = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cdist(self.points, self.more)


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """[N, F, *p] by one call of autograd for each sample and output: `torch.func.jacrev` is wrong here, too."""
    parameters = dict(model.named_parameters())
    outputs = [model(sample.unsqueeze(0)).flatten() for sample in x]
    rows = [[torch.autograd.grad(o, parameters.values(), retain_graph=True) for o in out] for out in outputs]
    found = {}
    for k, name in enumerate(parameters):
        found[name] = torch.stack([torch.stack([row[k] for row in each]) for each in rows])
    return found


LOOPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a value and parameters": (lambda: Pairs(own=False), (4, 2)),
    "two values": (lambda: Pairs(own=True), (4, 2)),
    "parameters alone": (Single, (3,)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LOOPED)
def test_a_loop_where_vmap_is_wrong(name: str) -> None:
    """One sample, and several; the gradient, columns of a root, and each output; the report says so."""
    torch.manual_seed(0)
    make, shape = LOOPED[name]
    model, loss = make().double(), nn.MSELoss()
    x = torch.randn(5, *shape).double()
    y = torch.randn_like(model(x).detach())
    program = tn.compile(model, loss, (x, y), [*QUANTITIES, tn.DiagGGN()])
    columns = tn.compile(model, None, (x, None), [tn.Jacobians()])
    for batch in (5, 1):
        result = program(x[:batch], y[:batch])
        for quantity in QUANTITIES:
            want = getattr(oracle, quantity.name)(model, loss, x[:batch], y[:batch])
            assert_equal(result[quantity.name], want, quantity.name)
        whole = jacobians(model, x[:batch])
        assert_equal(columns(x[:batch])["jacobians"], whole, "jacobians")
        diagonal = {name: 2 / y[:batch].numel() * J.square().sum((0, 1)) for name, J in whole.items()}
        assert_equal(result["diag_ggn"], diagonal, "diag_ggn")
    assert "in a loop for" in program.explain("bind")
    assert "one_by_one" in program.source


def test_no_loop_where_vmap_is_right() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    program = tn.compile(Unknown().double(), nn.MSELoss(), (x, y), [tn.DiagGGN()])
    assert "one_by_one" not in program.source and "in a loop" not in program.explain("bind")


class Filtered(nn.Module):
    """A filter in the space of frequencies: complex numbers on the way have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.filter = nn.Linear(3, 6), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(self.first(x)) * torch.view_as_complex(self.filter), n=6)


def test_the_batch_at_once() -> None:
    """No vmap where the VJP of the batch is that of each sample; one for both operands where only sums are asked."""
    torch.manual_seed(0)
    model, loss = Filtered().double(), nn.MSELoss()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 6).double()
    many = [*QUANTITIES, tn.DiagGGN()]
    for quantities, calls, mapped in (([tn.Grad()], 1, 0), ([tn.BatchGrad()], 2, 1), (many, 4, 4)):
        program = tn.compile(model, loss, (x, y), quantities)
        assert program.source.count("torch.func.vjp") == calls
        assert program.source.count("torch.func.vmap") == mapped  # the filter's own (1), columns (1), and both (2)
        for batch in (5, 1):
            result = program(x[:batch], y[:batch])
            for quantity in quantities[:6]:
                want = getattr(oracle, quantity.name)(model, loss, x[:batch], y[:batch])
                assert_equal(result[quantity.name], want, quantity.name)
            if "diag_ggn" in result:
                whole = jacobians(model, x[:batch])
                diagonal = {name: 2 / y[:batch].numel() * J.square().sum((0, 1)) for name, J in whole.items()}
                assert_equal(result["diag_ggn"], diagonal, "diag_ggn")
    assert "all samples at once" in tn.compile(model, loss, (x, y), [tn.Grad()]).explain("bind")


class FilteredTwice(Filtered):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.cos())


def test_a_parameter_that_two_such_ops_read() -> None:
    """What one of them sends is not the gradient."""
    torch.manual_seed(0)
    model, loss = FilteredTwice().double(), nn.MSELoss()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 6).double()
    found = tn.compute(model, loss, (x, y), [tn.Grad()])["grad"]
    assert_equal(found, oracle.grad(model, loss, x, y), "grad")


def test_the_same_op_twice() -> None:
    """Two calls that compute the same are one step; the second one's derivative finds it."""
    torch.manual_seed(0)
    twice = Apply(lambda t: t.tanh() * t.sin() + t.tanh().exp())
    model, loss = nn.Sequential(nn.Linear(3, 2), twice).double(), nn.MSELoss()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    found = tn.compute(model, loss, (x, y), [tn.BatchGrad()])["batch_grad"]
    assert_equal(found, oracle.batch_grad(model, loss, x, y), "batch_grad")


class CastTwice(nn.Module):
    """A product of values that are made of one parameter, of which one goes through another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        return x @ ((weight @ weight.T @ weight) * weight.cumsum(0).to(torch.float32).to(torch.float64))


def test_second_derivatives_through_a_cast_of_a_parameter() -> None:
    """What a product sends to a value made of parameters on its own has a name of its own."""
    torch.manual_seed(0)
    model, loss = CastTwice(), nn.MSELoss()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)

    def of(weight: Tensor) -> Tensor:
        return loss(functional_call(model, {"weight": weight}, (x,)), y)

    whole = torch.func.hessian(of)(model.weight.detach()).reshape(3, 3)
    found = tn.compile(model, loss, (x, y), [tn.HessianDiag()], check=False)(x, y)["hessian_diag"]["weight"]
    torch.testing.assert_close(found.flatten(), whole.diagonal(), rtol=1e-5, atol=1e-7)


OF_MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "det": torch.linalg.det,
    "slogdet": lambda A: torch.linalg.slogdet(A)[1],
    "largest singular value": lambda A: torch.linalg.norm(A, 2, dim=(1, 2)),
    "smallest singular value": lambda A: torch.linalg.matrix_norm(A, -2),
}


@pytest.mark.parametrize("function", OF_MATRICES.values(), ids=OF_MATRICES)
def test_samples_that_do_not_stand_next_to_each_other(function: Callable[[Tensor], Tensor]) -> None:
    """A part of each sample: torch's own derivative under vmap is another there, without grad mode."""
    torch.manual_seed(0)
    part = Apply(lambda h: function(h[:, :4].view(-1, 2, 2)) + h[:, 4:].sum(1))
    model, loss = nn.Sequential(nn.Linear(3, 6), part).double(), nn.MSELoss()
    x, y = torch.randn(4, 3).double(), torch.randn(4).double()
    program = tn.compile(model, loss, (x[:1], y[:1]), [tn.BatchGrad()])
    assert_equal(program(x, y)["batch_grad"], oracle.batch_grad(model, loss, x, y), "batch_grad")
