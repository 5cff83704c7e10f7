"""Where second-order quantities are exact, each beside a neighbour where they are not.

What one quantity is by definition is tested where it lives (test_second_order, test_kronecker, test_hessian, …); here
is what ties them to each other: the exact cases for any N, parameters that are used twice, the spectrum of the whole
GGN, the Hessian where paths meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.sweep.derived import Result

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, normal, seq
from ..models import Apply, Branches, Residual, WithParameters
from ..second_order import (
    ALL,
    DIFFERENT,
    TOLERANCE,
    assert_equal,
    dense,
    error,
    everything,
    make,
    mlp,
    run,
    tensors,
)

KRONECKER = ("kflr", "kfra", "empirical")
BY_NAME = {case.name: case for case in CASES}


def regression(model: Callable[[], nn.Module], batch: int = 4, x: tuple[int, ...] = (3,)) -> Case:
    return Case("regression", model, x, normal, nn.MSELoss, batch)


# Kronecker factors that are the block.


def linear_net(between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: seq(nn.Linear(3, 4), between(), nn.Linear(4, 4), nn.Linear(4, 2))


def relu_net(shift: float) -> Callable[[], nn.Module]:
    return lambda: seq(nn.Linear(3, 4), Apply(lambda t: t + shift), nn.ReLU(), nn.Linear(4, 2))


def trunk() -> nn.Module:
    return seq(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3), nn.Sigmoid(),
               nn.Linear(3, 2))  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """The factors of some parameters are their blocks of the GGN, or differ from them."""

    case: Case
    kinds: str
    exact: str
    differs: str = ""


def claims() -> Iterator[object]:
    """Any N: what does not depend on the sample loses nothing in a mean."""
    both = "kflr kfra"
    for batch in (1, 2, 7):
        every = "0.weight 0.bias 2.weight 2.bias 3.weight 3.bias"
        yield pytest.param(Claim(regression(linear_net(nn.Identity), batch), both, every), id=f"linear-{batch}")
        on = Claim(regression(relu_net(50.0), batch), both, "0.weight 0.bias 3.weight 3.bias")
        yield pytest.param(on, id=f"relu_all_on-{batch}")
        scales = regression(lambda: WithParameters(lambda x, s, a: x * a * s, (), (3,)), batch)
        yield pytest.param(Claim(scales, both, "parameter.0 parameter.1"), id=f"scales-{batch}")
        alone = ("0.weight 0.bias", "") if batch == 1 else ("", "0.weight")
        yield pytest.param(Claim(mlp(batch=batch), both, *alone), id=f"samples-{batch}")
        last = Claim(regression(trunk, batch, (1, 3, 3)), both, "6.weight 6.bias", "" if batch == 1 else "4.weight")
        yield pytest.param(last, id=f"any_trunk-{batch}")
    yield pytest.param(Claim(regression(linear_net(nn.Tanh)), both, "2.weight 3.weight", "0.weight"), id="tanh")
    yield pytest.param(Claim(regression(relu_net(0.0)), both, "3.weight", "0.weight"), id="relu")
    positions = regression(lambda: seq(nn.Linear(3, 4), Apply(lambda t: t.mean(1)), nn.Linear(4, 2)), 4, (5, 3))
    yield pytest.param(Claim(positions, both, "2.weight", "0.weight"), id="positions")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("claim", list(claims()))
def test_factors_are_the_block(claim: Claim) -> None:
    problem = replace(claim.case, seed=3).build()
    problem.x.mul_(1.5)
    want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)
    found = everything(problem, {kind: ALL[kind] for kind in claim.kinds.split()})
    for kind, values in found.items():
        for name in claim.exact.split():
            assert error(values[name], want[name]) <= TOLERANCE, f"{kind} of {name}"
        for name in claim.differs.split():
            assert error(values[name], want[name]) > DIFFERENT, f"{kind} of {name}"


@pytest.mark.parametrize("kind", KRONECKER)
def test_copies_of_one_sample(kind: str) -> None:
    """N copies of one sample are one sample; one copy that is another sample spoils it."""
    problem = mlp().build()
    same = replace(problem, x=problem.x[:1].repeat(4, 1), y=problem.y[:1].repeat(4))
    other = replace(same, x=torch.cat([same.x[:3], problem.x[1:2]]))
    block = oracle_second.empirical_fisher if kind == "empirical" else oracle_second.ggn
    for case, exact in ((same, True), (other, False)):
        want = block(case.model, case.loss, case.x, case.y)
        for name, matrix in everything(case, {kind: ALL[kind]})[kind].items():
            if exact:
                assert error(matrix, want[name]) <= TOLERANCE, name
            elif name == "0.weight":
                assert error(matrix, want[name]) > DIFFERENT, name


@pytest.mark.parametrize("name", ["cnn", "cross_entropy_positions", "bce_with_logits", "mse_rank4", "loss_softmax"])
def test_columns_of_the_root(name: str) -> None:
    """C - 1 for a softmax over C classes, one for every element of the output for the others; times the positions."""
    problem = BY_NAME[name].build()
    columns = {"cnn": 2, "cross_entropy_positions": 2 * 3, "bce_with_logits": 3, "mse_rank4": 2 * 2 * 2}
    for V in run(problem, "SqrtGGN").values():
        assert V.shape[0] == columns.get(name, 3)


# Parameters that are used twice.


class Separate(nn.Module):
    """`Reused` with a layer of its own for each call, that starts as the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.one = layer
        self.two = type(layer)(3, 3) if isinstance(layer, nn.Linear) else nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def twice(name: str) -> tuple[Problem, Problem]:
    """A layer that is called twice, and two layers with the same values."""
    tied = BY_NAME[name].build()
    separate = Separate(nn.Linear(3, 3) if name == "reused_module" else nn.Conv2d(2, 2, 3, padding=1)).double()
    with torch.no_grad():
        for layer in (separate.one, separate.two):
            layer.load_state_dict(tied.model.layer.state_dict())
    return tied, replace(tied, model=separate)


@pytest.mark.parametrize("name", ["reused_module", "reused_convolution"])
def test_uses_are_positions(name: str) -> None:
    """A = (A_1 + A_2) / 2 and B = B_1 + B_2 of two uses, and HesScale's h = h_1 + h_2; the GGN sees more."""
    tied, separate = twice(name)
    kinds = [ALL[key] for key in KRONECKER]
    joined = [(kind, options | {"bias": "JOINED"}) for kind, options in kinds if name == "reused_module"]
    for kind, options in (*kinds, *joined):
        got, each = run(tied, kind, **options), run(separate, kind, **options)
        for leaf in ("weight",) if "bias" in options else ("weight", "bias"):
            one, two = (each[f"{layer}.{leaf}"].factors for layer in ("one", "two"))
            B, *A = got[f"layer.{leaf}"].factors
            assert error(B, one[0] + two[0]) <= TOLERANCE, kind
            assert all(error(a, (b + c) / 2) <= TOLERANCE for a, b, c in zip(A, one[1:], two[1:], strict=True)), kind
    for kind in ("HesScale", "DiagGGN") if name == "reused_module" else ():
        got, each = run(tied, kind), run(separate, kind)
        gap = error(got["layer.weight"], each["one.weight"] + each["two.weight"])
        assert gap <= TOLERANCE if kind == "HesScale" else gap > DIFFERENT, kind


def test_used_twice_is_not_exact() -> None:
    """One sample, no positions: two uses are as good as two positions; one use is exact."""
    tied, separate = twice("reused_module")
    for problem, exact in ((tied, False), (separate, True)):
        one = replace(problem, x=problem.x[:1], y=problem.y[:1])
        want = oracle_second.ggn(one.model, one.loss, one.x, one.y)
        for kind in ("KFLR", "KFRA"):
            for name, matrix in dense(one, kind).items():
                gap = error(matrix, want[name])
                assert gap <= TOLERANCE if exact else gap > DIFFERENT, (kind, name)


@pytest.mark.parametrize("name", ["cnn", "residual", "attention"])
def test_spectrum_of_the_whole(name: str) -> None:
    """The Gram matrices of the parameters sum to one with the non-zero spectrum of the whole GGN; one alone has not."""
    problem = BY_NAME[name].build()
    grams = run(problem, "GGNGram")
    whole = sum(grams.values())
    J = torch.cat(list(oracle_second.jacobians(problem.model, problem.x).values()), -1)
    H = oracle_second.loss_hessians(
        problem.loss, oracle_second.outputs(problem.model, problem.x), problem.y, len(problem.x)
    )
    want = torch.linalg.eigvalsh((J.mT @ H @ J).sum(0)).flip(0)
    for gram, same in ((whole, True), (next(iter(grams.values())), False)):
        size = gram.shape[0] * gram.shape[1]
        spectrum = torch.linalg.eigvalsh(gram.reshape(size, size)).flip(0)
        shared = min(len(spectrum), len(want))
        gap = error(spectrum[:shared], want[:shared])
        assert gap <= TOLERANCE if same else gap > DIFFERENT
        assert float(spectrum[shared:].abs().sum() + same * want[shared:].abs().sum()) <= TOLERANCE


# The Hessian where paths with second derivatives meet.


class Gated(nn.Module):
    """x · softmax(a(x)) + tanh(b(x)): the two paths meet, and meet x again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.softmax(self.a(x), 1) + torch.tanh(self.b(x))


MERGING: Mapping[str, Callable[[], nn.Module]] = {
    "two_residual_blocks": lambda: seq(
        nn.Linear(3, 3), nn.Sigmoid(), Residual(seq(nn.Linear(3, 3), nn.Tanh())), nn.SiLU(),
        Residual(seq(nn.Sigmoid(), nn.Linear(3, 3))), nn.Tanh(), nn.Linear(3, 3),
    ),
    "nested": lambda: seq(
        nn.Linear(3, 3), Residual(seq(nn.Tanh(), Residual(seq(nn.Linear(3, 3), nn.Sigmoid())))), nn.Linear(3, 3)
    ),
    "softmax_inside": lambda: seq(nn.Linear(3, 3), Residual(Gated()), nn.Softmax(1), nn.Linear(3, 3)),
    "product_of_branches": lambda: seq(
        nn.Linear(3, 3), Branches(lambda a, b: a * b + a, nn.Sigmoid(), seq(nn.Linear(3, 3), nn.Tanh())),
        nn.Linear(3, 3),
    ),
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MERGING)
def test_hessian_where_paths_meet(name: str) -> None:
    """Residual columns of one value that come along two paths are one column; the GGN alone is not enough."""
    problem = Case(name, MERGING[name], (3,), classes(3), nn.CrossEntropyLoss, 2).build()
    quantities = [tn.HessianDiag(), tn.HessianDiag("each", per_sample=True), tn.DiagGGN()]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y)
    arguments = (problem.model, problem.loss, problem.x, problem.y)
    assert_equal(result["hessian_diag"], oracle_second.hessian_diag(*arguments), "hessian_diag")
    assert_equal(result["each"], oracle_second.hessian_diag_per_sample(*arguments), "per sample")
    first = next(iter(result["diag_ggn"]))
    assert error(result["diag_ggn"][first], result["hessian_diag"][first]) > DIFFERENT


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MERGING)
def test_factors_where_paths_meet(name: str) -> None:
    """One sample, no positions: KFLR and KFRA are the block, with the blocks between values that KFRA keeps."""
    problem = Case(name, MERGING[name], (3,), classes(3), nn.CrossEntropyLoss, 1).build()
    want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)
    for kind, values in everything(problem, {key: ALL[key] for key in ("kflr", "kfra")}).items():
        assert_equal(values, want, kind)


def test_kfra_where_paths_meet() -> None:
    """Several samples: Ḡ of all values that are alive together, from one to the next by the mean of JᵀḠJ."""
    model = lambda: seq(nn.Linear(3, 3), Residual(seq(nn.Tanh(), nn.Linear(3, 3))), nn.Tanh(), nn.Linear(3, 2))  # noqa: E731
    problem = Case("residual", model, (3,), classes(2), nn.CrossEntropyLoss, 3).build()
    first, (tanh, inner), last = problem.model[0], problem.model[1].body, problem.model[3]
    steps: list[Callable[[Tensor], Tensor]] = [
        first,
        lambda h: torch.cat([h, tanh(h)]),
        lambda s: torch.cat([s[:3], inner(s[3:])]),
        lambda s: s[:3] + s[3:],
        torch.tanh,
        last,
    ]
    states = [problem.x]
    for step in steps:
        states.append(torch.stack([step(s) for s in states[-1]]).detach())
    G = oracle_second.loss_hessians(problem.loss, states[-1], problem.y, 3).sum(0)
    B = [G]
    for step, state in zip(reversed(steps[1:]), reversed(states[1:-1]), strict=True):
        J = torch.stack([torch.func.jacrev(step)(s) for s in state]).detach()
        B.append((J.mT @ B[-1] @ J).mean(0))
    found, other = run(problem, "KFRA"), run(problem, "KFLR")
    for name, G in {"0.weight": B[-1], "1.body.1.weight": B[3][3:, 3:], "3.weight": B[0]}.items():
        assert error(found[name].factors[0], G) <= TOLERANCE, name
        assert name == "3.weight" or error(found[name].factors[0], other[name].factors[0]) > DIFFERENT, name


# What is shared, what is said, what is needed.


def test_the_input_factor_is_one_tensor() -> None:
    """KFLR, KFAC and KFRA of one program compute A once, and each its own B; each result has memory of its own."""
    problem = BY_NAME["cnn"].build()
    quantities = [make("KFLR"), make("KFAC"), make("KFRA"), make("KFAC", name="empirical", fisher="EMPIRICAL")]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    result = program(problem.x, problem.y, seed=0)
    keys, planned = ("kflr", "kfac", "kfra", "empirical"), program.compiled.plan.results
    for name in ("0.weight", "3.weight", "6.weight"):
        assert len({planned[Result(key, 1)][name] for key in keys}) == 1, name
        assert len({planned[Result(key, 0)][name] for key in keys}) >= 3, name
        first, *others = (result[key][name].factors[1] for key in keys)
        assert all(torch.equal(first, other) for other in others), name
        assert len({A.data_ptr() for A in (first, *others)}) == 4, name


@pytest.mark.parametrize("sharing, word", [("EXPAND", r"tied \(expand\)"), ("REDUCE", r"summed \(reduce\)")])
def test_the_assumption_is_named(sharing: str, word: str) -> None:
    """On the factors and in what a program prints."""
    problem = BY_NAME["linear_rank3"].build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [make("KFLR", sharing=sharing)])
    factors = program(problem.x, problem.y)["kflr"]["weight"]
    text = f"independent over the samples; .* {word}"
    assert re.search(text, repr(factors)) and re.search(text, program.explain())


def test_kfra_says_what_it_needs() -> None:
    """Refused below what the largest matrix takes, and fit at a limit that the whole program meets."""
    problem = replace(mlp(), x=(3,)).build()
    batch, quantities = (problem.x, problem.y), [tn.KFRA()]
    free = tn.compile(problem.model, problem.loss, batch, quantities)
    with pytest.raises(tn.UnsupportedError, match=r"matrix of 4 x 4 features \(128 bytes\).*memory_limit is 127 bytes"):
        tn.compile(problem.model, problem.loss, batch, quantities, memory_limit=127)
    limited = tn.compile(problem.model, problem.loss, batch, quantities, memory_limit=int(free.peak_bytes) + 1)
    want = tensors(free(*batch)["kfra"])
    assert_equal(tensors(limited(*batch)["kfra"]), want, "limited")
