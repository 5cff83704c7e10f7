"""Layers that nobody has written a KFAC for: their Kronecker factors come from the rule alone.

Each parameter has *pieces*, the tensors that meet in its gradient. They are written here by hand, as einsums of the
layer's input x, of the Jacobian b of the model's output with respect to the layer's, and of the other parameters. With
a sum over the positions t of a sample before the outer product (reduce) or after it (expand), and H_n = S_n S_nᵀ,

    expand  A = Σ_nt a aᵀ / (N T)    B = Σ_nt bᵀ H_n b        reduce  A = Σ_n ā āᵀ / (N T²)    B = Σ_n b̄ᵀ H_n b̄.

A leg that all pieces share stays a block: nothing is said between its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import tnbackprop as tn

from .. import oracle_second
from ..cases import Case, Problem, normal, seq
from ..models import Apply
from ..second_order import DIFFERENT, TOLERANCE, dense, error, make, run

SHARING = ("EXPAND", "REDUCE")
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "kflr": ("KFLR", {}),
    "empirical": ("KFAC", {"fisher": "EMPIRICAL"}),
}


class Factorised(nn.Module):
    """Einsums of the input and of named parameters: "equation of A B" has the input last, then the next one follows."""

    def __init__(self, *steps: str, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = steps
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, input: Tensor) -> Tensor:
        for step in self.steps:
            equation, names = step.split(" of ")
            input = torch.einsum(equation, *(getattr(self, name) for name in names.split()), input)
        return input


class OfTwoSides(nn.Module):
    """A bilinear form of two mixtures of the input's last axis."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.form = Factorised("oab,ntab->nto of weight", weight=(4, 3, 3)) if written else nn.Bilinear(3, 3, 4, False)
        self.register_buffer("first", torch.zeros(2))
        self.register_buffer("second", torch.zeros(2))

    def forward(self, input: Tensor) -> Tensor:
        first, second = (input @ side for side in (self.first, self.second))
        if isinstance(self.form, nn.Bilinear):
            return self.form(first, second)
        return torch.einsum("oab,nta,ntb->nto", self.form.weight, first, second)


CP = {"A": (4, 2), "B": (3, 2), "C": (2, 2)}
TUCKER = {"core": (2, 3, 2), "U": (4, 2), "V": (3, 3), "W": (2, 2)}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "cp": partial(Factorised, "or,ir,jr,ntij->nto of A B C", **CP),
    "cp_steps": partial(Factorised, "ir,ntij->ntrj of B", "jr,ntrj->ntr of C", "or,ntr->nto of A", **CP),
    "tucker": partial(Factorised, "pqs,op,iq,js,ntij->nto of core U V W", **TUCKER),
    "tucker_steps": partial(
        Factorised, "iq,ntij->ntqj of V", "js,ntqj->ntqs of W", "pqs,ntqs->ntp of core", "op,ntp->nto of U", **TUCKER
    ),
    "bilinear": partial(OfTwoSides, False),
    "bilinear_einsum": partial(OfTwoSides, True),
}
FORMULAS = {
    "cp": "output[n, t, o] = A[o, r] * B[i, r] * C[j, r] * input[n, t, i, j]",
    "tucker": "output[n, t, o] = core[p, q, s] * U[o, p] * V[i, q] * W[j, s] * input[n, t, i, j]",
}
"""The same layers as rules: one opaque call each."""


@dataclass(frozen=True)
class Pieces:
    """The pieces of one parameter's gradient.

    roots   einsum of other parameters and of b [n, f, t, o] -> [n, f, *positions, block, own[0]]
    inputs  einsums of other parameters and of x [n, t, i, j] -> [n, *positions, block, own[1]], …
    legs    the parameter's
    own     the legs of each factor, the roots' first
    block   the legs that all pieces share
    t       the positions of a sample: what the step leaves alone
    """

    roots: str
    inputs: tuple[str, ...]
    legs: str
    own: tuple[str, ...]
    block: str = ""
    t: str = "t"


SIDES = ("j,ntij->nti of first", "j,ntij->nti of second")
OUTPUT = "nfto->nfto of "
OF_A = ("ir,jr,ntij->ntr of B C",)
OF_U = ("pqs,iq,js,ntij->ntp of core V W",)
OF_CORE = Pieces("op,nfto->nftp of U", ("iq,js,ntij->ntqs of V W",), "pqs", ("p", "qs"))
PIECES = {
    # In one step the whole formula is one diagram; what B, C, V and W are is said in EXACT.
    ("cp", "A"): Pieces(OUTPUT, OF_A, "or", ("o", "r")),
    ("tucker", "core"): OF_CORE,
    ("tucker", "U"): Pieces(OUTPUT, OF_U, "op", ("o", "p")),
    ("bilinear", "form.weight"): Pieces(OUTPUT, SIDES, "oij", ("o", "i", "j")),
    ("bilinear_einsum", "form.weight"): Pieces(OUTPUT, SIDES, "oij", ("o", "i", "j")),
    # In steps, what a step leaves alone is a position of it.
    ("cp_steps", "A"): Pieces(OUTPUT, OF_A, "or", ("o", "r")),
    ("cp_steps", "B"): Pieces("jr,or,nfto->nftjr of C A", ("ntij->ntji of ",), "ir", ("r", "i"), t="tj"),
    ("cp_steps", "C"): Pieces("or,nfto->nftr of A", ("ir,ntij->ntrj of B",), "jr", ("", "j"), block="r"),
    ("tucker_steps", "V"): Pieces("js,pqs,op,nfto->nftjq of W core U", ("ntij->ntji of ",), "iq", ("q", "i"), t="tj"),
    ("tucker_steps", "W"): Pieces("pqs,op,nfto->nftqs of core U", ("iq,ntij->ntqj of V",), "js", ("s", "j"), t="tq"),
    ("tucker_steps", "core"): OF_CORE,
    ("tucker_steps", "U"): Pieces(OUTPUT, OF_U, "op", ("o", "p")),
}


def problem_of(layer: str, batch: int = 3, positions: int = 2) -> Problem:
    """sin, the layer, tanh and a linear layer: neither the layer's input nor its Jacobian is special."""

    def model() -> nn.Module:
        return seq(Apply(torch.sin), LAYERS[layer](), nn.Tanh(), nn.Flatten(), nn.Linear(4 * positions, 3))

    return Case(layer, model, (positions, 3, 2), normal, batch=batch).build()


def piece(layer: nn.Module, text: str, last: Tensor) -> tuple[str, Tensor]:
    """The legs and the value of an einsum of the layer's tensors and `last`; the second of two sides has the leg j."""
    equation, names = text.split(" of ")
    value = torch.einsum(equation, *(getattr(layer, name).detach() for name in names.split()), last)
    legs = equation.split("->")[1]
    return (legs.replace("i", "j") if names == "second" else legs), value


def roots_of(problem: Problem, empirical: bool) -> Tensor:
    """S_nᵀ b, or the one row gᵀ b, [n, f, t, o], with b by torch.func from what follows the layer."""
    after = problem.model[2:]
    theta = {name: p.detach() for name, p in after.named_parameters()}
    with torch.no_grad():
        hidden = problem.model[:2](problem.x)
    b = torch.stack([jacrev(lambda z: functional_call(after, theta, z.unsqueeze(0))[0])(z) for z in hidden])
    output, size = oracle_second.outputs(problem.model, problem.x), len(problem.x)
    if empirical:
        g = oracle_second.loss_gradients(problem.loss, output, problem.y, size)
        return torch.einsum("nf,nfto->nto", g, b).unsqueeze(1)
    H = oracle_second.loss_hessians(problem.loss, output, problem.y, size)
    return torch.einsum("nfe,nfto->neto", torch.linalg.cholesky(H), b)


def factors(problem: Problem, pieces: Pieces, reduce: bool, empirical: bool) -> Iterator[tuple[str, Tensor]]:
    """Each factor with its legs: block, own, and OWN for the other copy."""
    layer, x = problem.model[1], torch.sin(problem.x)
    seeds = [(pieces.roots, roots_of(problem, empirical)), *((text, x) for text in pieces.inputs)]
    tied = "" if reduce else pieces.t
    for k, ((text, seed), own) in enumerate(zip(seeds, pieces.own, strict=True)):
        legs, value = piece(layer, text, seed)
        sizes = dict(zip(legs, value.shape, strict=True))
        head = "n" if k else "nf"
        assert set(sizes) == {*head, *pieces.t, *pieces.block, *own}, f"{text}: the pieces are written wrongly"
        mean = sizes["n"] * prod(sizes[t] for t in pieces.t) ** (2 if reduce else 1) if k else 1
        summed = torch.einsum(f"{legs}->{head}{tied}{pieces.block}{own}", value)
        one, other = (f"{head}{tied}{pieces.block}{copy}" for copy in (own, own.upper()))
        legs = f"{pieces.block}{own}{own.upper()}"
        yield legs, torch.einsum(f"{one},{other}->{legs}", summed, summed) / mean


def definition(problem: Problem, pieces: Pieces, *, reduce: bool = False, empirical: bool = False) -> Tensor:
    """The dense block [P, P] of the row-major parameter."""
    terms = list(factors(problem, pieces, reduce, empirical))
    first = terms[0][1]
    for k, leg in enumerate(pieces.block):
        terms.append((leg + leg.upper(), torch.eye(first.shape[k], dtype=first.dtype)))
    equation = ",".join(legs for legs, _ in terms) + f"->{pieces.legs}{pieces.legs.upper()}"
    whole = torch.einsum(equation, *(value for _, value in terms))
    return whole.reshape(whole.shape[: len(pieces.legs)].numel(), -1)


DEFINED = [pytest.param(*key, id="-".join(key)) for key in PIECES]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer, parameter", DEFINED)
def test_definition(layer: str, parameter: str, kind: str, sharing: str) -> None:
    problem, (name, options) = problem_of(layer), KINDS[kind]
    got = run(problem, name, sharing=sharing, **options)[f"1.{parameter}"]
    shape = {"reduce": sharing == "REDUCE", "empirical": kind == "empirical"}
    assert error(got.to_dense(), definition(problem, PIECES[layer, parameter], **shape)) <= TOLERANCE


@pytest.mark.parametrize("layer, parameter", [key for key in PIECES if key != ("tucker", "core")])
def test_sharing_matters(layer: str, parameter: str) -> None:
    """Expand is not reduce here: `test_definition` tells them apart."""
    problem, pieces = problem_of(layer), PIECES[layer, parameter]
    assert error(definition(problem, pieces), definition(problem, pieces, reduce=True)) > DIFFERENT


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("layer", FORMULAS)
def test_declared_is_written(layer: str, sharing: str) -> None:
    """The formula as a rule and the einsum in the forward have the same factors."""
    problem, quantities = problem_of(layer), [make("KFLR", sharing=sharing)]
    rules = tn.RULES | {Factorised: lambda module: FORMULAS[layer]}
    declared = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities, rules=rules)
    got, want = declared(problem.x, problem.y)["kflr"], dense(problem, "KFLR", sharing=sharing)
    assert list(got) == list(want)
    for name, block in want.items():
        assert error(got[name].to_dense(), block) <= TOLERANCE, name


# Where the approximation is none: samples N, positions T.

NO_SHARING = (
    "cp-A",
    "tucker-core",
    "tucker-U",
    "bilinear-form.weight",
    "cp_steps-A",
    "tucker_steps-core",
    "tucker_steps-U",
)
POSITIONS = ("cp_steps-B", "tucker_steps-V", "tucker_steps-W")
WHOLE = ("cp-B", "cp-C", "tucker-V", "tucker-W")
EXACT = [
    *((name, 1, 1, True) for name in NO_SHARING),
    *((name, 3, 1, False) for name in NO_SHARING),
    *((name, 1, 2, False) for name in NO_SHARING),
    # The other modes of the input are positions of their own, also in one sample.
    *((name, 1, 1, False) for name in POSITIONS),
    # r of cp-B is in A, in C and in B itself, and q of tucker-V in the core: nothing falls apart, so nothing is lost.
    *((name, 3, 2, True) for name in WHOLE),
]


@pytest.mark.thinned(16)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, batch, positions, exact", EXACT)
def test_exact(name: str, batch: int, positions: int, exact: bool, kind: str) -> None:
    layer, parameter = name.split("-")
    problem, (quantity, options) = problem_of(layer, batch, positions), KINDS[kind]
    got = dense(problem, quantity, **options)[f"1.{parameter}"]
    block = oracle_second.ggn if kind == "kflr" else oracle_second.empirical_fisher
    found = error(got, block(problem.model, problem.loss, problem.x, problem.y)[f"1.{parameter}"])
    assert found <= TOLERANCE if exact else found > DIFFERENT, f"off by {found:.3g}"


@pytest.mark.parametrize("batch, exact", [(1, True), (3, False)])
def test_exact_within_blocks(batch: int, exact: bool) -> None:
    """C of the stepwise CP layer meets its input at its own r: a block for each r, nothing between them."""
    problem = problem_of("cp_steps", batch, 1)
    got = dense(problem, "KFLR")["1.C"].reshape(2, 2, 2, 2)  # j, r, j', r'
    want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)["1.C"].reshape(2, 2, 2, 2)
    assert_block_exact(got, want, torch.eye(2)[None, :, None, :].expand_as(got), exact)


def assert_block_exact(got: Tensor, want: Tensor, inside: Tensor, exact: bool) -> None:
    """Inside the blocks the GGN or not; outside nothing, where the GGN has something."""
    found = error(got * inside, want * inside)
    assert found <= TOLERANCE if exact else found > DIFFERENT, f"off by {found:.3g}"
    assert not (got * (1 - inside)).any()
    assert (want * (1 - inside)).abs().max() > DIFFERENT


# The sampled factors.


@pytest.mark.thinned(3)
@pytest.mark.parametrize("layer, parameter", [("cp_steps", "C"), ("bilinear", "form.weight"), ("cp", "A")])
def test_sampled(layer: str, parameter: str) -> None:
    """KFAC has the input factors of KFLR; the other one is random, and right in the mean."""
    problem, name = problem_of(layer), f"1.{parameter}"
    exact, few, many = (
        run(problem, "KFLR")[name],
        run(problem, "KFAC", 0)[name],
        run(problem, "KFAC", 0, mc_samples=4000)[name],
    )
    assert sum(error(a, b) > DIFFERENT for a, b in zip(few.factors, exact.factors, strict=True)) == 1
    assert DIFFERENT**2 < error(many.to_dense(), exact.to_dense()) < 0.1 < error(few.to_dense(), exact.to_dense())


# A depthwise-separable block: a grouped and a 1x1 convolution.


def separable(kernel: int, padding: int, positions: int) -> Callable[[], nn.Module]:
    return lambda: seq(
        nn.Conv2d(4, 8, kernel, padding=padding, groups=4), nn.Conv2d(8, 3, 1), nn.Tanh(), nn.Flatten(),
        nn.Linear(3 * positions, 2),
    )  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("kind", KINDS)
def test_separable_definition(kind: str, sharing: str) -> None:
    problem, (name, options) = Case("separable", separable(2, 1, 16), (4, 3, 3)).build(), KINDS[kind]
    got = dense(problem, name, sharing=sharing, **options)
    shape = {"reduce": sharing == "REDUCE", "empirical": kind == "empirical"}
    for layer in ("0", "1"):
        arguments = (problem.model, layer, problem.loss, problem.x, problem.y)
        assert error(got[f"{layer}.weight"], oracle_second.kronecker(*arguments, **shape).to_dense()) <= TOLERANCE
        assert error(got[f"{layer}.bias"], oracle_second.bias_block(*arguments, **shape)) <= TOLERANCE


@pytest.mark.thinned(3)
@pytest.mark.parametrize("batch, padding, exact", [(1, 0, True), (3, 0, False), (1, 1, False)])
def test_separable_exact(batch: int, padding: int, exact: bool) -> None:
    """One sample, a kernel as large as the image: the 1x1 kernel exactly, the grouped one within each channel."""
    case = Case("separable", separable(3, padding, 9 if padding else 1), (4, 3, 3), batch=batch)
    problem = case.build()
    got, want = dense(problem, "KFLR"), oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)
    found = error(got["1.weight"], want["1.weight"])
    assert found <= TOLERANCE if exact else found > DIFFERENT, f"off by {found:.3g}"
    inside = torch.block_diag(*[torch.ones(18, 18)] * 4)
    assert_block_exact(got["0.weight"], want["0.weight"], inside, exact)


def test_one_piece_must_fit() -> None:
    """B of a CP layer in one step is one factor, its whole block; where that does not fit, the reason is said."""
    problem = problem_of("cp", 2, 1)
    example = (problem.x, problem.y)
    size = dict(problem.model.named_parameters())["1.B"].numel()
    message = rf"'1.B' has no Kronecker factors \(kflr\).*one\n?.*piece[\s\S]*{size} x {size}[\s\S]*several steps"
    with pytest.raises(tn.UnsupportedError, match=message):
        tn.compile(problem.model, problem.loss, example, [tn.KFLR()], memory_limit=8 * size**2 - 1)
