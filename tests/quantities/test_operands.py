"""Quantities that read tensors which are handed in, on the table of layers, against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from .. import oracle
from ..cases import CASES, Problem
from ..second_order import assert_equal

BY_NAME = {case.name: case for case in CASES}
LAYERS = (
    "linear", "linear_rank3", "mlp_sum", "frozen_weight", "bilinear", "unused_and_zero_gradient", "tied_transposed",
    "reused_convolution", "position_table", "attention", "einsum_mixer", "weight_normalized", "scalar_parameter",
    "conv2d_stride_padding", "conv1d_groups_dilation", "conv_transpose2d", "prelu_channels", "layer_norm",
    "cross_entropy_sum", "cross_entropy_image", "linear_size_one",
)  # fmt: skip


def unscaled(problem: Problem) -> dict[str, Tensor]:
    """∇ℓ_n, [N, *p], of every parameter."""
    scale = 1 / len(problem.x) if problem.loss.reduction == "mean" else 1.0
    found = oracle.batch_grad(problem.model, problem.loss, problem.x, problem.y)
    return {name: G / scale for name, G in found.items()}


def roots(problem: Problem) -> dict[str, Tensor]:
    """V, [V, N, *p]; checked against torch.func elsewhere."""
    return run(problem, [tn.SqrtGGN()])["sqrt_ggn"]


def run(problem: Problem, quantities: list[tn.Quantity], **options: Any) -> tn.Result:
    operands = options.pop("operands", None)
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities, check=False, **options)
    return program(problem.x, problem.y, operands=operands, seed=0)


def drawn(shapes: Any, size: int) -> Any:
    """Random operands of these shapes."""
    if isinstance(shapes, dict):
        return {key: drawn(shape, size) for key, shape in shapes.items()}
    return torch.randn([size if s == tn.N else int(s) for s in shapes], dtype=torch.float64)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_directions_and_weights(name: str) -> None:
    problem = BY_NAME[name].build()
    quantities = [tn.DirectionalGrad(), tn.WeightedGrad(), tn.DirectionalCurvature(), tn.DirectionalRoot()]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    G, V, shapes = unscaled(problem), roots(problem), program.operands
    own = {n: tuple(p.shape) for n, p in oracle.parameters(problem.model).items()}
    assert shapes == {"direction": own, "weights": (tn.N,)}
    operands = drawn(shapes, len(problem.x))
    d, w = operands["direction"], operands["weights"]
    result = program(problem.x, problem.y, operands=operands)
    assert_equal(result["directional_grad"], {n: (g * d[n]).reshape(len(g), -1).sum(1) for n, g in G.items()}, "grad")
    assert_equal(result["weighted_grad"], {n: torch.einsum("n,n...->...", w, g) for n, g in G.items()}, "weighted")
    along = {n: (v * d[n]).reshape(*v.shape[:2], -1).sum(2) for n, v in V.items()}
    assert_equal(result["directional_root"], along, "root")
    assert_equal(result["directional_curvature"], {n: a.square().sum(0) for n, a in along.items()}, "curvature")


@pytest.mark.thinned(10)
@pytest.mark.parametrize("root", [tn.Exact(), tn.Labels()], ids=["exact", "empirical"])
@pytest.mark.parametrize("name", LAYERS)
def test_rotated_second_moment(name: str, root: tn.Propagation) -> None:
    """The diagonal of Qᵀ G Q, with any basis; with that of the factors next to G among what has it."""
    problem = BY_NAME[name].build()
    exact = isinstance(root, tn.Exact)
    factors = tn.KFLR() if exact else tn.KFAC("kflr", fisher=tn.Fisher.EMPIRICAL)
    eigen = {name: K.eigh() for name, K in run(problem, [factors])["kflr"].items()}
    quantity = tn.RotatedSecondMoment(root=root)
    result = run(problem, [quantity], operands=tn.RotatedSecondMoment.bases(eigen))["rotated_second_moment"]
    scale = 1 / len(problem.x) if problem.loss.reduction == "mean" else 1.0
    V = roots(problem) if exact else {n: G[None] * scale**0.5 for n, G in unscaled(problem).items()}
    wanted = {n: eigen[n].to_eigenbasis(v.flatten(0, 1)).square().sum(0) for n, v in V.items()}
    assert_equal(result, wanted, "rotated")
    for n, e in eigen.items():
        rows = V[n].flatten(0, 1).reshape(-1, result[n].numel())
        dense = e.with_eigenvalues(result[n]).to_dense()
        assert torch.allclose(dense.diagonal().sum(), rows.square().sum())


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_axis_moments(name: str) -> None:
    problem = BY_NAME[name].build()
    result = run(problem, [tn.AxisMoments(), tn.AxisMoments("each", individual=True), tn.Grad()])
    whole = {n: g[None] for n, g in result["grad"].items()}
    for key, rows in (("axis_moments", whole), ("each", unscaled(problem))):
        for n, K in result[key].items():
            G, axes = rows[n], [k for k, size in enumerate(rows[n].shape[1:]) if size != 1]
            assert len(K.factors) == max(len(axes), 1)
            for k, M in zip(axes, K.factors, strict=len(axes) > 0):
                flat = G.movedim(k + 1, 1).reshape(len(G), len(M), -1)
                torch.testing.assert_close(M, torch.einsum("nax,nbx->ab", flat, flat) / len(G))


def whole(blocks: Tensor) -> Tensor:
    """[…, d, d] with the blocks […, b, s, s] on its diagonal."""
    each = [torch.block_diag(*one) for one in blocks.reshape(-1, *blocks.shape[-3:])]
    return torch.stack(each).reshape(*blocks.shape[:-3], *each[0].shape)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("structure", tn.Structure)
@pytest.mark.parametrize("name", LAYERS)
def test_projected_factors(name: str, structure: tn.Structure) -> None:
    problem = BY_NAME[name].build()
    program = tn.compile(
        problem.model, problem.loss, (problem.x, problem.y),
        [tn.ProjectedFactors(structure=structure, root=tn.Exact(), rows=2), tn.KFLR()], check=False,
    )  # fmt: skip
    operands = drawn(program.operands, len(problem.x))
    result = program(problem.x, problem.y, operands=operands)
    for n, K in result["kflr"].items():
        projected = result["projected_factors"][n]
        for k, (F, P, kind) in enumerate(zip(K.factors, projected.factors, projected.kinds, strict=True)):
            own = operands[f"projection_{k}"][n]
            if kind is tn.Kind.DIAGONAL:
                flat = F.diagonal(dim1=-2, dim2=-1) if K.kinds[k] is tn.Kind.FULL else F
                torch.testing.assert_close(P, own.square().reshape(flat.shape) * flat)
            elif kind is tn.Kind.BLOCKS:
                inside, Q = whole(torch.ones_like(P)), whole(own)
                torch.testing.assert_close(whole(P), Q.mT @ (F * inside) @ Q)
            else:
                torch.testing.assert_close(P, own.mT @ F @ own)


def test_blocks_of_projected_factors() -> None:
    """The largest that divide d with at most so many rows; whole slices of a convolution's channels; the factor is not
    formed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 7)).double()
    x, y = torch.randn(5, 4, 6, 6).double(), torch.randint(7, (5,))
    structure = tn.Structure.BLOCKS
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.ProjectedFactors(structure=structure, rows=20)])
    assert program.operands["projection_0"] == {
        "0.weight": (6, 6), "0.bias": (6, 6), "3.weight": (7, 7), "3.bias": (7, 7)
    }  # fmt: skip
    assert program.operands["projection_1"] == {"0.weight": (2, 18, 18), "3.weight": (6, 16, 16)}
    result = program(x, y, operands=program.some_operands(x, y), seed=0)["projected_factors"]
    assert result["3.weight"].kinds == (tn.Kind.FULL, tn.Kind.BLOCKS)
    assert result["3.weight"].factors[1].shape == (6, 16, 16)
    large = nn.Linear(2048, 4)
    x, y = torch.randn(8, 2048), torch.randint(4, (8,))
    program = tn.compile(large, nn.CrossEntropyLoss(), (x, y), [tn.ProjectedFactors(structure=structure)], check=False)
    assert program.peak_bytes < 4 * 2048 * 2048 / 4
    assert "blocks of 32×32 in [i] 2048×2048" in program.explain()


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_sketch(name: str) -> None:
    """The Khatri-Rao projection of G, by the legs of the factors."""
    problem = BY_NAME[name].build()
    program = tn.compile(
        problem.model, problem.loss, (problem.x, problem.y),
        [tn.Sketch(size=3), tn.Total(tn.Sketch("summed", size=3)), tn.AxisMoments()], check=False,
    )  # fmt: skip
    operands = drawn(program.operands, len(problem.x))
    result, G = program(problem.x, problem.y, operands=operands), unscaled(problem)
    factors = run(problem, [tn.KFAC("k", fisher=tn.Fisher.EMPIRICAL)])["k"]
    for n, K in factors.items():
        sizes, groups = K.places.legs, K.places.factors
        front = [k for k in range(len(sizes)) if k not in {k for group in groups for k in group}]
        args: list[Any] = [G[n].reshape(-1, *sizes), [20, *range(len(sizes))]]
        for k, group in enumerate(groups):
            P = operands[f"sketch_{k}"][n].reshape(*(sizes[leg] for leg in (*front, *group)), 3)
            args += [P, [*front, *group, 21]]
        torch.testing.assert_close(result["sketch"][n], torch.einsum(*args, [20, 21]))
    total = sum(result["sketch"].values())
    torch.testing.assert_close(result["summed_total"]["all"], total)
    torch.testing.assert_close(result.total("sketch"), total)


def test_sketches_have_the_dot_products_of_gradients() -> None:
    """In expectation: within 5 standard deviations, each about √(2 / size) of the norms."""
    problem = BY_NAME["cross_entropy_image"].build()
    size = 20_000
    quantities = [tn.Total(tn.Sketch(size=size)), tn.BatchDot("dots", tn.Scale.UNSCALED)]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    result = program(problem.x, problem.y, operands=tn.projections(program, seed=3))
    sketches, dots = result["sketch_total"]["all"], result.total("dots")
    norms = dots.diagonal().sqrt()
    assert ((sketches @ sketches.T - dots).abs() <= 5 * (8 / size) ** 0.5 * norms * norms[:, None]).all()


# -- what is refused


@dataclass(frozen=True)
class Reading(tn.Quantity):
    """Reads an operand as its function says."""

    name: str = "reading"
    read: Callable[[tn.Uses, tn.Cotangents], tn.Diagram] = lambda J, g: g.operand("w")

    def __post_init__(self) -> None:
        """A function is no option of a quantity."""

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return ((J.T @ g) * self.read(J, g)).sum("n")


@dataclass(frozen=True)
class Along(tn.Quantity):
    """Individual gradients times an operand with a leg of its own, in some order."""

    name: str = "along"
    order: tuple[str, ...] = ()
    kept: bool = False

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        found = (J.T @ g) / g.scale * g.operand("w", ("n", tn.Leg("direction", 2)))
        return (found if self.kept else found.sum("n")).ordered(*self.order)


@pytest.mark.parametrize("order, kept, letters", [
    ((), False, "...j"), (("direction",), False, "j..."), (("n", "direction"), True, "nj..."), ((), True, "n...j"),
])  # fmt: skip
@pytest.mark.parametrize("model", [nn.Linear(1, 3), nn.Linear(3, 1), nn.Linear(1, 1)], ids=str)
def test_the_axes_of_a_parameter_are_all_there(
    model: nn.Module, order: tuple[str, ...], kept: bool, letters: str
) -> None:
    """Also those of size 1, where the operand has a leg of its own."""
    torch.manual_seed(0)
    model, x, w = model.double(), torch.randn(4, model.in_features).double(), torch.randn(4, 2).double()
    each = tn.BatchGrad(scale=tn.Scale.UNSCALED)
    found = tn.compute(model, nn.MSELoss(), (x, torch.zeros(4, model.out_features).double()), [Along(order=order,
        kept=kept), each], operands={"w": w})  # fmt: skip
    for name, gradient in found["batch_grad"].items():
        torch.testing.assert_close(found["along"][name], torch.einsum(f"n...,nj->{letters}", gradient, w))


UNLIKE: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "a leg in front": (
        lambda J, g: ((J.T @ g) * g.operand("w", ("n", tn.Leg("q", 2)))).ordered("q", "n"),
        r"\[q, n, o, i\], and those of samples and columns come first: .ordered\('n'\)",
    ),
    "a leg twice": (lambda J, g: (J.T @ g).relabel(n=J.legs[0].name), r"its result, \[o, o, i\], are not different"),
    "a complex factor": (lambda J, g: (J.T @ g) * 1j, r"a diagram times 1j: a factor is a real number"),
    "no factor": (lambda J, g: (J.T @ g) / True, "a diagram times True: a factor is a real number"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_no_result(name: str) -> None:
    @dataclass(frozen=True)
    class Own(tn.Quantity):
        name: str = "own"

        def extract(self, J: tn.Uses, g: tn.Cotangents) -> Any:
            return UNLIKE[name][0](J, g)

    with pytest.raises(tn.InputError, match=f"(?s){UNLIKE[name][1]}"):
        run(BY_NAME["linear"].build(), [Own()])


REFUSED = {
    "unknown leg": (lambda J, g: g.operand("w", ("q",)), r"an unknown leg 'q': there are n.*tn.Leg\('q'"),
    "no leg": (lambda J, g: g.operand("w", (3,)), "3 is no leg"),
    "columns": (lambda J, g: g.operand("w", (tn.Leg("ν", 3),)), "the leg of columns 'ν'"),
    "other size": (lambda J, g: J.operand("w", (tn.Leg(J.legs[0].name, 99),)), "has size 99, and there is one of size"),
    "a leg of the parameter": (
        lambda J, g: g.operand("w", (tn.Leg(J.legs[0].name, 3),)),
        r"operand 'w' has a leg '\w+' of its own, and a parameter has one of that name \(\[.*call it otherwise",
    ),
    "no size": (lambda J, g: g.operand("w", (tn.Leg("a", 0),)), "has size 0; give a number > 0"),
    "no key": (lambda J, g: g.operand(""), "a text that is not empty"),
    "twice": (lambda J, g: g.operand("w", ("n", "n")), "two of its legs are called 'n'"),
    "one and each": (lambda J, g: g.operand("w") * J.operand("w"), "give one of them another key"),
    "two shapes": (lambda J, g: g.operand("w") * g.operand("w", (tn.Leg("a", 2),)).sum("a"), "is read with the shapes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_operand(name: str) -> None:
    read, message = REFUSED[name]
    with pytest.raises(tn.InputError, match=f"(?s){message}"):
        run(BY_NAME["linear"].build(), [Reading(read=read)])


def wrong() -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    other = torch.ones(1, dtype=torch.float64)
    return {
        "none": (lambda good: None, "operands has nothing for 'direction', 'weights': program.operands tells"),
        "no mapping": (lambda good: [1], "operands is list: give"),
        "a key more": (lambda good: good | {"more": other}, "operands has 'more', which nothing reads: there are"),
        "one for all": (lambda good: good | {"direction": other}, "'direction' is Tensor: it has one of each"),
        "no parameter": (lambda good: good | {"direction": {}}, "'direction' has nothing for '0.weight'"),
        "a name more": (lambda good: good | {"direction": good["direction"] | {"a": other}}, "has 'a', which nothing"),
        "shape": (lambda good: good | {"weights": other}, r"'weights' has shape \[1\]; it is \[N\], here \[3\]"),
        "dtype": (lambda good: good | {"weights": good["weights"].float()}, "is torch.float32 on cpu, and it is read"),
        "no tensor": (lambda good: good | {"weights": 1.0}, "operand 'weights' is float, not a tensor"),
    }


@pytest.mark.parametrize("name", wrong())
def test_what_is_handed_in_is_checked(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(2, 3)).double(), torch.randn(3, 2).double(), torch.randn(3, 3).double()
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.DirectionalGrad(), tn.WeightedGrad()], check=False)
    good = program.some_operands(x, y)
    change, message = wrong()[name]
    with pytest.raises(tn.InputError, match=message):
        program(x, y, operands=change(good))
    program(x, y, operands=good)


def test_a_program_without_operands_takes_none() -> None:
    problem = BY_NAME["linear"].build()
    with pytest.raises(tn.InputError, match="'w', which nothing reads: this program reads none"):
        run(problem, [tn.Grad()], operands={"w": torch.ones(3)})


def test_any_batch_size_and_slices() -> None:
    """Weights have a number for each sample, also where the batch is cut into pieces and columns go in rounds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 30)).double()
    x, y = torch.randn(8, 6).double(), torch.randint(30, (8,))
    quantities = [tn.WeightedGrad(), tn.DirectionalCurvature(), tn.BatchL2()]
    whole = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities)
    small = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities, memory_limit=int(whole.peak_bytes * 0.9))
    assert small.peak_bytes < whole.peak_bytes
    for size in (8, 3):
        operands = whole.some_operands(x[:size], y[:size])
        one, two = (p(x[:size], y[:size], operands=operands) for p in (whole, small))
        for key in one:
            assert_equal(two[key], one[key], key)


class Mixed(nn.Module):
    """Parameters of two dtypes, and a softmax in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4).double(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(torch.softmax(self.one(x), -1).float())
        return found


def test_several_dtypes() -> None:
    """An operand of a parameter has the parameter's."""
    torch.manual_seed(0)
    model, x, y = Mixed(), torch.randn(5, 3).double(), torch.randn(5, 2)
    quantities = [tn.DirectionalGrad(), tn.WeightedGrad(), tn.ClippedGrad(max_norm=0.1)]
    program = tn.compile(model, nn.MSELoss(), (x, y), quantities)
    operands = program.some_operands(x, y)
    assert {name: d.dtype for name, d in operands["direction"].items()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert program.compiled.derived.phases[0].dtype == torch.float64  # of a sum of both
    result = program(x, y, operands=operands)
    G = tn.compute(model, nn.MSELoss(), (x, y), [tn.BatchGrad(scale=tn.Scale.UNSCALED)])["batch_grad"]
    for name, own in G.items():
        want = (own * operands["direction"][name]).flatten(1).sum(1)
        torch.testing.assert_close(result["directional_grad"][name], want, rtol=1e-5, atol=1e-6)
        assert result["clipped_grad"][name].dtype == own.dtype


def test_short_dtypes() -> None:
    """What no kernel does in bfloat16 is done in float32 between the phases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y, short = torch.randn(5, 3), torch.randn(5, 2), torch.bfloat16
    quantities = [tn.NaturalGradientSMW(damping=1.0), tn.ClippedGrad()]
    want = tn.compute(model, nn.MSELoss(), (x, y), quantities)
    got = tn.compute(model.to(short), nn.MSELoss(), (x.to(short), y.to(short)), quantities)
    for key in want:
        for name, value in got[key].items():
            assert value.dtype == short
            torch.testing.assert_close(value.float(), want[key][name], rtol=0.05, atol=0.02)
