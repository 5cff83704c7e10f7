"""Kronecker factors: against factors written out for linear and convolution layers, and where they are exact.

Each exact case has a neighbour where it must not hold: a test that a wrong factor passes says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..models import Apply, Written
from ..second_order import DIFFERENT, TOLERANCE, dense, error, make, run

BY_NAME = {case.name: case for case in CASES}
Make = Callable[[], nn.Module]


def classifier(name: str, model: Make, x: tuple[int, ...] = (3,), batch: int = 3, outputs: int = 3) -> Case:
    return Case(name, model, x, classes(outputs), nn.CrossEntropyLoss, batch)


def regression(name: str, model: Make, x: tuple[int, ...] = (3,), batch: int = 5) -> Case:
    return Case(name, model, x, normal, nn.MSELoss, batch)


def average(*axes: int) -> nn.Module:
    return Apply(lambda t: t.mean(axes))


def mlp() -> nn.Module:
    return seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def tokens() -> nn.Module:
    """Two layers on every position, then an average."""
    return seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), average(1))


# The definition, with both sharings and all three roots that are not random.

WRITTEN = (
    (classifier("mlp", mlp), "0"),
    (classifier("mlp", mlp), "2"),
    (replace(classifier("sum", mlp), loss=lambda: nn.CrossEntropyLoss(reduction="sum")), "0"),
    (regression("mse", mlp), "0"),
    (classifier("tokens", tokens, (4, 3)), "0"),
    (classifier("tokens", tokens, (4, 3)), "2"),
    (regression("two_position_axes", lambda: seq(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), (2, 4, 3)), "0"),
    (BY_NAME["cnn"], "0"),
    (BY_NAME["cnn"], "3"),
    (BY_NAME["cnn"], "6"),
    *((BY_NAME[f"conv2d{kind}"], "0") for kind in (
        "", "_stride_padding", "_dilation", "_downsample", "_1x1_stride", "_groups", "_depthwise",
        "_depthwise_multiplier",
    )),
    (regression("conv1d", lambda: seq(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), average(2)), (2, 7)), "0"),
    (regression("conv1d_dilated", lambda: seq(nn.Conv1d(4, 4, 2, groups=2, dilation=2), nn.Tanh()), (4, 6)), "0"),
    (regression("conv3d", lambda: seq(nn.Conv3d(2, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), nn.Tanh(),
                                      average(2)), (2, 2, 3, 4)), "0"),
    # An axis of one element is an axis: what the factors are does not depend on a size.
    (regression("one_input", lambda: seq(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), (1,)), "0"),
    (regression("one_output", lambda: seq(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), (1,)), "2"),
    (regression("one_of_each", lambda: seq(nn.Linear(1, 1), nn.Tanh()), (4, 1)), "0"),
    (regression("one_output_at_positions", lambda: seq(nn.Linear(3, 1), nn.Tanh()), (4, 3)), "0"),
    (regression("one_channel_out", lambda: seq(nn.Conv2d(2, 1, 3), nn.Tanh()), (2, 5, 5)), "0"),
    (regression("one_channel_in", lambda: seq(nn.Conv2d(1, 2, 1), nn.Tanh()), (1, 3, 3)), "0"),
)  # fmt: skip
KINDS = {"kflr": ("KFLR", {}), "empirical": ("KFAC", {"fisher": "EMPIRICAL"})}
SHARING = ("EXPAND", "REDUCE")


@pytest.mark.thinned(8)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case, layer", WRITTEN, ids=lambda value: str(value))
def test_definition(case: Case, layer: str, kind: str, sharing: str) -> None:
    """All loss scale is in B, none in A; `factors` follow the parameter's axes."""
    problem = case.build()
    name, options = KINDS[kind]
    got = run(problem, name, sharing=sharing, **options)
    shape = {"reduce": sharing == "REDUCE", "empirical": kind == "empirical"}
    arguments = (problem.model, layer, problem.loss, problem.x, problem.y)
    want = oracle_second.kronecker(*arguments, **shape)
    weight = got[f"{layer}.weight"]
    assert error(weight.to_dense(), want.to_dense()) <= TOLERANCE
    if want.A.ndim == 2:
        B, A = weight.factors
        assert error(B, want.B) <= TOLERANCE and error(A, want.A) <= TOLERANCE
    assert error(got[f"{layer}.bias"].to_dense(), oracle_second.bias_block(*arguments, **shape)) <= TOLERANCE


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", ["cnn", "conv2d_groups"])
def test_sampled_input_factor(name: str, sharing: str) -> None:
    """KFAC has KFLR's A to the last digit, and another B with each seed."""
    problem = BY_NAME[name].build()
    quantities = [make("KFLR", sharing=sharing), make("KFAC", sharing=sharing)]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    first, second = (program(problem.x, problem.y, seed=seed) for seed in (0, 1))
    exact, sampled, other = first["kflr"]["0.weight"], first["kfac"]["0.weight"], second["kfac"]["0.weight"]
    sizes = [tuple(factor.shape) for factor in exact.factors]
    assert [tuple(factor.shape) for factor in sampled.factors] == sizes
    assert error(sampled.factors[-1], exact.factors[-1]) <= TOLERANCE
    assert error(sampled.to_dense(), other.to_dense()) > DIFFERENT


# Where the approximation is none.


@dataclass(frozen=True)
class Claim:
    """The Kronecker factors of a parameter are its block of the GGN (or of the empirical Fisher): true or false."""

    case: Case
    parameter: str
    exact: bool
    kind: str = "kflr"
    sharing: str = "EXPAND"

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "not"
        return f"{self.case.name}-{self.parameter}-{self.kind}-{self.sharing.lower()}-{verdict}"


def claims(case: Case, parameters: str, exact: bool, kinds: str = "kflr", sharing: str = "EXPAND") -> list[Claim]:
    return [Claim(case, p, exact, kind, sharing) for p in parameters.split() for kind in kinds.split()]


def one(case: Case) -> Case:
    return replace(case, name=f"one_{case.name}", batch=1)


def copies(case: Case) -> Case:
    """The first sample again and again, with one label."""
    labels = lambda batch, output: torch.zeros(batch, dtype=torch.long)  # noqa: E731
    return replace(case, name=f"copies_{case.name}", y=labels, prepare=lambda x: x[:1].expand_as(x).clone())


def linear_net(between: Make) -> Make:
    return lambda: seq(nn.Linear(3, 4), between(), nn.Linear(4, 4), nn.Linear(4, 2))


def relu_net(shift: float) -> Make:
    return lambda: seq(nn.Linear(3, 4), Apply(lambda t: t + shift), nn.ReLU(), nn.Linear(4, 2))


def trunk() -> nn.Module:
    return seq(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3), nn.Sigmoid(), nn.Linear(3, 2))


def conv_whole() -> nn.Module:
    """The kernel is as large as the image: one position, no sharing."""
    return seq(nn.Conv2d(2, 3, (3, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(3, 3))


MLP = classifier("mlp", mlp)
TOKENS = classifier("tokens", tokens, (4, 3))
AVERAGE = regression("average", lambda: seq(nn.Linear(3, 4), average(1), nn.Linear(4, 2)), (4, 3))
PIXELS = regression("pixel_average", lambda: seq(nn.Conv2d(2, 3, 2, padding=1), average(2, 3)), (2, 3, 3))
PER_POSITION = regression("loss_per_position", lambda: seq(nn.Linear(3, 4), nn.Linear(4, 2)), (4, 3))
PER_PIXEL = regression("loss_per_pixel", lambda: nn.Conv2d(2, 3, 2, padding=1), (2, 3, 3))
BOTH = "kflr empirical"

CLAIMS = [
    # One sample, and copies of one, where nothing is shared.
    *claims(one(MLP), "0.weight 0.bias 2.weight 2.bias", True, BOTH),
    *claims(copies(MLP), "0.weight 0.bias 2.weight 2.bias", True, BOTH),
    *claims(MLP, "0.weight 2.weight", False, BOTH),
    *claims(MLP, "0.bias 2.bias", True, BOTH),
    *claims(one(classifier("conv", conv_whole, (2, 3, 2))), "0.weight 0.bias 3.weight", True, BOTH),
    *claims(classifier("conv", conv_whole, (2, 3, 2)), "0.weight", False, BOTH),
    *claims(one(TOKENS), "0.weight 0.bias", False, BOTH),
    *claims(one(TOKENS), "0.weight", False, BOTH, "REDUCE"),
    *claims(one(TOKENS), "0.bias", True, BOTH, "REDUCE"),
    # The Jacobian and the Hessian of the loss do not depend on the sample.
    *claims(regression("deep_linear", linear_net(nn.Identity)), "0.weight 2.weight 3.weight", True),
    *claims(regression("deep_tanh", linear_net(nn.Tanh)), "0.weight", False),
    *claims(regression("deep_tanh", linear_net(nn.Tanh)), "2.weight 3.weight", True),
    *claims(classifier("deep_linear_classes", linear_net(nn.Identity), outputs=2), "0.weight 3.weight", False),
    *claims(regression("relu_all_on", relu_net(50.0)), "0.weight 3.weight", True),
    *claims(regression("relu", relu_net(0.0)), "0.weight", False),
    *claims(regression("any_trunk", trunk, (1, 3, 3)), "5.weight 5.bias", True),
    *claims(regression("any_trunk", trunk, (1, 3, 3)), "0.weight 3.weight", False),
    *claims(regression("any_trunk", trunk, (1, 3, 3)), "5.weight", False, "empirical"),
    *claims(classifier("any_trunk_classes", trunk, (1, 3, 3), outputs=2), "5.weight", False),
    # Shared weights, the positions averaged.
    *claims(AVERAGE, "0.weight 0.bias 2.weight", True, sharing="REDUCE"),
    *claims(AVERAGE, "0.weight", False),
    *claims(PIXELS, "0.weight 0.bias", True, sharing="REDUCE"),
    *claims(PIXELS, "0.weight", False),
    *claims(replace(TOKENS, name="token_regression", y=normal, loss=nn.MSELoss), "0.weight", False, sharing="REDUCE"),
    # Shared weights, a loss for each position.
    *claims(PER_POSITION, "0.weight 0.bias 1.weight 1.bias", True),
    *claims(PER_POSITION, "0.weight 1.weight", False, sharing="REDUCE"),
    *claims(PER_PIXEL, "weight bias", True),
    *claims(PER_PIXEL, "weight", False, sharing="REDUCE"),
    # Layers that nobody wrote factors for; three pieces for the bilinear form.
    *claims(one(BY_NAME["bilinear"]), "form.weight left.weight", True, BOTH),
    *claims(BY_NAME["bilinear"], "form.weight left.weight", False, BOTH),
    *claims(one(BY_NAME["weight_low_rank"]), "parameter.0 parameter.1", True, BOTH),
    *claims(BY_NAME["weight_low_rank"], "parameter.0 parameter.1", True),
    *claims(BY_NAME["weight_low_rank"], "parameter.0", False, "empirical"),
    *claims(one(BY_NAME["einsum_two_parameters"]), "parameter.0 parameter.1", True, BOTH),
]  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_exact(claim: Claim) -> None:
    problem = claim.case.build()
    kind, options = KINDS[claim.kind]
    got = dense(problem, kind, sharing=claim.sharing, **options)[claim.parameter]
    block = oracle_second.ggn if claim.kind == "kflr" else oracle_second.empirical_fisher
    want = block(problem.model, problem.loss, problem.x, problem.y)[claim.parameter]
    found = error(got, want)
    assert found <= TOLERANCE if claim.exact else found > DIFFERENT, f"off by {found:.3g}"


def test_groups() -> None:
    """One sample, one position: exact within each group, nothing between them where the GGN has something."""
    model = lambda: seq(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    for batch in (1, 3):
        problem = classifier("groups", model, (4, 3, 3), batch).build()
        got = dense(problem, "KFLR")["0.weight"]
        want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)["0.weight"]
        same = torch.block_diag(*[torch.ones_like(got[: len(got) // 2, : len(got) // 2])] * 2)
        found = error(got * same, want * same)
        assert found <= TOLERANCE if batch == 1 else found > DIFFERENT
        assert torch.equal(got * (1 - same), torch.zeros_like(got))
        assert (want * (1 - same)).abs().max() > DIFFERENT


def frozen_batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(6).eval()
    torch.nn.init.normal_(norm.running_mean)
    return norm


NORMS = (lambda: nn.LayerNorm(6), lambda: nn.RMSNorm(6), lambda: nn.GroupNorm(2, 6), frozen_batch_norm)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sharing", SHARING)
def test_norms(norm: Make, sharing: str) -> None:
    """What has no leg of the parameter, a norm's deviation, is in the factors: one sample's diagonal is exact."""
    for batch in (1, 3):
        problem = classifier("norm", lambda: seq(nn.Linear(3, 6), norm(), nn.Linear(6, 3)), (3,), batch).build()
        got = dense(problem, "KFLR", sharing=sharing)["1.weight"]
        want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)["1.weight"]
        found = error(got.diagonal(), want.diagonal())
        assert found <= TOLERANCE if batch == 1 else found > DIFFERENT
        assert torch.equal(got, torch.diag(got.diagonal()))


def _residuals(size: float) -> Problem:
    """½ · MSE on C = 2 outputs and each input four times, so that f - y takes all signs of ±size."""
    case = Case("residuals", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), batch=3,
                loss=lambda: Written(lambda f, y: 0.5 * F.mse_loss(f, y)))  # fmt: skip
    problem = case.build()
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    x = problem.x.repeat_interleave(4, 0)
    return replace(problem, x=x, y=problem.model(x).detach() + size * signs.repeat(3, 1))


@pytest.mark.parametrize("size, same", [(2**0.5, True), (2.0, False)])
def test_empirical_fisher_is_the_ggn(size: float, same: bool) -> None:
    """Where the mean of the squared gradients with respect to the output is the Hessian: f - y = ±sqrt(C)."""
    problem = _residuals(size)
    ggn, empirical = dense(problem, "KFLR"), dense(problem, "KFAC", fisher="EMPIRICAL")
    for name, matrix in ggn.items():
        found = error(empirical[name], matrix)
        assert found <= TOLERANCE if same else found > DIFFERENT, name


@pytest.mark.parametrize("shift, same", [(1.0, True), (2.0, False)])
def test_targets_one_away(shift: float, same: bool) -> None:
    """½ (f - y)² with one output and y = f ± 1: every squared gradient is the Hessian."""
    case = Case("one_output", lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), batch=4,
                loss=lambda: Written(lambda f, y: 0.5 * F.mse_loss(f, y)))  # fmt: skip
    problem = case.build()
    signs = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]], dtype=torch.float64)
    problem = replace(problem, y=problem.model(problem.x).detach() + shift * signs)
    ggn, empirical = dense(problem, "KFLR"), dense(problem, "KFAC", fisher="EMPIRICAL")
    for name, matrix in ggn.items():
        found = error(empirical[name], matrix)
        assert found <= TOLERANCE if same else found > DIFFERENT, name


def test_all_labels() -> None:
    """Every label, weighted with its probability, turns the gradient's factors into the root's: sum_c p_c B_c = B."""
    problem = one(MLP).build()
    p = torch.softmax(problem.model(problem.x).detach(), 1)[0]
    drawn = [dense(replace(problem, y=torch.tensor([c])), "KFAC", fisher="EMPIRICAL") for c in range(3)]
    for name, exact in dense(problem, "KFLR").items():
        weighted = [p[c] * drawn[c][name] for c in range(3)]
        assert error(torch.stack(weighted).sum(0), exact) <= TOLERANCE
        assert error(torch.stack([drawn[c][name] for c in range(3)]).mean(0), exact) > DIFFERENT


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_a_1x1_convolution(kind: str, sharing: str) -> None:
    """On [N, S, D] and [N, D, S], with the same weights."""
    linear = classifier("linear", lambda: seq(nn.Linear(3, 4), nn.Tanh(), average(1), nn.Linear(4, 3)), (5, 3)).build()
    convolution = seq(nn.Conv1d(3, 4, 1), nn.Tanh(), average(2), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for mine, other in zip(convolution.parameters(), linear.model.parameters(), strict=True):
            mine.copy_(other.reshape(mine.shape))
    as_image = replace(linear, model=convolution, x=linear.x.transpose(1, 2))
    name, options = KINDS[kind]
    left, right = (dense(problem, name, sharing=sharing, **options) for problem in (linear, as_image))
    assert list(left) == list(right)
    assert all(error(right[key], value) <= TOLERANCE for key, value in left.items())


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(1, 3), (4, 1)),
        (nn.Linear(3, 1), (4, 2, 3)),
        (nn.Conv2d(1, 2, 1), (3, 1, 2, 2)),
        (nn.Conv2d(2, 1, 2), (3, 2, 3, 3)),
    ],
)
def test_axes_of_one_element(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """(B, A) with the sizes of out and in, and one block with the bias, [out, in + 1], where it is joined."""
    x = torch.randn(shape)
    y = torch.randn_like(layer(x))
    rows, columns = len(layer.weight), layer.weight[0].numel()
    quantities = [tn.KFLR(), tn.KFRA(), tn.KFLR("joined", bias=tn.Bias.JOINED), tn.KFAC("drawn", mc_samples=2)]
    result = tn.compute(layer, nn.MSELoss(), (x, y), quantities, seed=0)
    for name in ("kflr", "kfra", "drawn"):
        assert [f.shape[-1] for f in result[name]["weight"].factors] == [rows, columns], name
    assert list(result["joined"]) == ["weight"]
    assert [f.shape[-1] for f in result["joined"]["weight"].factors] == [rows, columns + 1]


class Scaled(nn.Module):
    """x times one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.number * x


def test_a_scalar_has_no_second_axis() -> None:
    """A number that scales everything has one element: its block is exact, with no independence assumed."""
    model = Scaled()
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    result = tn.compute(model, nn.MSELoss(), (x, y), [tn.KFLR(sharing=tn.Sharing.REDUCE), tn.DiagGGN()])
    (factors,) = result["kflr"].values()
    torch.testing.assert_close(factors.to_dense().reshape(-1), *result["diag_ggn"].values())


def test_order_of_the_factors() -> None:
    """kron(*factors) is the block of the row-major weight: transposed factors are told apart."""
    problem = classifier("square", lambda: seq(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))).build()
    value = run(problem, "KFLR")["0.weight"]
    B, A = value.factors
    assert error(value.to_dense(), _kron(B, A)) <= TOLERANCE
    assert error(value.to_dense(), _kron(A, B)) > DIFFERENT


def _kron(left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("ab,cd->acbd", left, right).reshape(len(left) * len(right), -1)


def test_reduce_of_several_uses_is_refused() -> None:
    """Nobody has said what it is; one use is answered, and expand takes the uses as positions."""
    problem = BY_NAME["reused_module"].build()
    with pytest.raises(tn.UnsupportedError, match=r"'layer.weight'.*reduce.* there are 2 uses[\s\S]*Sharing.EXPAND"):
        run(problem, "KFLR", sharing="REDUCE", strict=True)
    assert list(run(problem, "KFLR")) == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_number_for_each_sample_is_in_a_factor(norm: Callable[[int], nn.Module]) -> None:
    """1/std has no leg of the scale: for one sample the block is still that of the GGN."""
    case = regression("norm", lambda: seq(nn.Linear(3, 4), norm(4)), batch=1)
    problem = case.build()
    found, exact = run(problem, "KFLR"), run(problem, "DiagGGN")
    want = exact["1.weight"].flatten()
    assert error(found["1.weight"].to_dense().diagonal(), want) <= TOLERANCE
