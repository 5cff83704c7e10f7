"""KroneckerFactors: every operation against the dense block, built here with torch.kron and torch.block_diag."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tnbackprop.errors import InputError
from tnbackprop.linalg import Damping, Eigen, Kind, KroneckerFactors, Layout, Spectral

from ..kronecker import (
    DIAGONAL,
    EMBEDDING,
    FULL,
    GROUPED,
    LINEAR,
    LOW_RANK,
    ONE,
    SHAPES,
    THREE,
    Shape,
    assemble,
    close,
    factors,
    identity,
    matrices,
    vectors,
)  # fmt: skip

SINGULAR = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)


@pytest.fixture(params=SHAPES, ids=str)
def K(request: pytest.FixtureRequest) -> KroneckerFactors:
    return factors(request.param)


@pytest.fixture
def dense(K: KroneckerFactors) -> Tensor:
    return assemble(K, list(matrices(K)))


# --- every operation against the dense block ---


def test_to_dense(K: KroneckerFactors, dense: Tensor) -> None:
    close(K.to_dense(), dense)
    close(super(KroneckerFactors, K).to_dense(), dense)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)], ids=str)
def test_matvec(K: KroneckerFactors, dense: Tensor, batch: tuple[int, ...]) -> None:
    v = vectors(K, *batch)
    want = (v.reshape(-1, len(dense)) @ dense).reshape(v.shape)
    close(K.matvec(v), want)
    close(K @ v, want)


def test_matvec_of_no_vectors_and_of_a_strided_one(K: KroneckerFactors, dense: Tensor) -> None:
    assert (K @ vectors(K, 2, 0)).shape == (2, 0, *K.shape)
    v = torch.randn((*reversed(K.shape), 2), dtype=torch.float64).permute(*reversed(range(len(K.shape) + 1)))
    close(K @ v, (v.reshape(2, -1) @ dense).reshape(v.shape))


def test_scalars(K: KroneckerFactors, dense: Tensor) -> None:
    close(K.trace(), dense.trace())
    close(K.norm(), torch.linalg.matrix_norm(dense))
    close(K.logdet(), torch.linalg.slogdet(dense).logabsdet)
    close(K.logdet(0.3), torch.linalg.slogdet(dense + 0.3 * identity(len(dense))).logabsdet)


def test_eigh(K: KroneckerFactors, dense: Tensor) -> None:
    eigen = K.eigh()
    assert isinstance(eigen, Eigen)
    for factor, kind, value, q in zip(K.factors, K.kinds, eigen.values, eigen.vectors, strict=True):
        if kind is DIAGONAL:
            assert q is None and torch.equal(value, factor)
        elif kind is FULL:
            assert q is not None
            close(q @ value.diag_embed() @ q.mT, factor)
    close(eigen.spectrum().flatten().sort().values, torch.linalg.eigvalsh(dense))


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_exact_inverse(K: KroneckerFactors, dense: Tensor, damping: float) -> None:
    want = torch.linalg.inv(dense + damping * identity(len(dense)))
    inverse, v = K.inverse(damping, Damping.EXACT), vectors(K, 2)
    close(inverse.to_dense(), want)
    close(inverse @ v, (v.reshape(2, -1) @ want).reshape(v.shape))
    shared = K.eigh().inverse(damping)
    close(shared.to_dense(), want)
    close(shared.trace(), want.trace())
    close(shared.logdet(), torch.linalg.slogdet(want).logabsdet)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_factored_inverse(K: KroneckerFactors, damping: float) -> None:
    """Against the formula of the docstring, block by block, and for two factors against the paper's π."""
    blocks = []
    for block in matrices(K):
        means = [float(f.trace()) / len(f) for f in block]
        ratios = [mean / math.prod(means) ** (1 / len(means)) for mean in means]
        if len(block) == 2:
            pi = math.sqrt(means[0] / means[1])
            assert ratios == pytest.approx([pi, 1 / pi])
        shifts = [ratio * damping ** (1 / len(block)) for ratio in ratios]
        blocks.append([torch.linalg.inv(f + s * identity(len(f))) for f, s in zip(block, shifts, strict=True)])
    inverse, want, v = K.inverse(damping), assemble(K, blocks), vectors(K, 2)
    assert isinstance(inverse, Spectral if LOW_RANK in K.kinds else KroneckerFactors)
    close(inverse.to_dense(), want)
    close(inverse.matvec(v), (v.reshape(2, -1) @ want).reshape(v.shape))
    close(inverse.logdet(), torch.linalg.slogdet(want).logabsdet)


@pytest.mark.parametrize("c", [0.5, 3, torch.tensor(2.0)], ids=str)
def test_scale(K: KroneckerFactors, dense: Tensor, c: float | Tensor) -> None:
    for scaled in (c * K, K * c, K.scale(c)):
        assert isinstance(scaled, KroneckerFactors)
        close(scaled.to_dense(), float(c) * dense)
        assert not {f.data_ptr() for f in scaled.factors} & {f.data_ptr() for f in K.factors}
    assert not (0 * K).to_dense().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_addition_and_moving_average_act_on_the_factors(shape: Shape) -> None:
    one, two = factors(shape, 1), factors(shape, 2)
    for got, weights in ((one + two, (1.0, 1.0)), (one.ema(two, 0.9), (0.9, 0.1))):
        for found, firsts, seconds in zip(matrices(got), matrices(one), matrices(two), strict=True):
            for factor, a, b in zip(found, firsts, seconds, strict=True):
                close(factor, weights[0] * a + weights[1] * b)
        assert (got.parameter, got.kinds, got.layout) == (one.parameter, one.kinds, one.layout)
        assert got.assumption == "tied positions"


def test_addition_of_factors_is_not_the_sum_of_blocks() -> None:
    one, two = factors(LINEAR, 1), factors(LINEAR, 2)
    assert not torch.allclose((one + two).to_dense(), one.to_dense() + two.to_dense())
    single = [factors(ONE, seed) for seed in (1, 2)]
    close((single[0] + single[1]).to_dense(), single[0].to_dense() + single[1].to_dense())


# --- the two dampings ---


def test_dampings_agree_for_one_factor_and_differ_for_two() -> None:
    one, two = factors(ONE), factors(LINEAR)
    close(one.inverse(0.3).to_dense(), one.inverse(0.3, Damping.EXACT).to_dense())
    assert not torch.allclose(two.inverse(0.3).to_dense(), two.inverse(0.3, Damping.EXACT).to_dense(), rtol=1e-3)


def test_factored_damping_does_not_see_where_the_scale_sits() -> None:
    """The reason for π: (cB) ⊗ (A/c) is the same block and gets the same inverse."""
    K = factors(THREE)
    moved = KroneckerFactors((1e3 * K.factors[0], K.factors[1], K.factors[2] / 1e3), K.parameter)
    close(moved.inverse(0.1).to_dense(), K.inverse(0.1).to_dense())


@pytest.mark.parametrize("mode", Damping)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("zero", [(0,), (1,), (0, 1)], ids=str)
def test_zero_block(mode: Damping, dtype: torch.dtype, zero: tuple[int, ...]) -> None:
    """A perfectly fitted batch, or a dead layer: K = 0, the inverse is I/λ; the neighbouring block keeps its own."""
    K = factors(Shape("two blocks", (2, 2, 3), (2, 3), (), 2), dtype=dtype)
    regular = K.inverse(0.25, mode).to_dense()[6:, 6:]
    for i in zero:
        K.factors[i][0] = 0
    inverse = K.inverse(0.25, mode).to_dense()
    close(inverse[:6, :6], 4 * torch.eye(6, dtype=dtype), 1e-6)
    close(inverse[6:, 6:], regular, 1e-5)


def test_factored_inverse_of_a_zero_block_is_the_limit() -> None:
    K = factors(LINEAR)
    close(K.scale(1e-18).inverse(0.25).to_dense(), K.scale(0.0).inverse(0.25).to_dense(), 1e-7)


@pytest.mark.parametrize("mode", Damping)
def test_rank_deficient_with_damping(mode: Damping) -> None:
    K = KroneckerFactors((SINGULAR, SINGULAR), (2, 2))
    want = {
        Damping.EXACT: torch.linalg.inv(torch.kron(SINGULAR, SINGULAR) + 0.01 * identity(4)),
        Damping.FACTORED: torch.kron(*[torch.linalg.inv(SINGULAR + 0.1 * identity(2))] * 2),
    }
    close(K.inverse(0.01, mode).to_dense(), want[mode])
    close(K.logdet(0.01), torch.tensor(3 * math.log(0.01) + math.log(4.01), dtype=torch.float64))


# --- dtypes ---


@pytest.mark.parametrize("mode", Damping)
def test_float32(K: KroneckerFactors, mode: Damping) -> None:
    single, v = K.to(torch.float32), vectors(K)
    assert single.dtype == torch.float32
    close((single @ v.float()).double(), K @ v, 1e-5)
    close((single.inverse(0.1, mode) @ v.float()).double(), K.inverse(0.1, mode) @ v, 1e-4)
    close(single.logdet(0.1).double(), K.logdet(0.1), 1e-4)


def test_float32_products_may_leave_the_range() -> None:
    """Factors of 1e-30 and 1e-30: the block underflows, its factors and their logarithms do not."""
    tiny = KroneckerFactors((1e-30 * torch.eye(2), 1e-30 * torch.eye(3)), (2, 3))
    close(tiny.logdet(), torch.tensor(6 * math.log(1e-60)), 1e-5)
    close(tiny.inverse(1e-2).to_dense(), 100 * torch.eye(6), 1e-5)


def test_bfloat16_multiplies_but_does_not_decompose() -> None:
    K = factors(LINEAR).to(torch.bfloat16)
    assert (K @ torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for mode in Damping:
        with pytest.raises(InputError, match=r"factor 0 .*bfloat16.*no decompositions.*\.to\(torch\.float32\)"):
            K.inverse(1.0, mode)


def test_to_and_repr() -> None:
    K = factors(GROUPED)
    moved = K.to(torch.float32, device="cpu")
    assert moved.dtype == torch.float32 and moved.device == torch.device("cpu") and K.dtype == torch.float64
    assert K.to("cpu").dtype == torch.float64
    assert repr(K) == (
        f"KroneckerFactors(w [6, 2, 2]: 3 blocks of full 2×2 ⊗ full 4×4, trace {K.trace().item():.4g}, "
        "torch.float64 on cpu, assumption: tied positions)"
    )
    assert "diagonal 5×5 ⊗ full 3×3" in repr(factors(EMBEDDING))
    assert "assumption: not stated" in repr(KroneckerFactors((torch.eye(2),), (2,)))
    assert "tied positions; inverse, factored damping 0.1" in repr(K.inverse(0.1))
    assert "3 blocks of 2×4, damping 0.1" in repr(K.inverse(0.1, Damping.EXACT))


# --- what is refused, and how it reads ---

EYE2, EYE3 = identity(2), identity(3)
PAIR = KroneckerFactors((EYE2, EYE3), (2, 3), name="w")
INDEFINITE = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))


def one(factor: Tensor, kind: Kind = FULL) -> KroneckerFactors:
    return KroneckerFactors((factor,), (factor.shape[0],), (kind,), name="w")


def pair(first: Tensor, second: Tensor, *parameter: int, layout: Layout | None = None) -> KroneckerFactors:
    return KroneckerFactors((first, second), parameter, layout=layout, name="w")


REFUSED: tuple[tuple[str, Callable[[], object], str], ...] = (
    ("no factors", lambda: KroneckerFactors((), (2,)), "0 factors and 0 kinds and 0 roles; give at least one"),
    ("kinds", lambda: KroneckerFactors((EYE2,), (2,), (FULL, FULL)), "1 factors and 2 kinds"),
    ("elements", lambda: pair(EYE2, EYE3, 2, 4), r"'w' \[2, 4\]: 1 block.* make 6 elements, the parameter has 8"),
    ("not square", lambda: one(torch.ones(2, 3)), r"factor 0 \(full \[2, 3\]\): a full factor has shape \[d, d\]"),
    ("kind", lambda: one(torch.ones(2)), r"factor 0 \(full \[2\]\): a full factor"),
    ("empty", lambda: one(torch.ones(0, 0)), "without empty axes"),
    ("integers", lambda: one(torch.ones(2, 2, dtype=torch.int64)), "int64 on cpu; all factors are of one real"),
    ("complex", lambda: one(torch.ones(2, 2, dtype=torch.complex64)), "complex64"),
    ("dtypes", lambda: pair(EYE2, EYE3.float(), 2, 3), "factor 1 .*float32"),
    ("block axis", lambda: pair(EYE2.expand(3, 2, 2), EYE2, 3, 2, 2), "give all of them the block axis"),
    ("block sizes", lambda: pair(EYE2.expand(3, 2, 2), EYE2.expand(2, 2, 2), 3, 2, 2), "leading axis"),
    ("layout twice", lambda: Layout((2, 3), ((0,), (0,))), "at most once"),
    ("layout range", lambda: Layout((2, 3), ((0,), (2,))), "positions 0 to 1"),
    (
        "layout sizes",
        lambda: pair(EYE2, EYE3, 3, 2, layout=Layout((3, 2), ((0,), (1,)))),
        r"layout has 1 blocks of sizes \[3, 2\], the factors have 1 of sizes \[2, 3\]",
    ),
    ("vector", lambda: PAIR @ torch.ones(3, 2), r"'w' \[2, 3\]: the vector has shape \[3, 2\]; give one of shape"),
    ("flat vector", lambda: PAIR @ torch.ones(6), r"the vector has shape \[6\]"),
    ("vector's dtype", lambda: PAIR @ torch.ones(2, 3), r"float32 on cpu, the factors are torch.float64.*\.to"),
    ("inverse's vector", lambda: PAIR.inverse(1.0, Damping.EXACT) @ torch.ones(6), "inverse of Kronecker .*'w'"),
    ("negative damping", lambda: PAIR.inverse(-1.0), "'w' .*the damping -1.0 is not a finite number ≥ 0"),
    ("nan damping", lambda: PAIR.logdet(math.nan), "damping nan"),
    ("mode", lambda: PAIR.inverse(1.0, "exact"), "'exact' is none of Damping.FACTORED and"),  # type: ignore[arg-type]
    ("singular", lambda: one(SINGULAR).inverse(0.0), "factor 0 is singular: rank 1 of 2 in block 0; give a positive"),
    ("singular, exact", lambda: one(SINGULAR).inverse(0.0, Damping.EXACT), "rank 1 of 2"),
    ("singular, float32", lambda: one(SINGULAR.float()).inverse(0.0), "rank 1 of 2"),
    ("singular, logdet", lambda: one(SINGULAR).logdet(), "rank 1 of 2"),
    ("zero", lambda: (0.0 * PAIR).inverse(0.0), "factor 0 is singular: rank 0 of 2"),
    ("absent word", lambda: one(torch.tensor([1.0, 0.0]), DIAGONAL).inverse(0.0), "rank 1 of 2"),
    ("later block", lambda: KroneckerFactors((torch.stack([EYE2, SINGULAR]),), (4,)).inverse(0.0), "2 in block 1"),
    ("indefinite", lambda: one(INDEFINITE + 0.1 * EYE2).eigh(), "not positive semi-.* begin at -0.9 and end at 1.1"),
    ("indefinite, factored", lambda: one(INDEFINITE).inverse(0.1), "not zero and its trace is 0"),
    ("indefinite, damped", lambda: one(INDEFINITE + 0.1 * EYE2).inverse(0.1), "is not positive definite in"),
    ("negative diagonal", lambda: one(torch.tensor([2.0, -1e-3]), DIAGONAL).eigh(), "begin at -0.001"),
    (
        "negative diagonal, factored",
        lambda: one(torch.tensor([2.0, -1.0]), DIAGONAL).inverse(0.5),
        "damped by 0.5 in block 0, is not positive definite",
    ),
    ("not symmetric", lambda: one(torch.tensor([[1.0, 0.5], [0.0, 1.0]])).eigh(), r"not symmetric; give \(F \+ F.mT\)"),
    ("not finite", lambda: one(EYE2 * math.nan).inverse(1.0), "not finite"),
    ("overflow", lambda: one(0 * EYE2.float()).inverse(1e-40, Damping.EXACT), r"overflows torch.float32.*float64"),
    ("scale", lambda: PAIR * -1.0, "the scale -1.0 is not a finite number ≥ 0"),
    ("scale's shape", lambda: PAIR * torch.ones(2), r"the scale has shape \[2\]; give one number"),
    ("decay", lambda: PAIR.ema(PAIR, 1.5), "decay 1.5 is not between 0 and 1"),
    ("other parameter", lambda: PAIR + pair(EYE2, EYE3, 6), r"parameter \(2, 3\) and \(6,\) differ"),
    ("other assumption", lambda: PAIR + KroneckerFactors((EYE2, EYE3), (2, 3), (), "reduce"), "assumption .* differ"),
    ("other dtype", lambda: PAIR.ema(PAIR.to(torch.float32), 0.5), "dtype .* differ"),
    ("other kinds", lambda: PAIR + KroneckerFactors((EYE2, EYE3[0]), (2, 3), (FULL, DIAGONAL)), "kinds .* differ"),
)  # fmt: skip


@pytest.mark.parametrize(("attempt", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(attempt: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attempt()


def test_other_types_are_python_s_own_type_errors() -> None:
    with pytest.raises(TypeError):
        PAIR + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        PAIR * "2"  # type: ignore[operator]
