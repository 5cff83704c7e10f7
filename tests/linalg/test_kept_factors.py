"""Kronecker factors as values that are kept: powers, draws, eigenvalues of one's own, low rank, memory, saving."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tnbackprop as tn
from tnbackprop.errors import InputError
from tnbackprop.linalg import Damping, Kind, KroneckerFactors, Role, Spectral, Template

from ..kronecker import EMBEDDING, GROUPED, LINEAR, LOW_RANK, SHAPES, Shape, close, factors, identity, vectors

THIN = (
    Shape("thin", (5, 4), (5, 4), (LOW_RANK, Kind.FULL)),
    Shape("both thin", (5, 4), (5, 4), (LOW_RANK, LOW_RANK)),
    Shape("thin in groups", (2, 5, 4), (5, 4), (Kind.DIAGONAL, LOW_RANK), 2),
)
"""U [d, 2] in place of [d, d + 2]."""


def build(shape: Shape, seed: int = 0) -> KroneckerFactors:
    """The factors of a row; those of low rank with two columns where the row is one of `THIN`."""
    K = factors(shape, seed)
    thin = shape in THIN
    cut = tuple(f[..., :2] if thin and k is LOW_RANK else f for f, k in zip(K.factors, K.kinds, strict=True))
    return replace(K, factors=cut)


@pytest.fixture(params=(*SHAPES, *THIN), ids=str)
def K(request: pytest.FixtureRequest) -> KroneckerFactors:
    return build(request.param)


def power(matrix: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).pow(p).diag_embed() @ vectors.mT


# Powers, draws, solving.


@pytest.mark.parametrize(("p", "damping"), [(0.5, 0.0), (-0.5, 0.1), (-1.0, 0.3), (-0.25, 2.0), (1.5, 0.0)])
def test_power(K: KroneckerFactors, p: float, damping: float) -> None:
    dense = K.to_dense()
    want, found = power(dense + damping * identity(len(dense)), p), K.power(p, damping)
    if damping == 0 and not K.eigh().spectrum().all():  # the root of a zero eigenvalue is that of its rounding
        return close(found.power(1 / p).to_dense(), dense)
    close(found.to_dense(), want)
    close(found.trace(), want.trace())
    close(found.norm(), torch.linalg.matrix_norm(want))
    v = vectors(K, 2)
    close(found @ v, (v.reshape(2, -1) @ want).reshape(v.shape))
    close(found.power(-2.0, 0.1).to_dense(), torch.linalg.inv(want + 0.1 * identity(len(want))) @ torch.linalg.inv(
        want + 0.1 * identity(len(want))))  # fmt: skip


@pytest.mark.parametrize("mode", Damping)
def test_solve(K: KroneckerFactors, mode: Damping) -> None:
    b = vectors(K, 3)
    close(K.solve(b, 0.2, mode), K.inverse(0.2, mode) @ b)
    if mode is Damping.EXACT:
        x = K.solve(b, 0.2, mode)
        close(K @ x + 0.2 * x, b)


def test_draws_have_the_matrix_as_their_covariance(K: KroneckerFactors) -> None:
    """A draw is S z with z that torch draws, and S Sᵀ is the matrix: of factors, and of a damped inverse."""
    inverse = K.inverse(0.5, Damping.EXACT)
    assert isinstance(inverse, Spectral)
    for drawn in (K, inverse):
        S = drawn.sqrt().to_dense()
        close(S @ S.mT, drawn.to_dense())
        found = drawn.sample(torch.Generator().manual_seed(3), (2, 3))
        z = torch.randn(2, 3, *K.shape, dtype=K.dtype, generator=torch.Generator().manual_seed(3))
        close(found, (z.reshape(6, -1) @ S).reshape(z.shape))
    assert K.sample().shape == K.shape


# Low rank.


@pytest.mark.parametrize("shape", THIN, ids=str)
def test_low_rank(shape: Shape) -> None:
    """Against the same factors stored whole, which are singular; the inverse is the formula of Woodbury."""
    K = build(shape)
    whole = K.as_full()
    assert {*whole.kinds} == {Kind.FULL}
    close(whole.to_dense(), K.to_dense())
    close(K.trace(), whole.trace())
    close(K.norm(), whole.norm())
    close(K.logdet(0.3), whole.logdet(0.3))
    close(K.eigh().spectrum().flatten().sort().values + 1, whole.eigh().spectrum().flatten().sort().values + 1)
    for mode in Damping:
        close(K.inverse(0.3, mode).to_dense(), whole.inverse(0.3, mode).to_dense())
        with pytest.raises(InputError, match=r"factor \d is singular: rank 2 of .* positive damping"):
            K.inverse(0.0, mode)
    close((K + build(shape, 1)).to_dense(), (whole + build(shape, 1).as_full()).to_dense())


def test_woodbury() -> None:
    U = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K = KroneckerFactors((U,), (6,), (LOW_RANK,))
    want = (identity(6) - U @ torch.linalg.inv(0.1 * identity(2) + U.mT @ U) @ U.mT) / 0.1
    for mode in Damping:
        close(K.inverse(0.1, mode).to_dense(), want)


def test_a_low_rank_that_is_not_reached() -> None:
    """Two equal columns, a zero one, and no number at all: the basis stays orthogonal."""
    column = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for U in (torch.cat([column, column, 0 * column], 1), torch.zeros(5, 2, dtype=torch.float64)):
        K = KroneckerFactors((U,), (5,), (LOW_RANK,))
        close(K.inverse(0.5, Damping.EXACT).to_dense(), torch.linalg.inv(U @ U.mT + 0.5 * identity(5)))


# Eigenvalues of one's own.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ekfac(shape: Shape) -> None:
    """The diagonal of Qᵀ G Q is the best for a matrix G, and what is made of it is that of the dense matrix."""
    K = build(shape)
    eigen, size = K.eigh(), K.space.size
    Q = eigen.from_eigenbasis(identity(size).reshape(size, *K.shape)).reshape(size, size).mT
    close(Q.mT @ Q, identity(size))
    close(eigen.to_eigenbasis(vectors(K, 2)).reshape(2, -1), vectors(K, 2).reshape(2, -1) @ Q)
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    G = root @ root.mT
    corrected = eigen.with_eigenvalues((Q.mT @ G @ Q).diagonal().reshape(K.shape))
    want = Q @ (Q.mT @ G @ Q).diagonal().diag_embed() @ Q.mT
    close(corrected.to_dense(), want)
    best = torch.linalg.matrix_norm(G - want)
    assert best <= torch.linalg.matrix_norm(G - K.to_dense())
    other = eigen.with_eigenvalues(corrected.eigen.to_eigenbasis(torch.ones(K.shape).double()) ** 2)
    assert best <= torch.linalg.matrix_norm(G - other.to_dense())
    close(corrected.inverse(0.1).to_dense(), torch.linalg.inv(want + 0.1 * identity(size)))
    close(corrected.power(-0.5, 0.1).to_dense(), power(want + 0.1 * identity(size), -0.5))
    close(corrected.logdet(0.1), torch.linalg.slogdet(want + 0.1 * identity(size)).logabsdet)
    close(corrected.trace(), G.trace())


def test_ekfac_of_a_layer() -> None:
    """With exact second moments in the eigenbasis it is nearer to the block of the GGN than B ⊗ A."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(7, 4).double(), torch.randint(2, (7,))
    result = tn.compute(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR(), tn.SqrtGGN()])
    K, V = result["kflr"]["0.weight"], result["sqrt_ggn"]["0.weight"]
    rows = V.reshape(-1, V[0, 0].numel())
    G = rows.mT @ rows
    eigen = K.eigh()
    corrected = eigen.with_eigenvalues(eigen.to_eigenbasis(V).square().sum((0, 1)))
    gaps = [float(torch.linalg.matrix_norm(G - M.to_dense())) for M in (corrected, K)]
    assert gaps[0] < 0.95 * gaps[1]
    close(corrected.trace(), G.trace())


# In place, and memory of one's own.


class NothingNew(TorchDispatchMode):
    """Every operation gives one of its arguments back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        assert any(found is each for each in args), func
        return found


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if LOW_RANK not in shape.kinds], ids=str)
def test_moving_average_in_place(shape: Shape) -> None:
    K, new = factors(shape), factors(shape, 1)
    want, places = K.ema(new, 0.9), [f.data_ptr() for f in K.factors]
    with NothingNew():
        assert K.ema_(new, 0.9) is K and K.ema_(K, 0.5) is K
    close(K.to_dense(), want.to_dense())
    assert [f.data_ptr() for f in K.factors] == places


def test_nothing_that_is_made_shares_memory() -> None:
    K = factors(EMBEDDING)
    before = K.clone()
    for other in (2 * K, K / 2, K + K, K.ema(K, 0.5), K.clone(), K.as_full(), K.inverse(0.1),
                  KroneckerFactors.from_state_dict(K.state_dict())):  # fmt: skip
        assert isinstance(other, KroneckerFactors)
        for factor in other.factors:
            factor.fill_(7.0)
    values = K.eigh().values
    [value.fill_(7.0) for value in values]
    assert all(torch.equal(a, b) for a, b in zip(K.factors, before.factors, strict=True))
    assert K.to(torch.float64) is K and K.to(torch.float32) is not K


def test_moved(K: KroneckerFactors) -> None:
    """Decomposed in float64, multiplied in float32."""
    for made in (K.power(-0.5, 0.1), K.inverse(0.1)):
        single = made.to(torch.float32)
        assert single.dtype == torch.float32 and made.dtype == torch.float64
        close((single @ vectors(K).float()).double(), made @ vectors(K), 1e-5)
    close(K.eigh().to(torch.float32).inverse(0.1).to_dense().double(), K.inverse(0.1, Damping.EXACT).to_dense(), 1e-4)


# What is left without the tensors, and saving.


def test_template(K: KroneckerFactors) -> None:
    again = K.template.of(K.tensors())
    assert torch.equal(again.to_dense(), K.to_dense()) and again.template == K.template
    assert {K.template: 1}[again.template] == 1 and isinstance(K.template, Template)
    assert replace(K, name="other").template != K.template


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_saved(K: KroneckerFactors) -> None:
    """As it is, and as a dict that names nothing of this library."""
    state = saved(K.state_dict())
    kept = {type(each) for each in torch.utils._pytree.tree_leaves(state)}
    assert kept <= {str, int, Tensor, type(None)}
    for again in (saved(K), KroneckerFactors.from_state_dict(state)):
        assert again.template == K.template
        assert all(torch.equal(a, b) for a, b in zip(again.factors, K.factors, strict=True))
    other = K.ema(K, 0.5) if LOW_RANK not in K.kinds else K.clone()
    [factor.zero_() for factor in other.factors]
    places = [factor.data_ptr() for factor in other.factors]
    other.load_state_dict(K.to(torch.float32).state_dict())
    close(other.to_dense(), K.to_dense(), 1e-6)
    other.load_state_dict(state)
    assert torch.equal(other.to_dense(), K.to_dense()) and [f.data_ptr() for f in other.factors] == places
    assert torch.equal(saved(K.power(-0.5, 0.1)).to_dense(), K.power(-0.5, 0.1).to_dense())
    assert saved(K.template) == K.template


# Where float32 does not do.


def no_float32(function: Callable[..., Any], answer: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(matrix: Tensor, *args: Any, **options: Any) -> Any:
        found = function(matrix, *args, **options)
        return found if matrix.dtype == torch.float64 else answer(found)

    return run


@pytest.mark.parametrize("shape", (LINEAR, GROUPED, *SHAPES[-5:-3]), ids=str)
def test_float64_at_need(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Cholesky decomposition that fails for one block, and an eigendecomposition that does not converge."""
    K = factors(shape, dtype=torch.float32)
    want = {mode: factors(shape).inverse(0.1, mode).to_dense() for mode in Damping}

    def failed(found: Any) -> Any:
        found.L.fill_(torch.nan)
        found.info.view(-1)[-1] = 2
        return found

    def diverged(found: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", no_float32(torch.linalg.cholesky_ex, failed))
    monkeypatch.setattr(torch.linalg, "eigh", no_float32(torch.linalg.eigh, diverged))
    for mode in Damping:
        inverse = K.inverse(0.1, mode)
        assert inverse.dtype == torch.float32
        close(inverse.to_dense().double(), want[mode], 1e-4)


def test_ill_conditioned_in_float32() -> None:
    """Never inf or nan: right to the condition number, or refused with it."""
    generator, refused = torch.Generator().manual_seed(0), 0
    for exponent in torch.linspace(-4, -12, 30):
        Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
        F = (Q * torch.logspace(0, float(exponent), 6, dtype=torch.float64)) @ Q.mT
        K = KroneckerFactors(((F + F.mT).float() / 2,), (6,), name="w")
        damped = K.factors[0].double() + 1e-10 * identity(6)
        low = float(torch.linalg.eigvalsh(damped)[0])
        try:
            found = K.inverse(1e-10)
        except InputError as error:
            refused += 1
            assert "'w' [6]: factor 0 (full [6, 6]), damped by 1e-10 in block 0, is not positive def" in str(error)
            assert low < 1e-15
            continue
        close(found.to_dense().double(), torch.linalg.inv(damped), min(1e-6 / low, 0.1))
    assert 3 < refused < 27


# What is refused.

PAIR = KroneckerFactors((identity(2), identity(3)), (2, 3), name="w", roles=(Role.LOSS, Role.INPUT))
THIN_PAIR = KroneckerFactors((torch.ones(3, 1, dtype=torch.float64),), (3,), (LOW_RANK,), name="w")
BAD = torch.diag(torch.tensor([1.0, 0.5, -0.75], dtype=torch.float64))
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "difference": (lambda: PAIR - PAIR, r"'w' \[2, 3\]: a difference is no product.*subtract the products"),
    "shift": (lambda: PAIR - 1.0, "K.inverse.damping"),
    "negative": (lambda: -PAIR, "negate the product"),
    "product": (lambda: PAIR * PAIR, r"a product of two blocks is no product.*K @ \(L @ v\)"),
    "matrix product": (lambda: PAIR @ PAIR, r"not symmetric.*K @ \(L @ v\)"),
    "quotient": (lambda: PAIR / PAIR, r"L.solve\(K @ v, damping\)"),
    "reciprocal": (lambda: 1.0 / PAIR, r"K.inverse\(damping\)"),
    "over zero": (lambda: PAIR / 0.0, "the divisor 0.0 is not a finite number > 0"),
    "over several": (lambda: PAIR / torch.ones(2), r"divisor has shape \[2\]; give one number"),
    "average in place": (lambda: THIN_PAIR.ema_(THIN_PAIR, 0.5), r"higher rank.*K\.ema\(other, decay\).*as_full"),
    "average of another": (lambda: PAIR.ema_(PAIR.to(torch.float32), 0.5), "dtype .* differ"),
    "other roles": (lambda: PAIR + replace(PAIR, roles=()), r"roles \['B', 'A'\] and \['F1', 'F2'\] differ"),
    "roles": (lambda: replace(PAIR, roles=(Role.LOSS,)), "2 kinds and 1 roles"),
    "singular power": (lambda: (0.0 * PAIR).power(-0.5), "factor 0 is singular: rank 0 of 2"),
    "no vector": (lambda: PAIR @ [1.0], "the vector is a list; give a torch.Tensor"),
    "no damping": (lambda: PAIR.inverse(None), "the damping None is not a number"),
    "a text for a power": (lambda: PAIR.power("-1"), "the power '-1' is not a number"),
    "two dampings": (lambda: PAIR.logdet(torch.ones(2)), r"the damping has shape \[2\]; give one number"),
    "no decay": (lambda: PAIR.ema_(PAIR, None), "the decay None is not a number"),
    "an average with a number": (lambda: PAIR.ema(3, 0.5), "a int is not of this kind; give a KroneckerFactors"),
    "a seed for a generator": (lambda: PAIR.sample(3), "the generator 3 is none; give a torch.Generator"),
    "infinite power": (lambda: PAIR.power(float("inf")), "the power inf is not a finite number"),
    "large": (lambda: PAIR.power(2e3, 1.0), r"\(largest .* overflows torch.float64; take a smaller power$"),
    "overflow": (lambda: (1e-30 * PAIR.to(torch.float32)).power(-3.0), r"to the power -3 overflows torch.float32"),
    "singular form": (lambda: PAIR.eigh().with_eigenvalues(0 * PAIR.eigh().spectrum()[0]).inverse(), "is singular.*0;"),
    "negative form": (lambda: PAIR.eigh().with_eigenvalues(-torch.ones(2, 3).double()), "begin at -1 .*finite"),
    "form": (lambda: PAIR.eigh().with_eigenvalues(torch.ones(3, 2).double()), r"\[3, 2\] on cpu; give .*\[2, 3\]"),
    "form of low rank": (lambda: THIN_PAIR.eigh().with_eigenvalues(torch.ones(3)), r"low rank, 1 of 3.*K\.as_full\(\)"),
    "basis": (lambda: PAIR.eigh().to_eigenbasis(torch.ones(6)), r"shape \[6\]; give one of shape \[2, 3\]"),
    "condition": (
        lambda: KroneckerFactors((BAD,), (3,), name="w").inverse(0.25),
        r"'w' \[3\]: factor 0 \(full \[3, 3\]\), damped by 0.25 in block 0, is not positive definite in torch.float64 "
        r"\(eigenvalues -0.5 to 1.25, no condition number\); raise the damping 0.25",
    ),
    "state": (lambda: KroneckerFactors.from_state_dict({"factors": []}), "the state of KroneckerFactors has .*'kinds'"),
    "state's kinds": (
        lambda: KroneckerFactors.from_state_dict(PAIR.state_dict() | {"kinds": ["full", "half"]}),
        "kinds has 'half', which is none of",
    ),
    "state of another": (
        lambda: PAIR.load_state_dict(replace(PAIR, parameter=(3, 2)).state_dict()),
        r"parameter \(2, 3\) and \(3, 2\) differ",
    ),
    "nothing to join": (lambda: PAIR.join({"v": identity(2)}), "no value of 'w' to join"),
    "split": (lambda: PAIR.split(identity(2)), r"shape \[2, 2\]; give one of shape \[2, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    attempt, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        attempt()


def test_scalars() -> None:
    K = factors(LINEAR)
    close((K / 4).to_dense(), K.to_dense() / 4)
    close((K / torch.tensor(4.0)).to_dense(), K.to_dense() / 4)
    second = replace(K, roles=(Role.INPUT, Role.LOSS)).scale(3.0)
    assert torch.equal(second.factors[0], K.factors[0]) and torch.equal(second.factors[1], 3 * K.factors[1])


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_norm_of_small_and_large_numbers(scale: float) -> None:
    """Squares of float32 are 0 or infinite where the numbers, and their norm, are not."""
    K = tn.KroneckerFactors((torch.eye(3, dtype=torch.float32) * scale, torch.eye(4, dtype=torch.float32)), (3, 4))
    spectral = K.eigh().with_eigenvalues(torch.full((3, 4), scale))
    for norm in (K.norm(), spectral.norm()):
        assert norm.dtype == torch.float32
        assert abs(float(norm) / (scale * 12**0.5) - 1) < 1e-6


@pytest.mark.parametrize("shape", (*SHAPES, *THIN), ids=str)
def test_autocast_has_no_effect(shape: Shape) -> None:
    """Products of factors are in their own dtype, of every kind, and of what is made of them."""
    K = build(shape).to(torch.float32)
    v, whole = vectors(K, 2).float(), K.as_full().eigh()
    ways: dict[str, Callable[[], Tensor]] = {
        "product": lambda: K @ v,
        "norm": K.norm,
        "dense": K.to_dense,
        "whole": lambda: K.as_full().to_dense(),
        "inverse": lambda: K.inverse(1e-2, Damping.EXACT) @ v,
        "power": lambda: K.power(-0.5, 1e-2) @ v,
        "draw": lambda: K.sample(torch.Generator().manual_seed(0)),
        "basis": lambda: whole.from_eigenbasis(v) + whole.to_eigenbasis(v),
    }
    for name, way in ways.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = way()
        torch.testing.assert_close(found, way(), rtol=0, atol=0, msg=name)
