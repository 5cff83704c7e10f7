"""Results as a whole: one vector over all parameters, sums over them, other devices and dtypes, states."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

import tnbackprop as tn

from ..kronecker import close

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 1, 0, 1])
CE = nn.CrossEntropyLoss()


class Shapes(nn.Module):
    """Parameters of no axis, of one element, tied, frozen, and one whose size is that of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(1))
        self.one, self.two, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.again = self.two
        self.one.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x) * self.scale + self.shift)
        return self.head(self.again(torch.tanh(self.two(h))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Shapes().double()


@pytest.fixture(scope="module")
def result(model: nn.Module) -> tn.Result:
    unscaled = tn.Scale.UNSCALED
    quantities = [
        tn.Grad(), tn.BatchGrad(scale=unscaled), tn.SqrtGGN(), tn.DiagGGN(), tn.BatchL2(scale=unscaled),
        tn.BatchDot(scale=unscaled), tn.GGNTrace(), tn.GGNGram(), tn.KFLR(bias=tn.Bias.JOINED),
    ]  # fmt: skip
    return tn.compute(model, CE, (X, Y), quantities)


@pytest.fixture(scope="module")
def rows(model: nn.Module) -> Tensor:
    """Individual gradients [N, P] by torch.func, of a copy: functional_call changes a module that is there twice."""
    model = deepcopy(model)
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return CE(functional_call(model, theta, (x[None],)), y[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(theta, X, Y)
    return torch.cat([found[name].reshape(len(X), -1) for name in theta], 1)


def test_flat(result: tn.Result, rows: Tensor) -> None:
    close(result.flat("grad"), rows.mean(0))
    close(result.flat("batch_grad"), rows)
    V = result.flat("sqrt_ggn")
    assert V.shape == (1, *rows.shape)
    close(result.flat("diag_ggn"), V.square().sum((0, 1)))


def test_total(result: tn.Result, rows: Tensor) -> None:
    close(result.total("batch_l2"), rows.square().sum(1))
    close(result.total("batch_dot"), rows @ rows.mT)
    V = result.flat("sqrt_ggn")
    close(result.total("ggn_gram"), torch.einsum("vnp,wmp->vnwm", V, V))
    close(result.total("ggn_trace").sum(), result.flat("diag_ggn").sum())


def test_jacobians_and_kernels(model: nn.Module) -> None:
    found = tn.compute(model, None, (X, None), [tn.Jacobians(), tn.NTK()])
    J = found.flat("jacobians")
    close(found.total("ntk"), torch.einsum("ncp,mdp->ncmd", J, J))
    close(found.total("ntk"), tn.ntk(model, X))


def test_a_batch_as_large_as_a_parameter() -> None:
    """Numbers per sample are no parameter, though both have five entries."""
    model = nn.Linear(3, 5, bias=False).double()
    model.weight = nn.Parameter(torch.ones(5, 5, dtype=torch.float64))
    x = torch.randn(5, 5).double()
    found = tn.compute(model, nn.MSELoss(), (x, x), [tn.BatchDot(), tn.Grad()])
    close(found.total("batch_dot"), found["batch_dot"]["weight"])
    with pytest.raises(tn.InputError, match=r"'batch_dot' has no tensors with the parameters' own axes"):
        found.flat("batch_dot")
    with pytest.raises(tn.InputError, match=r"'grad' has no numbers that add up over parameters: .*flat\(quantity\)"):
        found.total("grad")


@pytest.mark.parametrize("method", ["flat", "total"])
def test_refused(result: tn.Result, method: str) -> None:
    with pytest.raises(tn.InputError, match=r"'kflr' has no .*: its value is KroneckerFactors.*result\[quantity\]"):
        getattr(result, method)("kflr")
    with pytest.raises(tn.InputError, match="no quantity 'variance' in this result; it has: grad"):
        getattr(result, method)("variance")


def test_flat_of_two_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).double())

    found = tn.compute(Mixed(), CE, (X.float(), Y), [tn.Grad(), tn.BatchL2()])
    with pytest.raises(tn.InputError, match=r"values in torch.float32 on cpu, torch.float64 on cpu: .*result\.to\("):
        found.flat("grad")
    assert found.to(dtype=torch.float64).flat("grad").dtype == torch.float64
    assert found.total("batch_l2").dtype == torch.float64


def leaves(result: tn.Result) -> list[Tensor]:
    values = [value for by in result.values() for value in by.values()]
    factors = [K.tensors() if isinstance(K, tn.KroneckerFactors) else (K,) for K in values]
    return [result.loss, *pytree.tree_leaves(result.output), *(t for each in factors for t in each)]


def test_to(result: tn.Result) -> None:
    moved = result.to("cpu", torch.float32)
    for before, after in zip(leaves(result), leaves(moved), strict=True):
        assert torch.equal(after, before.float()) and before.dtype == torch.float64
    assert moved["kflr"]["one.weight"].dtype == torch.float32
    close(moved.flat("grad"), result.flat("grad").float())
    assert result.to(torch.float32).loss.dtype == torch.float32
    kept = tn.Result(None, {"mask": Y > 0, "text": "a"}, {}).to(dtype=torch.float16).output
    assert kept["mask"].dtype == torch.bool and kept["text"] == "a"


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_states(result: tn.Result) -> None:
    """As it is, and as a dict that names nothing of this library."""
    state = saved(result.state_dict())
    kinds = {type(leaf) for leaf in pytree.tree_leaves(state)}
    assert kinds <= {Tensor, str, int, float, bool, type(None)}
    for again in (saved(result), tn.Result.from_state_dict(state)):
        assert [list(again[q]) for q in again] == [list(result[q]) for q in result]
        assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(result), strict=True))
        assert torch.equal(again.flat("sqrt_ggn"), result.flat("sqrt_ggn"))
        assert torch.equal(again.total("batch_dot"), result.total("batch_dot"))
        joined = again["kflr"]["head.weight"]
        assert joined.template == result["kflr"]["head.weight"].template and joined.joined is not None
    with pytest.raises(tn.InputError, match="the state of a result has no 'values': give what state_dict"):
        tn.Result.from_state_dict({"loss": None, "output": None})
