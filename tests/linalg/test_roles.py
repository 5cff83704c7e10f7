"""What the factors of a program stand for, and a weight and its bias as one vector and apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.linalg import Role

from ..cases import seq
from ..kronecker import close, identity
from ..models import Apply

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.arange(10).reshape(5, 2) % 6


class Table(nn.Module):
    """Positions that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x.unsqueeze(2) + self.table).flatten(1))


class Turned(nn.Module):
    """A weight [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


TURNED = "output[n, o] = weight[i, o] * x[n, i] + bias[o]"


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x[:, :2], x[:, 2:])


IMAGE = Apply(lambda x: x.reshape(-1, 1, 2, 2))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str], set[str]]] = {
    "linear": (lambda: seq(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), X,
               {"0.weight": "B A", "0.bias": "B"}, {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "convolution": (lambda: seq(IMAGE, nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)), X,
                    {"1.weight": "B A"}, {"1.weight", "1.bias", "4.weight", "4.bias"}),
    "transposed": (lambda: seq(IMAGE, nn.ConvTranspose2d(1, 3, 2, stride=2), nn.Tanh(), nn.Flatten(),
                               nn.Linear(48, 2)), X, {"1.bias": "B"}, {"1.bias", "4.weight", "4.bias"}),
    "embedding": (lambda: seq(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 2)), TOKENS,
                  {"0.weight": "A B"}, {"2.weight", "2.bias"}),
    "norm": (lambda: seq(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), X, {}, {"0.weight", "0.bias", "1.bias",
                                                                                 "2.weight", "2.bias"}),
    "two inputs": (TwoInputs, X, {"form.weight": "B A1 A2", "form.bias": "B"}, {"form.bias"}),
    "turned": (Turned, X, {"weight": "A B", "bias": "B"}, {"bias"}),
    "table": (Table, X, {"table": "B C"}, {"head.weight", "head.bias"}),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", MODELS)
def test_roles(name: str) -> None:
    """Three times the loss is three times what has its scale, B, and leaves A and C as they are."""
    make, x, names, matrices = MODELS[name]
    torch.manual_seed(1)
    model = make().double()
    with tn.registered({Turned: TURNED}):
        output = model(x)
        y = torch.randn_like(output)
        once, thrice = (
            tn.compute(model, lambda f, y, c=c: c * nn.functional.mse_loss(f, y), (x, y), [tn.KFLR(largest=64)])["kflr"]
            for c in (1.0, 3.0)
        )
    for key, K in once.items():
        assert " ".join(K.names) == names.get(key, " ".join(K.names)), key
        assert K.roles.count(Role.LOSS) == 1 and Role.UNKNOWN not in K.roles
        for role, factor, scaled in zip(K.roles, K.factors, thrice[key].factors, strict=True):
            close(scaled, 3 * factor if role is Role.LOSS else factor)
    assert {key for key, K in once.items() if K.as_matrix_factors() is not None} == matrices
    for key in matrices:
        B, A = once[key].as_matrix_factors()
        close(torch.kron(B, A), once[key].to_dense())


def test_roles_that_are_not_said() -> None:
    """A quantity of one's own may leave it open; there are names all the same."""
    K = tn.KroneckerFactors((torch.eye(2), torch.eye(3)), (2, 3))
    assert K.names == ("F1", "F2") and K.as_matrix_factors() is None


Y = torch.tensor([0, 1, 1, 0, 1])


def joined(model: nn.Module, *quantities: tn.Quantity) -> tn.Result:

    with tn.registered({Turned: TURNED}):
        return tn.compute(model, nn.CrossEntropyLoss(), (X, Y), [tn.Grad(), tn.KFLR(bias=tn.Bias.JOINED), *quantities])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["linear", "convolution", "turned"])
def test_join_and_split(kind: str) -> None:
    """A step through [weight, bias] as a matrix, and the values back where they were."""
    torch.manual_seed(2)
    model = MODELS[kind][0]().double()
    result = joined(model, tn.BatchGrad())
    (weight, K), *_ = result["kflr"].items()
    bias = weight.replace("weight", "bias")
    assert K.parameters == (weight, bias) and K.joined is not None
    B, A = K.as_matrix_factors()
    gradient = result["grad"]
    W = gradient[weight].mT if kind == "turned" else gradient[weight].flatten(1)
    matrix = torch.cat([W, gradient[bias].unsqueeze(1)], 1)
    assert torch.equal(K.join(gradient), matrix)
    dense = torch.kron(B, A) + 0.1 * identity(K.space.size)
    want = torch.linalg.solve(dense, matrix.flatten()).reshape(matrix.shape)
    inverse = K.inverse(0.1, tn.Damping.EXACT)
    step = inverse.split(inverse @ inverse.join(gradient))
    assert {name: value.shape for name, value in step.items()} == {n: gradient[n].shape for n in (weight, bias)}
    close(step[bias], want[:, -1])
    close(step[weight], want[:, :-1].mT if kind == "turned" else want[:, :-1].reshape(gradient[weight].shape))
    each = K.join(result["batch_grad"])
    close(each.sum(0), matrix)
    assert all(torch.equal(v, result["batch_grad"][n]) for n, v in K.split(each).items())
    alone = {name: M for name, M in result["kflr"].items() if M.joined is None}
    assert all(M.join(gradient) is gradient[n] and M.split(gradient[n]) == {n: gradient[n]} for n, M in alone.items())
    with pytest.raises(tn.InputError, match=rf"'{weight}' \[7\] and '{bias}' .* do not join; give "):
        K.join(gradient | {weight: torch.ones(7)})


class Tied(nn.Module):
    """One weight in two layers, with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def test_a_tied_weight_joins_no_bias_and_says_so() -> None:
    """Which of them would it be: each has the factor B of its own layer."""
    result = joined(Tied().double(), tn.KFLR("own"))
    assert set(result["kflr"]) == set(result["own"])
    for name, K in result["kflr"].items():
        close(K.to_dense(), result["own"][name].to_dense())
        why = f"no {'weight' if 'bias' in name else 'bias'} has its factor B"
        assert K.assumption == f"{result['own'][name].assumption}; a block of its own: {why}", name


def test_explain_says_what_is_joined() -> None:
    quantities = [tn.KFLR(bias=tn.Bias.JOINED), tn.KFLR("own")]
    text = {
        kind: tn.compile(model.double(), nn.CrossEntropyLoss(), (X, Y), quantities, check=False).explain("derive")
        for kind, model in (("linear", MODELS["linear"][0]()), ("tied", Tied()))
    }
    assert "  joined: 0.weight with 0.bias, 2.weight with 2.bias\n" in text["linear"]
    assert "not joined" not in text["linear"] and text["tied"].count("joined") == 4
    for name in ("one.bias", "two.bias"):
        assert f"  not joined: {name}, no weight has its factor B\n" in text["tied"]
    for name in ("one.weight", "head.weight"):
        assert f"  not joined: {name}, no bias has its factor B\n" in text["tied"]


def test_other_reasons_not_to_join() -> None:
    """Groups, and an input factor that is cut into its axes."""
    image = Apply(lambda x: x.reshape(-1, 2, 2, 2))
    model = seq(image, nn.Conv2d(2, 4, 1, groups=2), nn.Flatten(), nn.Linear(16, 2)).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    found = tn.compute(model, nn.CrossEntropyLoss(), (x, Y), [tn.KFLR(bias=tn.Bias.JOINED, largest=8)])["kflr"]
    assert found["1.weight"].assumption.endswith("; a block of its own: it has a block for each group")
    assert found["3.weight"].kinds[1] is tn.Kind.DIAGONAL
    assert found["3.weight"].assumption.endswith("; a block of its own: its factors are not B and A, both whole")


def test_factors_of_float32_in_float64() -> None:
    """What was rounding in the one is no fault in the other."""
    torch.manual_seed(0)
    model = seq(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 8)).float()
    x, y = torch.randn(32, 40), torch.randint(8, (32,))
    found = tn.compute(model, nn.CrossEntropyLoss(), (x, y), [tn.KFAC(fisher=tn.Fisher.EMPIRICAL), tn.KFLR()])
    for factors in (*found["kfac"].values(), *found["kflr"].values()):
        exact = factors.to(torch.float64)
        vector = torch.randn(exact.space.shape).double()
        got = exact.inverse(1e-2, tn.Damping.EXACT) @ vector
        dense = exact.to_dense()
        want = torch.linalg.solve(dense + 1e-2 * torch.eye(len(dense)).double(), vector.flatten())
        torch.testing.assert_close(got.flatten(), want, rtol=1e-4, atol=1e-4)
        assert exact.sqrt() is not None and torch.isfinite(exact.logdet(1e-3))


@pytest.mark.parametrize("one,other", [(1e-25, 1e-25), (1e25, 1e25), (1e30, 1e-30)])
def test_products_of_eigenvalues_outside_of_float32(one: float, other: float) -> None:
    """Roots, draws, log-determinants and traces that are in its range."""
    factors = tn.KroneckerFactors((one * torch.eye(2), other * torch.eye(3)), (2, 3))
    root = (one * other) ** 0.5
    torch.testing.assert_close(factors.sqrt() @ torch.ones(2, 3), torch.full((2, 3), root), rtol=1e-5, atol=0)
    assert 0 < factors.sample(torch.Generator().manual_seed(0)).abs().max() < 5 * root
    assert float(factors.logdet(1e-3)) == pytest.approx(6 * math.log(one * other + 1e-3), rel=1e-5, abs=1e-5)
    three = tn.KroneckerFactors((one * torch.eye(2), one * torch.eye(2), torch.eye(1) / one), (2, 2, 1))
    torch.testing.assert_close(three.trace(), torch.tensor(4 * one), rtol=1e-5, atol=0)


def test_small_dampings() -> None:
    singular = tn.KroneckerFactors((torch.diag(torch.tensor([1.0, 0.0])), torch.eye(3)), (2, 3))
    for found in (singular.logdet(1e-46), singular.power(1).logdet(1e-46)):
        assert float(found) == pytest.approx(3 * math.log(1e-46), rel=1e-5)
    with pytest.raises(tn.InputError, match=r"overflows torch\.float32"):
        singular.power(-1, 1e-46)


def test_numbers_of_numpy_scale_and_arrays_of_them_do_not() -> None:
    factors = tn.KroneckerFactors((torch.eye(2), torch.eye(3)), (2, 3))
    assert (np.float64(2) * factors).trace() == (factors * np.float32(2)).trace() == 12
    with pytest.raises(TypeError, match="KroneckerFactors"):
        np.ones(3) * factors
