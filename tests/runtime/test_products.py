"""Products with the GGN, the Hessian and the Fisher, against dense matrices from the plain forward, and laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import tnbackprop as tn

from .. import oracle, oracle_second
from ..cases import CASES, RANDOM_CASES, Case, Problem, seq
from ..models import Apply, WithParameters, Written
from ..second_order import DIFFERENT, TOLERANCE, assert_equal, error

BY_NAME = {case.name: case for case in CASES}
MAKE: Mapping[str, Callable[..., tn.CurvatureProduct]] = {
    "ggn": tn.ggn_product,
    "hessian": tn.hessian_product,
    "empirical": lambda *args, **options: tn.fisher_product(*args, fisher=tn.Fisher.EMPIRICAL, **options),
    "mc": lambda *args, **options: tn.fisher_product(*args, mc_samples=2, seed=3, **options),
}
SAMPLE = (
    "linear", "mlp_sum", "cnn", "residual", "attention", "layer_norm", "tied_transposed", "tied_names",
    "position_table", "conv2d_groups", "cross_entropy_everything", "cross_entropy_positions", "frozen_weight",
    "unused_and_zero_gradient", "reused_convolution", "scalar_parameter", "bce_with_logits", "in_place",
)  # fmt: skip
"""Where the Fishers, which compile a small program, are compared too."""


def product(kind: str, problem: Problem, **options: Any) -> tn.CurvatureProduct:
    return MAKE[kind](problem.model, problem.loss, (problem.x, problem.y), **options)


def draw(problem: Problem, *lead: int, seed: int = 1) -> dict[str, Tensor]:
    """A vector for every trainable parameter, or several along leading axes."""
    generator = torch.Generator().manual_seed(seed)
    theta = oracle.parameters(problem.model)
    return {name: torch.randn(*lead, *p.shape, dtype=p.dtype, generator=generator) for name, p in theta.items()}


def dot(u: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(u[name] * v[name]).sum() for name in u]).sum()


# Dense matrices [P, P] on all parameters.


def dense_ggn(problem: Problem) -> Tensor:
    """sum_n J_nᵀ H_n J_n."""
    J = jacobian(problem)
    H = oracle_second.loss_hessians(problem.loss, outputs(problem), problem.y, len(problem.x))
    return (J.mT @ H @ J).sum(0)


def dense_empirical(problem: Problem) -> Tensor:
    """c sum_n grad l_n grad l_nᵀ."""
    g = oracle_second.loss_gradients(problem.loss, outputs(problem), problem.y, len(problem.x))
    G = torch.einsum("nfp,nf->np", jacobian(problem), g)
    return G.mT @ G


def dense_hessian(problem: Problem) -> Tensor:
    def value(theta: dict[str, Tensor]) -> Tensor:
        return problem.loss(functional_call(problem.model, theta, (problem.x,)), problem.y)

    theta = oracle.parameters(problem.model)
    blocks = jacrev(grad(value))(theta)
    rows = [[blocks[a][b].reshape(theta[a].numel(), theta[b].numel()) for b in theta] for a in theta]
    return torch.cat([torch.cat(row, 1) for row in rows])


DENSE = {"ggn": dense_ggn, "hessian": dense_hessian, "empirical": dense_empirical}


def outputs(problem: Problem) -> Tensor:
    return oracle_second.outputs(problem.model, problem.x)


def jacobian(problem: Problem) -> Tensor:
    """J_n by all parameters, [N, F, P]."""
    return torch.cat(list(oracle_second.jacobians(problem.model, problem.x).values()), dim=-1)


def block_diagonal(problem: Problem, dense: Tensor) -> Tensor:
    """The blocks of the single parameters, and zeros."""
    mask = [torch.ones(p.numel(), p.numel()) for p in oracle.parameters(problem.model).values()]
    return dense * torch.block_diag(*mask)


# Against the dense matrices.


NOT_TWICE = "hardsigmoid"
"""torch has no derivative of its derivative."""


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name != NOT_TWICE], ids=str)
def test_against_the_dense_matrix(case: Case, kind: str) -> None:
    problem = case.build()
    assert error(product(kind, problem).to_dense(), DENSE[kind](problem)) <= TOLERANCE


@pytest.mark.parametrize("name", SAMPLE)
def test_empirical_fisher(name: str) -> None:
    problem = BY_NAME[name].build()
    assert error(product("empirical", problem).to_dense(), dense_empirical(problem)) <= TOLERANCE


def test_empirical_fisher_of_a_scaled_loss() -> None:
    """F of 2.5 L is the one of the samples' losses 2.5 l_n."""
    problem = BY_NAME["loss_scaled"].build()
    plain = replace(problem, loss=nn.MSELoss())
    assert error(product("empirical", problem).to_dense(), 2.5**2 * dense_empirical(plain)) <= TOLERANCE


@pytest.mark.parametrize("name", SAMPLE)
def test_mc_fisher_has_the_drawn_columns(name: str) -> None:
    """One draw: the same seed gives a program the same columns V, and F = sum V Vᵀ."""
    problem = BY_NAME[name].build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.SqrtGGNMC(mc_samples=2)])
    V = program(problem.x, problem.y, seed=3)["sqrt_ggn_mc"]
    rows = torch.cat([v.reshape(2 * len(problem.x), -1) for v in V.values()], dim=-1)
    assert error(product("mc", problem).to_dense(), rows.mT @ rows) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("cnn", marks=pytest.mark.slow), "bce_with_logits", "mlp_sum"])
def test_mc_fisher_tends_to_the_ggn(name: str) -> None:
    """Its error halves with four times the samples."""
    problem = BY_NAME[name].build()
    want = dense_ggn(problem)
    errors = []
    for samples in (64, 1024):
        options = {"fisher": tn.Fisher.MC, "mc_samples": samples}
        batch = (problem.x, problem.y)
        drawn = [tn.fisher_product(problem.model, problem.loss, batch, seed=s, **options) for s in range(6)]
        errors.append(float(torch.stack([(d.to_dense() - want).norm() for d in drawn]).mean()))
    assert 2.7 < errors[0] / errors[1] < 5.9, errors


# Laws.


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["cnn", "attention", "tied_names", "frozen_weight"])
def test_laws(name: str, kind: str) -> None:
    """Symmetric, linear; not negative but for the Hessian."""
    problem = BY_NAME[name].build()
    found = product(kind, problem)
    u, v = draw(problem), draw(problem, seed=2)
    torch.testing.assert_close(dot(u, found(v)), dot(v, found(u)), rtol=TOLERANCE, atol=TOLERANCE)
    mixed = found({n: 2 * u[n] - 3 * v[n] for n in u})
    assert_equal(mixed, {n: 2 * found(u)[n] - 3 * found(v)[n] for n in u}, "a sum")
    assert kind == "hessian" or dot(u, found(u)) > -TOLERANCE


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["cnn", "attention", "tied_names", "frozen_weight"])
def test_blocks(name: str, kind: str) -> None:
    """One block per parameter: the diagonal blocks of the whole, and nothing else."""
    problem = BY_NAME[name].build()
    whole = product(kind, problem).to_dense()
    blocks = product(kind, problem, blocks=tn.Blocks.PARAMETER).to_dense()
    assert error(blocks, block_diagonal(problem, whole)) <= TOLERANCE
    assert error(blocks, whole) > DIFFERENT


@pytest.mark.thinned(4)
@pytest.mark.parametrize("blocks", tn.Blocks)
@pytest.mark.parametrize("kind", MAKE)
def test_several_vectors(kind: str, blocks: tn.Blocks) -> None:
    """Leading axes, columns and single vectors are the same numbers."""
    problem = BY_NAME["residual"].build()
    found = product(kind, problem, blocks=blocks)
    many = draw(problem, 2, 3)
    several = found(many)
    for i in range(2):
        for j in range(3):
            single = found({name: v[i, j] for name, v in many.items()})
            assert_equal({name: v[i, j] for name, v in several.items()}, single, f"vector {i}, {j}")
    columns = torch.cat([v.flatten(0, 1).flatten(1).T for v in many.values()])
    want = torch.cat([v.flatten(0, 1).flatten(1).T for v in several.values()])
    assert error(found(columns), want) <= TOLERANCE
    assert error(found @ columns[:, 0], want[:, 0]) <= TOLERANCE


def test_the_order_of_names_does_not_matter() -> None:
    """The result has the model's; a result of a program is a vector too."""
    problem = BY_NAME["residual"].build()
    found = product("ggn", problem)
    gradient = tn.compute(problem.model, problem.loss, (problem.x, problem.y), [tn.Grad()])["grad"]
    assert_equal(found(dict(reversed(gradient.items()))), found(gradient), "reversed")
    assert tuple(found(gradient)) == found.names == tuple(oracle.parameters(problem.model))


def test_what_it_shows() -> None:
    found = product("mc", BY_NAME["linear"].build(), blocks=tn.Blocks.PARAMETER)
    assert found.shape == (8, 8)
    assert found.names == ("weight", "bias")
    assert repr(found) == "CurvatureProduct(MC Fisher: [8, 8], one block per parameter, 2 parameters)"


# The model and its modes.


def at_once(problem: Problem) -> Tensor:
    """The GGN from the batch as one sample: for models that mix samples."""

    def output(theta: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
        return functional_call(problem.model, theta | buffers, (problem.x,))

    theta = oracle.parameters(problem.model)
    torch.manual_seed(5)
    f = output(theta)
    torch.manual_seed(5)
    blocks = jacrev(output)(theta)
    J = torch.cat([blocks[name].reshape(f.numel(), -1) for name in theta], dim=1)
    H = jacrev(grad(lambda f: problem.loss(f, problem.y)))(f).reshape(f.numel(), f.numel())
    return J.mT @ H @ J


BATCH_NORM = Case("batch_norm", lambda: seq(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), batch=5, train=True)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", [*RANDOM_CASES, BATCH_NORM], ids=str)
def test_train_mode(case: Case) -> None:
    """As the model is: masks are drawn once, for Jv and Jᵀu alike; statistics are the batch's."""
    problem = case.build()
    want = at_once(problem)
    torch.manual_seed(5)
    found = product("ggn", problem)
    assert error(found.to_dense(), want) <= TOLERANCE
    assert error(torch.stack([found(e) for e in torch.eye(found.shape[0]).double()]), want) <= TOLERANCE


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", MAKE)
def test_the_model_is_left_alone(kind: str) -> None:
    """Nothing changes on the model, and its later changes do not reach the product."""
    problem = BATCH_NORM.build()
    before = {name: t.clone() for name, t in problem.model.state_dict().items()}
    found = product(kind, problem)
    v = draw(problem)
    first = found(v)
    assert all(torch.equal(t, before[name]) for name, t in problem.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in problem.model.parameters())
    assert problem.model.training
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(1.0)
    assert_equal(found(v), first, "later", 0.0)
    assert error(product(kind, problem)(v)["0.weight"], first["0.weight"]) > DIFFERENT


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("train", [False, True])
def test_attention_of_torch(kind: str, train: bool) -> None:
    """Its fast kernels have no second derivatives."""
    layer = lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, activation="gelu", batch_first=True)  # noqa: E731
    problem = Case("transformer", layer, (3, 4), batch=2, train=train).build()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = DENSE[kind](problem)
    with torch.no_grad():
        assert error(product(kind, problem).to_dense(), want) <= TOLERANCE


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_weight_norm(kind: str) -> None:
    """The second derivative of torch's fused kernel is wrong: its Hessian is not even symmetric."""
    torch.manual_seed(0)
    model = weight_norm(nn.Linear(3, 2)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    found = MAKE[kind](model, nn.MSELoss(), (x, y)).to_dense()
    assert error(found, found.T) <= TOLERANCE
    diagonal = {"ggn": tn.DiagGGN("d"), "hessian": tn.HessianDiag("d")}[kind]
    want = tn.compute(model, nn.MSELoss(), (x, y), [diagonal])["d"]
    flat = torch.cat([want[name].flatten() for name, _ in model.named_parameters()])
    assert error(found.diagonal(), flat) <= TOLERANCE
    step = 1e-5
    for name, p in model.named_parameters():  # and both are what differences of gradients say
        if kind == "hessian":
            for k in range(p.numel()):
                slopes = []
                for sign in (1, -1):
                    with torch.no_grad():
                        p.view(-1)[k] += sign * step
                    (slope,) = torch.autograd.grad(F.mse_loss(model(x), y), p)
                    slopes.append(slope.flatten()[k])
                    with torch.no_grad():
                        p.view(-1)[k] -= sign * step
                assert abs((slopes[0] - slopes[1]) / (2 * step) - want[name].flatten()[k]) <= 1e-8


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"product": self.left(a) * self.right(b)}


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_trees(kind: str) -> None:
    """Inputs by position and by name, and an output by key."""
    model, y = TwoInputs().double(), torch.randn(5, 2, dtype=torch.float64)
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    loss = lambda f, y: F.mse_loss(f["product"], y)  # noqa: E731
    joined = Apply(lambda x: model(x[:, :3], x[:, 3:])["product"])
    joined.add_module("model", model)
    want = DENSE[kind](Problem(joined, nn.MSELoss(), torch.cat([a, b], 1), y))
    for x in ((a, b), {"a": a, "b": b}):
        assert error(MAKE[kind](model, loss, (x, y)).to_dense(), want) <= TOLERANCE
    with pytest.raises(tn.UnsupportedError, match=r"one output tensor with the 5 samples on axis 0.* gives dict"):
        tn.fisher_product(model, loss, ((a, b), y))


def test_parameters_of_two_dtypes() -> None:
    """By name; flat there is no dtype."""
    model = seq(nn.Linear(3, 2), Apply(lambda t: t.double()), nn.Linear(2, 2).double())
    found = tn.ggn_product(model, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2).double()))
    result = found({name: torch.ones_like(p) for name, p in model.named_parameters()})
    assert [value.dtype for value in result.values()] == [torch.float32] * 2 + [torch.float64] * 2
    with pytest.raises(tn.InputError, match="differ in dtype or device: give the vector by name"):
        found(torch.ones(12))


def test_a_loss_with_parameters() -> None:
    """They are constants; no graph hangs on the result."""
    problem = BY_NAME["linear"].build()
    weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    weighted = product("ggn", replace(problem, loss=Written(lambda f, y: weight * F.mse_loss(f, y))))
    v = draw(problem)
    assert not any(value.requires_grad for value in weighted(v).values())
    assert_equal(weighted(v), {name: 2 * value for name, value in product("ggn", problem)(v).items()}, "weighted")


def test_the_result_is_the_callers() -> None:
    """Every element of it can be written, and the product and the vector stay."""
    # The derivative of a sum is one number, expanded.
    problem = Case("sum", lambda: WithParameters(lambda x, a: x + a.sum(), (4,))).build()
    for kind in MAKE:
        found, v = product(kind, problem), draw(problem)
        first, again = found(v), found(v)
        for value in first.values():
            value.add_(torch.rand_like(value))
        assert_equal(v, draw(problem), "the vector", 0.0)
        assert_equal(found(v), again, "again", 0.0)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("make", [tn.ggn_product, tn.hessian_product, tn.fisher_product])
def test_no_vectors(make: Any) -> None:
    model, x, y = nn.Linear(5, 3), torch.randn(6, 5), torch.arange(6) % 3
    product = make(model, nn.CrossEntropyLoss(), (x, y))
    assert (product @ torch.empty(18, 0)).shape == (18, 0)
    empty = {name: torch.empty(2, 0, *p.shape) for name, p in model.named_parameters()}
    assert {name: v.shape for name, v in product(empty).items()} == {name: v.shape for name, v in empty.items()}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", MAKE)
def test_a_product_is_of_the_batch_that_it_was_made_with(kind: str) -> None:
    """Also once the next batch is read into the same memory."""
    problem = BY_NAME["mlp_sum"].build()
    m, vector = product(kind, problem), draw(problem)
    before = {name: value.clone() for name, value in (m @ vector).items()}
    problem.x.mul_(2).add_(1)
    for name, value in (m @ vector).items():
        assert torch.equal(value, before[name])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", MAKE)
def test_blocks_of_a_norm(kind: str) -> None:
    """Several vectors at once, where torch writes what is batched into what is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    options = (model, nn.MSELoss(), batch)
    whole, blocks = (MAKE[kind](*options, blocks=each).to_dense() for each in (tn.Blocks.FULL, tn.Blocks.PARAMETER))
    want, start = torch.zeros_like(whole), 0
    for parameter in model.parameters():
        own = slice(start, start := start + parameter.numel())
        want[own, own] = whole[own, own]
    torch.testing.assert_close(blocks, want)
