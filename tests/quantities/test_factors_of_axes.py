"""Factors that are too large: one for each axis by partial traces of the dense factor, or the diagonal of an axis."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.linalg import Kind
from tnbackprop.quantities.factors import LARGEST, SHARE

from .. import oracle_second
from ..cases import CASES, Case, Problem, classes, seq
from ..models import Apply
from ..problems import with_parameters
from ..second_order import DIFFERENT, TOLERANCE, Kinds, dense, error, make, run

HUGE = 10**9
KINDS: Kinds = {
    "kflr": ("KFLR", {}),
    "kfra": ("KFRA", {}),
    "empirical": ("KFAC", {"fisher": "EMPIRICAL"}),
    "sampled": ("KFAC", {"mc_samples": 2}),
}


# The formula, from the dense factor M of a component with these axes.


def partial_trace(M: Tensor, axes: Sequence[int], k: int) -> Tensor:
    """Σ over all axes but k of [..., d, d]: [..., d_k, d_k]."""
    count, lead = len(axes), M.shape[:-2]
    legs = "abcdefgh"[:count]
    other = legs[:k] + legs[k].upper() + legs[k + 1 :]
    return torch.einsum(f"...{legs}{other}->...{legs[k]}{legs[k].upper()}", M.reshape(*lead, *axes, *axes))


def of_axes(M: Tensor, axes: Sequence[int], largest: int = HUGE) -> list[Tensor]:
    """F_1 = tr_{≠1} M / (d_2 ⋯ d_k) and F_j = d_j tr_{≠j} M / tr M; the diagonal of one of more than `largest` rows."""
    total = M.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    found = []
    for k, size in enumerate(axes):
        own = partial_trace(M, axes, k)
        own = own / (prod(axes) // size) if k == 0 else size * own / total
        found.append(own if size <= largest else own.diagonal(dim1=-2, dim2=-1))
    return found


def table(*shape: int) -> Case:
    """A table that is added to the input, which has its shape."""
    model = lambda x, p: (x + p).tanh().reshape(x.shape[0], 3, -1).sum(2)  # noqa: E731
    return replace(with_parameters("table", model, shape, x=shape), y=classes(3), loss=nn.CrossEntropyLoss, batch=3)


def whole_block(problem: Problem, kind: str, name: str) -> Tensor:
    """The dense block of a parameter that stays in one piece; of the same columns, where they are drawn."""
    arguments = (problem.model, problem.loss, problem.x, problem.y)
    if kind == "empirical":
        return oracle_second.empirical_fisher(*arguments)[name]
    if kind == "kfra":
        return dense(problem, "KFRA", largest=HUGE)[name]
    if kind == "kflr":
        return oracle_second.ggn(*arguments)[name]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.SqrtGGNMC(mc_samples=2)])
    V = program(problem.x, problem.y, seed=0)["sqrt_ggn_mc"][name].flatten(0, 1).flatten(1)
    return V.T @ V


@pytest.mark.thinned(4)
@pytest.mark.parametrize("largest", [5, 3])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_in_its_axes(kind: str, shape: tuple[int, ...], largest: int) -> None:
    problem, (quantity, options) = table(*shape).build(), KINDS[kind]
    (name,) = dict(problem.model.named_parameters())
    got = run(problem, quantity, 0, largest=largest, **options)[name]
    want = of_axes(whole_block(problem, kind, name), [size for size in shape if size > 1], largest)
    assert [tuple(f.shape) for f in got.factors] == [tuple(f.shape) for f in want]
    assert [kind is Kind.DIAGONAL for kind in got.kinds] == [f.ndim == 1 for f in want]
    for k, (own, wanted) in enumerate(zip(got.factors, want, strict=True)):
        assert error(own, wanted) <= TOLERANCE, k
    assert "taken to be independent" in got.assumption and got.shape == shape
    assert ("4 rows are more than largest=3" in got.assumption) == (largest == 3)


def test_a_table_of_one_matrix_normal_gradient_is_exact() -> None:
    """One sample, one column, a gradient of rank one: its block is a Kronecker product of its axes."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("nt,td,nd->n", x[:, :3], self.p, x[:, 3:]).unsqueeze(1)

    problem = Case("outer", Outer, (7,), batch=1).build()
    for kind in ("KFLR", "KFRA"):
        got = dense(problem, kind, largest=4)["p"]
        want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)["p"]
        assert error(got, want) <= TOLERANCE


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sharing", ["EXPAND", "REDUCE"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_input_of_a_convolution_in_its_axes(groups: int, sharing: str) -> None:
    """A over (channels, height, width) has a factor for each, in every group; B is as it was."""
    layer = lambda: seq(nn.Conv2d(4, 4, (2, 3), groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))  # noqa: E731
    problem = Case("conv", layer, (4, 3, 4), classes(3), nn.CrossEntropyLoss, batch=3).build()
    axes = (4 // groups, 2, 3)
    want = oracle_second.kronecker(problem.model, "0", problem.loss, problem.x, problem.y, reduce=sharing == "REDUCE")
    got = run(problem, "KFLR", sharing=sharing, largest=4)
    B, *A = got["0.weight"].factors
    assert error(B, want.B) <= TOLERANCE
    for own, wanted in zip(A, of_axes(want.A, axes), strict=True):
        assert error(own, wanted) <= TOLERANCE
    assert error(got["0.weight"].trace(), torch.kron(want.B, want.A).trace() if groups == 1 else
                 sum(torch.kron(b, a).trace() for b, a in zip(want.B, want.A, strict=True))) <= TOLERANCE  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["OWN", "JOINED"])
def test_an_axis_that_is_too_large_has_its_diagonal(bias: str) -> None:
    """Of a linear layer's input, of its output, of its bias; which is not joined to what has no dense factors."""
    model = lambda: seq(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))  # noqa: E731
    problem = Case("mlp", model, (6,), classes(4), nn.CrossEntropyLoss, batch=3).build()
    got, full = (run(problem, "KFLR", bias=bias, largest=largest) for largest in (5, HUGE))
    assert all(f.shape[-1] <= 5 or f.ndim == 1 for K in got.values() for f in K.factors)
    for name, wide in (("0.weight", 1), ("2.weight", 0), ("4.weight", 1)):
        want = [f.diagonal() if k == wide else f for k, f in enumerate(run(problem, "KFLR")[name].factors)]
        assert all(error(own, wanted) <= TOLERANCE for own, wanted in zip(got[name].factors, want, strict=True)), name
        assert "6 rows are more than largest=5" in got[name].assumption
    assert "2.bias" in got and ("2.bias" in full) == (bias == "OWN")
    want = run(problem, "KFLR")["2.bias"].factors[0].diagonal()
    assert "0.bias" in got and error(got["2.bias"].factors[0], want) < TOLERANCE


def test_a_vocabulary_stays_diagonal_without_a_limit() -> None:
    """One-hot inputs have nothing off the diagonal: it is not told as a loss."""
    model = seq(nn.Embedding(7, 2), Apply(lambda t: t.tanh().flatten(1)), nn.Linear(6, 3))
    x = torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(0))
    found = tn.compute(model.double(), nn.CrossEntropyLoss(), (x, torch.arange(4) % 3), [tn.KFLR(largest=4)])["kflr"]
    A, B = found["0.weight"].factors
    assert error(A, torch.bincount(x.flatten(), minlength=7).double() / 12) <= TOLERANCE
    assert B.shape == (2, 2) and "diagonal" not in found["0.weight"].assumption


# Laws.

SOME = (
    "linear", "linear_rank4", "position_table", "attention", "conv2d", "conv2d_groups", "conv_transpose2d",
    "layer_norm", "einsum_mixer", "einsum_quadratic", "reused_convolution", "embedding_tied", "weight_low_rank",
    "bilinear",
)  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", ["KFLR", "KFRA"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SOME], ids=str)
def test_every_limit_keeps_the_trace(case: Case, kind: str) -> None:
    """And no dense factor has more rows than the limit."""
    problem = case.build()
    whole = run(problem, kind, largest=HUGE)
    for largest in (1, 3):
        got = run(problem, kind, largest=largest)
        assert list(got) == list(whole)
        for name, K in got.items():
            assert error(K.trace(), whole[name].trace()) <= TOLERANCE, name
            assert all(f.shape[-1] <= largest for f, k in zip(K.factors, K.kinds, strict=True) if k is Kind.FULL), name


READS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "first rows": (lambda p: p[:5], (1, 1, 1, 1, 1, 0, 0)),
    "look-up": (lambda p: p[torch.tensor([0, 2, 2, 1, 6])], (1, 1, 2, 0, 0, 0, 1)),
    "embedding": (lambda p: nn.functional.embedding(torch.arange(5), p), (1, 1, 1, 1, 1, 0, 0)),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("read", READS)
def test_positions_that_no_sample_chooses(read: str) -> None:
    """A is the mean over the positions, (1/T) Σ_t, and no 1/N: there is no sum over samples in it."""
    function, counts = READS[read]
    model = lambda x, p: (x + function(p)).tanh().mean(1)  # noqa: E731
    case = with_parameters("read", model, (7, 4), x=(5, 4))
    problem = replace(case, y=classes(4), loss=nn.CrossEntropyLoss, batch=3).build()
    for kind in ("KFLR", "KFRA"):
        (K,) = run(problem, kind).values()
        A = K.factors[0].diag() if K.factors[0].ndim == 1 else K.factors[0]
        assert error(A.diagonal(), torch.tensor(counts).double() / 5) <= TOLERANCE
    if max(counts) == 1:
        (G,) = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y).values()
        (exact,) = run(problem, "KFLR").values()
        assert error(exact.trace(), G.trace()) <= TOLERANCE


AVERAGED = [
    case
    for case in CASES
    if case.name in (*SOME, "lerp", "quotients") and getattr(case.build().loss, "reduction", "mean") == "mean"
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("case", AVERAGED, ids=str)
def test_a_batch_twice_has_the_factors_of_the_batch(case: Case) -> None:
    """Of a loss that averages: every mean over the samples is divided by as many as are summed."""
    problem = case.build()
    twice = replace(problem, x=torch.cat([problem.x, problem.x]), y=torch.cat([problem.y, problem.y]))
    for largest in (HUGE, 2):
        one, two = run(problem, "KFLR", largest=largest), run(twice, "KFLR", largest=largest)
        for name, K in one.items():
            for k, (own, other) in enumerate(zip(K.factors, two[name].factors, strict=True)):
                assert error(other, own) <= TOLERANCE, (name, k)


def test_the_scale_is_in_the_first_axis() -> None:
    """A loss that is four times as large makes F_1 four times as large, and leaves the others."""
    problem = table(4, 3).build()
    (name,) = dict(problem.model.named_parameters())
    larger = lambda output, y: 4 * problem.loss(output, y)  # noqa: E731
    one, four = (
        tn.compute(problem.model, loss, (problem.x, problem.y), [tn.KFLR(largest=4)])["kflr"][name]
        for loss in (problem.loss, larger)
    )
    assert error(four.factors[0], 4 * one.factors[0]) <= TOLERANCE
    assert error(four.factors[1], one.factors[1]) <= TOLERANCE
    assert error(one.factors[1].diagonal().mean(), torch.tensor(1.0, dtype=torch.float64)) <= TOLERANCE


def test_the_default_limit() -> None:
    """A small table is one factor, its whole block; a larger one has its axes; A of a convolution stays whole."""
    assert tn.KFAC().largest == tn.KFLR().largest == tn.KFRA().largest == LARGEST
    rows = LARGEST // SHARE
    for shape, factors in (((15, rows // 15), 1), ((15, rows // 15 + 1), 2)):
        problem = table(*shape).build()
        (K,) = run(problem, "KFLR").values()
        assert len(K.factors) == factors
    wide = Case("wide", lambda: seq(nn.Conv2d(rows // 4, 1, 3), nn.Flatten()), (rows // 4, 3, 3)).build()
    assert [len(f) for f in run(wide, "KFLR")["0.weight"].factors] == [1, 9 * rows // 4]


def test_no_gradient_is_a_block_of_zeros() -> None:
    """Nothing is divided by a trace of zero."""
    problem = table(4, 3).build()
    (name,) = dict(problem.model.named_parameters())
    far = problem.x * 0 + 1e3  # tanh is flat there
    K = tn.compute(problem.model, problem.loss, (far, problem.y), [tn.KFLR(largest=4)])["kflr"][name]
    assert not K.to_dense().any()
    assert error(K.inverse(0.5).to_dense(), 2 * torch.eye(12, dtype=torch.float64)) <= TOLERANCE


# What is done with them.


@pytest.mark.parametrize("largest", [4, 3])
def test_operations(largest: int) -> None:
    """Products, both inverses, pickling and moving averages of a block in its axes."""
    problem = table(3, 4).build()
    (name,) = dict(problem.model.named_parameters())
    K = run(problem, "KFLR", largest=largest)[name]
    full = [f.diag() if f.ndim == 1 else f for f in K.factors]
    want = torch.kron(*full)
    v = torch.randn(3, 4, dtype=torch.float64)
    assert error(K.to_dense(), want) <= TOLERANCE
    assert error(K @ v, (want @ v.flatten()).reshape(3, 4)) <= TOLERANCE
    eye = torch.eye(12, dtype=torch.float64)
    assert error(K.inverse(0.1, tn.Damping.EXACT).to_dense(), torch.linalg.inv(want + 0.1 * eye)) <= TOLERANCE
    assert (K.inverse(0.1).to_dense() > 0).any()
    assert error((K + K).factors[0], 2 * K.factors[0]) <= TOLERANCE
    file = io.BytesIO()
    torch.save(K, file)
    file.seek(0)
    for copy in (pickle.loads(pickle.dumps(K)), torch.load(file)):
        assert torch.equal(copy.to_dense(), K.to_dense()) and copy.assumption == K.assumption


def test_the_source_divides() -> None:
    """The emitted program has the finished factors: nothing is left to be done with them."""
    problem = table(4, 3).build()
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.KFLR(largest=3)])
    assert "over_mean_diagonal(" in program.source
    rows = {row.what for row in tn.verify(program, problem.x, problem.y).rows}
    assert "kflr" in rows


REFUSED: tuple[tuple[Callable[[], object], str], ...] = (
    (lambda: tn.KFAC(largest=0), "largest=0: a dense factor has at least one row"),
    (lambda: tn.KFLR(largest=2.0), "largest=2.0 is float, not int"),
    (lambda: tn.KFRA(strict=1), "strict=1 is int, not bool"),
)


@pytest.mark.parametrize("build, message", REFUSED)
def test_options_that_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(tn.InputError, match=message):
        build()


# A parameter without factors.

UNLIKE_USES = ("tied_transposed", "embedding_tied", "vector_products", "lerp", "quotients", "weight_normalized")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", ["kflr", "sampled", "empirical"])
@pytest.mark.parametrize("name", UNLIKE_USES)
def test_no_factors_is_the_diagonal(name: str, kind: str) -> None:
    """That of the GGN of the same columns; all other parameters have what they have in any other model."""
    problem = next(case for case in CASES if case.name == name).build()
    quantity, options = KINDS[kind]
    diagonal = {"kflr": tn.DiagGGN("diag"), "sampled": tn.DiagGGNMC("diag", mc_samples=2)}.get(kind)
    quantities = [make(quantity, name="own", **options), *([diagonal] if diagonal else [])]
    result = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)(problem.x, problem.y, seed=0)
    alone = [name for name, K in result["own"].items() if "no Kronecker factors" in K.assumption]
    assert alone
    assert list(result["own"]) == [name for name, _ in problem.model.named_parameters()]
    for parameter in alone:
        K = result["own"][parameter]
        (factor,) = K.factors
        assert K.kinds == (Kind.DIAGONAL,) and "the diagonal of the block" in K.assumption
        want = result["diag"][parameter] if diagonal else (
            oracle_second.empirical_fisher(problem.model, problem.loss, problem.x, problem.y)[parameter].diagonal()
        )  # fmt: skip
        assert error(factor, want.flatten()) <= TOLERANCE
        v = torch.randn_like(want.reshape(K.shape))
        assert error(K @ v, want.reshape(K.shape) * v) <= TOLERANCE
        assert error(K.inverse(0.1) @ v, v / (want.reshape(K.shape) + 0.1)) <= TOLERANCE


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", UNLIKE_USES)
def test_verified(name: str) -> None:
    """By the definitions of `tn.verify`, which are made of single lines, in a program with every kind of factors."""
    problem = next(case for case in CASES if case.name == name).build()
    quantities = [make(kind, name=key, **options) for key, (kind, options) in KINDS.items()]
    small = [make(kind, name=f"{kind}2", largest=2) for kind in ("KFLR", "KFRA")]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [*quantities, *small])
    found = {row.what for row in tn.verify(program, problem.x, problem.y).rows}
    assert found >= {*KINDS, "KFLR2", "KFRA2"}


def test_strict_refuses() -> None:
    problem = next(case for case in CASES if case.name == "tied_transposed").build()
    for kind in ("KFLR", "KFAC", "KFRA"):
        with pytest.raises(tn.UnsupportedError, match=r"'\w+.*different Kronecker structure[\s\S]*strict=False"):
            run(problem, kind, strict=True)
    assert DIFFERENT < max(error(K.to_dense(), K.to_dense().T * 0) for K in run(problem, "KFLR").values())


class Gate(nn.Module):
    """One factor for each element: blocks of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate[:, 0]


def test_what_is_turned_has_a_basis() -> None:
    model, x, y = nn.Sequential(Gate(), nn.Linear(4, 3)).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    K = tn.compute(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR(), tn.DiagGGN()])
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.RotatedSecondMoment()])
    bases = tn.RotatedSecondMoment.bases({name: each.eigh() for name, each in K["kflr"].items()})
    assert {key: set(by) for key, by in bases.items()} == {key: set(by) for key, by in program.operands.items()}
    torch.testing.assert_close(
        program(x, y, operands=bases)["rotated_second_moment"]["0.gate"], K["diag_ggn"]["0.gate"]
    )
