"""Laws that need no oracle: sums, permutations, copies and scales of samples; dtypes, other batches, torch.compile."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ..cases import CASES, Case, Problem

QUANTITIES = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
LAWS = (
    "linear_rank3", "tied_transposed", "reused_convolution", "position_table", "class_token", "merged_inside",
    "attention", "einsum_mixer", "conv2d_groups", "conv1d", "conv_transpose1d", "cnn", "prelu_channels", "max_pool2d",
    "avg_pool2d_ceil", "layer_norm", "group_norm", "batch_norm_eval", "cross_entropy_smoothing", "mse_sum",
    "unused_and_zero_gradient",
)  # fmt: skip
CHOSEN = [case for case in CASES if case.name in LAWS]

Results = Mapping[str, Mapping[str, Tensor]]


@pytest.fixture(params=CHOSEN, ids=str, scope="module")
def compiled(request: pytest.FixtureRequest) -> tuple[Problem, tn.Program, Results]:
    """A case, its program with all quantities, and its result."""
    problem = request.param.build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), QUANTITIES)
    return problem, program, program(problem.x, problem.y)


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    error = (got - want).abs().max() / want.abs().max().clamp(min=1.0)
    assert error < 1e-11, f"{what}: {error:.3g}"


def mean(problem: Problem) -> bool:
    return bool(problem.loss.reduction == "mean")


def test_all_names_are_there() -> None:
    assert sorted(case.name for case in CHOSEN) == sorted(LAWS)


@pytest.mark.thinned(5)
def test_within_one_result(compiled: tuple[Problem, tn.Program, Results]) -> None:
    """Σ_n batch_grad = grad, the diagonal of batch_dot is batch_l2, variance + mean² = second moment."""
    problem, _, result = compiled
    size = problem.x.shape[0]
    unscaled = size if mean(problem) else 1
    for name, individual in result["batch_grad"].items():
        rows = individual.flatten(1)
        close(individual.sum(0), result["grad"][name], f"grad of {name}")
        close(rows.square().sum(1), result["batch_l2"][name], f"batch_l2 of {name}")
        close(rows @ rows.t(), result["batch_dot"][name], f"batch_dot of {name}")
        moment = (unscaled * individual).square().mean(0)
        close(result["second_moment"][name], moment, f"second_moment of {name}")
        average = unscaled * individual.mean(0)
        close(result["variance"][name] + average**2, moment, f"variance of {name}")
        assert (result["variance"][name] > -1e-12).all()


@pytest.mark.thinned(2)
def test_grad_is_autograd(compiled: tuple[Problem, tn.Program, Results]) -> None:
    problem, _, result = compiled
    output = problem.model(problem.x)
    loss = problem.loss(output, problem.y)
    close(result.loss, loss.detach(), "loss")  # type: ignore[attr-defined]
    close(result.output, output.detach(), "output")  # type: ignore[attr-defined]
    trainable = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    assert list(result["grad"]) == list(trainable)
    for (name, parameter), want in zip(trainable.items(), grads, strict=True):
        close(result["grad"][name], torch.zeros_like(parameter) if want is None else want, name)


def test_samples_permute(compiled: tuple[Problem, tn.Program, Results]) -> None:
    problem, program, result = compiled
    order = torch.randperm(problem.x.shape[0], generator=torch.Generator().manual_seed(1))
    other = program(problem.x[order], problem.y[order])
    for quantity, by in result.items():
        for name, value in by.items():
            value = value[order] if quantity in ("batch_grad", "batch_l2") else value
            value = value[order][:, order] if quantity == "batch_dot" else value
            close(other[quantity][name], value, f"{quantity} of {name}")


def test_samples_twice(compiled: tuple[Problem, tn.Program, Results]) -> None:
    """With every sample there twice, a mean's individual gradients halve and the moments stay."""
    problem, program, result = compiled
    other = program(torch.cat([problem.x, problem.x]), torch.cat([problem.y, problem.y]))
    half = 0.5 if mean(problem) else 1.0
    for name, value in result["batch_grad"].items():
        close(other["batch_grad"][name], half * torch.cat([value, value]), f"batch_grad of {name}")
        close(other["grad"][name], 2 * half * result["grad"][name], f"grad of {name}")
        l2 = result["batch_l2"][name]
        close(other["batch_l2"][name], half**2 * torch.cat([l2, l2]), f"batch_l2 of {name}")
        close(other["batch_dot"][name], half**2 * result["batch_dot"][name].repeat(2, 2), f"batch_dot of {name}")
        for quantity in ("second_moment", "variance"):
            close(other[quantity][name], result[quantity][name], f"{quantity} of {name}")


def test_second_call_and_untouched_model(compiled: tuple[Problem, tn.Program, Results]) -> None:
    """The same numbers again; nothing is left on the model, its parameters or the batch."""
    problem, program, result = compiled
    state = {name: value.clone() for name, value in problem.model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in problem.model.named_modules()}
    x, y = problem.x.clone(), problem.y.clone()
    again = program(problem.x, problem.y)
    for quantity, by in result.items():
        for name, value in by.items():
            assert torch.equal(again[quantity][name], value), f"{quantity} of {name}"
            assert not again[quantity][name].requires_grad
    assert torch.equal(problem.x, x) and torch.equal(problem.y, y)
    assert attributes == {name: set(vars(module)) for name, module in problem.model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in problem.model.state_dict().items())
    for parameter in problem.model.parameters():
        assert (
            parameter.grad is None and not parameter._backward_hooks and not set(vars(parameter)) - {"_backward_hooks"}
        )


def test_results_do_not_share_memory_with_the_model(compiled: tuple[Problem, tn.Program, Results]) -> None:
    """A result may be changed in place without changing the model or the batch."""
    problem, program, _ = compiled
    own = {t.untyped_storage().data_ptr() for t in (*problem.model.parameters(), *problem.model.buffers(), problem.x)}
    for quantity, by in program(problem.x, problem.y).items():
        for name, value in by.items():
            assert value.untyped_storage().data_ptr() not in own, f"{quantity} of {name}"


@pytest.mark.parametrize("size", [1, 2, 11])
def test_other_batch_sizes(compiled: tuple[Problem, tn.Program, Results], size: int) -> None:
    """A program agrees with itself on single samples: G_n · (batch size) does not depend on the batch."""
    problem, program, result = compiled
    index = torch.arange(size) % problem.x.shape[0]
    found = program(problem.x[index], problem.y[index])
    factor = problem.x.shape[0] / size if mean(problem) else 1.0
    for name, value in result["batch_grad"].items():
        close(found["batch_grad"][name], factor * value[index], f"batch_grad of {name}")
        close(found["batch_dot"][name], factor**2 * result["batch_dot"][name][index][:, index], f"batch_dot of {name}")
        unscaled = found["batch_grad"][name] * (size if mean(problem) else 1)
        close(found["second_moment"][name], unscaled.square().mean(0), f"second_moment of {name}")
        close(found["variance"][name], unscaled.var(0, correction=0), f"variance of {name}")


class Times(nn.Module):
    """A loss times a constant."""

    def __init__(self, loss: nn.Module, factor: float) -> None:
        super().__init__()
        self.loss, self.factor = loss, factor

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.factor * self.loss(output, y)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("case", [by_name("cnn"), by_name("mlp_sum"), by_name("loss_by_hand")], ids=str)
def test_loss_times_a_constant(case: Case) -> None:
    """c·L: first powers times c, squares times c²."""
    problem = case.build()
    one, other = (
        tn.compute(problem.model, loss, (problem.x, problem.y), QUANTITIES)
        for loss in (problem.loss, Times(problem.loss, -2.5))
    )
    for quantity, by in one.items():
        factor = -2.5 if quantity in ("grad", "batch_grad") else 6.25
        for name, value in by.items():
            close(other[quantity][name], factor * value, f"{quantity} of {name}")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=str)
@pytest.mark.parametrize("case", [by_name("cnn"), by_name("mlp_sum"), by_name("layer_norm")], ids=str)
def test_low_precision(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    problem = case.build()
    want = tn.compute(problem.model, problem.loss, (problem.x, problem.y), QUANTITIES)
    y = problem.y.to(dtype) if problem.y.is_floating_point() else problem.y
    result = tn.compute(problem.model.to(dtype), problem.loss.to(dtype), (problem.x.to(dtype), y), QUANTITIES)
    for quantity, by in want.items():
        for name, value in by.items():
            got = result[quantity][name]
            assert got.dtype is dtype, f"{quantity} of {name}"
            error = (got.double() - value).abs().max() / value.abs().max().clamp(min=0.1)
            assert error < tolerance, f"{quantity} of {name}: {error:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [by_name("cnn"), by_name("reused_module")], ids=str)
def test_torch_compile_accepts_the_source(case: Case) -> None:
    """One graph, no break: the emitted function is straight-line."""
    problem = case.build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), QUANTITIES)
    namespace: dict[str, object] = {}
    exec(program.source, namespace)
    torch._dynamo.reset()
    traced = torch.compile(namespace["program"], fullgraph=True, backend="eager")
    loss, outputs, values, *_ = traced(program.tensors(problem.x, problem.y))
    result = program(problem.x, problem.y)
    assert torch.equal(loss, result.loss) and torch.equal(outputs[0], result.output)
    for quantity, by in result.items():
        for name, value in by.items():
            close(values[quantity][name], value, f"{quantity} of {name}")


def test_source_is_straight_line() -> None:
    problem = by_name("cnn").build()
    source = tn.compile(problem.model, problem.loss, (problem.x, problem.y), QUANTITIES).source
    for word in ("for ", "if ", "while ", ".item()", "einsum", "opt_einsum", "lambda"):
        code = "\n".join(line.split("#")[0] for line in source.splitlines()[1:])
        assert word not in code, word


@pytest.mark.parametrize("case", [by_name("cnn"), by_name("linear_rank3"), by_name("mlp_sum")], ids=str)
def test_nan_passes_through(case: Case) -> None:
    """A NaN in one sample: its gradients are NaN, those of the others are not."""
    problem = case.build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), QUANTITIES)
    clean = program(problem.x, problem.y)
    problem.x[1] = torch.nan
    result = program(problem.x, problem.y)
    assert result.loss.isnan()
    for name, value in result["batch_grad"].items():
        assert value[1].isnan().any(), name
        close(value[[0, 2]], clean["batch_grad"][name][[0, 2]], name)
        close(result["batch_l2"][name][[0, 2]], clean["batch_l2"][name][[0, 2]], name)
        for quantity in ("grad", "second_moment", "variance"):
            assert result[quantity][name].isnan().any(), f"{quantity} of {name}"
        assert result["batch_l2"][name][1].isnan() and result["batch_dot"][name][1].isnan().all()


def test_centred_variance_of_nearly_constant_gradients() -> None:
    """float32, gradients 1000 ± 0.01: subtracting first keeps the digits, alone and beside other quantities."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, y = torch.ones(32, 3), -500 + 0.01 * torch.randn(32, 2)
    loss = nn.MSELoss()
    individual = (-y / 1).double()  # ∂ℓ_n/∂bias = 2 (0 - y) / 2
    want = individual.var(0, correction=0)
    for others in ([], [tn.Grad()], [tn.BatchGrad()], [tn.SecondMoment(), tn.BatchL2()]):
        result = tn.compute(model, loss, (x, y), [tn.Variance(centred=True), *others])["variance"]
        for got in (result["bias"], result["weight"][:, 0], result["weight"][:, 2]):
            assert ((got - want).abs() / want).max() < 1e-2
