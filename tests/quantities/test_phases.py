"""Totals over parameters, and quantities that come in phases, against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.diagram.core import COLUMN

from ..cases import CASES
from ..second_order import assert_equal
from .test_operands import LAYERS, run, unscaled

BY_NAME = {case.name: case for case in CASES}


def norms(G: dict[str, Tensor]) -> Tensor:
    """Of the whole individual gradients, [N]."""
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in G.values()]).sum(0).sqrt()


def weighted(w: Tensor, G: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.einsum("n,n...->...", w, g) for name, g in G.items()}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_clipped(name: str) -> None:
    problem = BY_NAME[name].build()
    G = unscaled(problem)
    C = float(norms(G).median()) or 1.0
    quantities = [
        tn.ClippedGrad("flat", C), tn.ClippedGrad("each", C, tn.Clipping.PER_PARAMETER),
        tn.ClippedGrad("automatic", C, tn.Clipping.AUTOMATIC), tn.ClippedGrad("own", mode=lambda n: (-n).exp()),
    ]  # fmt: skip
    result = run(problem, quantities)
    assert list(result) == [q.name for q in quantities]
    own = {n: weighted((C / norms({n: g})).clamp(max=1), {n: g})[n] for n, g in G.items()}
    assert_equal(result["flat"], weighted((C / norms(G)).clamp(max=1), G), "flat")
    assert_equal(result["each"], own, "each")
    assert_equal(result["automatic"], weighted(C / (norms(G) + 0.01), G), "automatic")
    assert_equal(result["own"], weighted((-norms(G)).exp(), G), "own")


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions of torch do not trace a quantile of any size")
def test_clipped_at_a_quantile() -> None:
    """Torch has quantiles of 2²⁴ numbers at most, and the code is for any number of samples below that."""
    problem = BY_NAME["cross_entropy_image"].build()
    G = unscaled(problem)
    result = run(problem, [tn.ClippedGrad(mode=lambda n: (n.quantile(0.5) / n).clamp(max=1))])
    weights = (norms(G).quantile(0.5) / norms(G)).clamp(max=1)
    assert_equal(result["clipped_grad"], weighted(weights, G), "at a quantile")


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_natural_gradient(name: str) -> None:
    problem = BY_NAME[name].build()
    G = unscaled(problem)
    flat = torch.cat([g.reshape(len(g), -1) for g in G.values()], 1)
    fisher = flat.T @ flat / len(flat) + 0.1 * torch.eye(flat.shape[1], dtype=flat.dtype)
    got = run(problem, [tn.NaturalGradientSMW(damping=0.1)])["natural_gradient"]
    wanted = torch.linalg.solve(fisher, flat.mean(0))
    torch.testing.assert_close(torch.cat([got[n].flatten() for n in G]), wanted, rtol=1e-9, atol=1e-11)


GROUPS = (None, str, {"weights": "*weight*", "rest": ["*"]})


@pytest.mark.thinned(3)
@pytest.mark.parametrize("groups", GROUPS, ids=["all", "each", "patterns"])
def test_totals(groups: Any) -> None:
    problem = BY_NAME["cross_entropy_image"].build()
    each = [tn.BatchL2(), tn.BatchDot(), tn.GGNTrace(), tn.GGNGram()]
    result = run(problem, [*each, *(tn.Total(q, groups) for q in each)])
    for q in each:
        wanted: dict[str, Any] = {}
        for name, value in result[q.name].items():
            group = "all" if groups is None else name if groups is str else "weights" if "weight" in name else "rest"
            wanted[group] = wanted.get(group, 0) + value
        assert_equal(result[f"{q.name}_total"], wanted, q.name)


def test_a_total_is_held_once() -> None:
    """Of N² numbers for each of many layers only the sum is ever there."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
    x, y = torch.randn(256, 8), torch.randn(256, 8)
    peaks = [
        tn.compile(model, nn.MSELoss(), (x, y), [q], check=False).peak_bytes
        for q in (tn.Total(tn.BatchDot()), tn.BatchDot())
    ]
    gram = 4 * 256**2
    assert peaks[1] > 24 * gram > 5 * gram > peaks[0]


@dataclass(frozen=True)
class Shares(tn.Quantity):
    """Σ_vn w_n V² with w of all traces, each parameter's by its own norms: totals of two sweeps, and a loop."""

    name: str = "shares"

    @property
    def propagates(self) -> tn.Propagation:
        return tn.Exact()

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return tn.GGNTrace(), tn.Total(tn.BatchL2(), groups=str)

    def between(self, totals: Any) -> Any:
        own = {name: value.sqrt() for name, value in totals["batch_l2_total"].items()}
        return {"w": totals["ggn_trace"].reciprocal(), "own": own}

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        V = J.T @ g
        return (V * V * g.operand("w") * J.operand("own", ("n",))).sum(COLUMN, "n")


@dataclass(frozen=True)
class Second(tn.Quantity):
    """Σ over parameters of w_n ‖g_n‖² with w = exp of the same sum: a second phase."""

    name: str = "second"

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return (tn.BatchL2(),)

    def between(self, totals: Any) -> Any:
        return {"w": totals["batch_l2"].exp()}

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = J.T @ g
        return (G * G * g.operand("w")).sum_parameter()


@dataclass(frozen=True)
class Third(tn.Quantity):
    """Needs what comes in phases itself."""

    name: str = "third"

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return tn.BatchL2(), Second()

    def between(self, totals: Any) -> Any:
        return {"w": totals["second"] * totals["batch_l2"]}

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return ((J.T @ g) * g.operand("w")).sum("n")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("classes, limit", [(4, None), (40, None), (120, None), (40, 0.6)])
def test_phases_of_loops(classes: int, limit: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, classes)).double()
    x, y = torch.randn(6, 1, 6, 6).double(), torch.randint(classes, (6,))
    loss, quantities = nn.CrossEntropyLoss(), [Shares(), tn.DiagGGN(), Third(), tn.ClippedGrad()]
    program = tn.compile(model, loss, (x, y), quantities, check=False)
    if limit is not None:
        peak = int(limit * program.peak_bytes)
        program = tn.compile(model, loss, (x, y), quantities, memory_limit=peak)
        assert program.peak_bytes <= peak
    result, base = program(x, y), tn.compute(model, loss, (x, y), [tn.SqrtGGN(), tn.BatchGrad(), tn.DiagGGN()])
    V, G = base["sqrt_ggn"], base["batch_grad"]
    trace = sum(v.square().flatten(2).sum(2).sum(0) for v in V.values())
    own = {name: g.flatten(1).norm(dim=1) for name, g in G.items()}
    shares = {n: torch.einsum("n,vn...->...", own[n] / trace, v * v) for n, v in V.items()}
    assert_equal(result["shares"], shares, "shares")
    squares = norms(G).square()
    assert_equal(result["third"], weighted(squares.exp() * squares * squares, G), "third")
    assert_equal(result["diag_ggn"], base["diag_ggn"], "diag")


# -- several propagations


@dataclass(frozen=True)
class Gamma(tn.Quantity):
    """⟨V_vn, ∇ℓ_m⟩, [V, N, N]: ViViT's first derivatives in the directions of the root."""

    name: str = "gamma"

    @property
    def propagates(self) -> tuple[tn.Propagation, ...]:
        return tn.Exact(), tn.Gradient()

    def extract(self, J: tn.Uses, S: tn.Cotangents, g: tn.Cotangents) -> tn.Diagram:  # type: ignore[override]
        return ((J.T @ S) * ((J.T @ g) / g.scale).relabel(n="m")).sum_parameter()


@dataclass(frozen=True)
class Cross(tn.Quantity):
    """⟨V_vn, W_wm⟩ of all columns and of drawn ones."""

    name: str = "cross"

    @property
    def propagates(self) -> tuple[tn.Propagation, ...]:
        return tn.Exact(), tn.Draws(2)

    def extract(self, J: tn.Uses, S: tn.Cotangents, s: tn.Cotangents) -> tn.Diagram:  # type: ignore[override]
        return ((J.T @ S) * (J.T @ s).relabel(n="m")).sum_parameter().ordered("ν", "n", "μ", "m")


@dataclass(frozen=True)
class Along(tn.Quantity):
    """Curvature of each sample along the gradient, ∇Lᵀ G_n ∇L of each block, [N]."""

    name: str = "along"

    @property
    def propagates(self) -> tuple[tn.Propagation, ...]:
        return tn.Gradient(), tn.Exact()

    def extract(self, J: tn.Uses, g: tn.Cotangents, S: tn.Cotangents) -> tn.Diagram:  # type: ignore[override]
        a = ((J.T @ S) * (J.T @ g).sum("n")).sum_parameter().part()
        return (a * a).sum(COLUMN)


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_several_propagations(name: str) -> None:
    problem = BY_NAME[name].build()
    quantities = [Gamma(), Cross(), Along(), tn.SqrtGGN(), tn.SqrtGGNMC(mc_samples=2), tn.Grad()]
    result, G = run(problem, quantities), unscaled(problem)
    drawn = result["sqrt_ggn_mc"]
    for n, v in result["sqrt_ggn"].items():
        V, W = v.reshape(*v.shape[:2], -1), drawn[n].reshape(2, v.shape[1], -1)
        gamma = torch.einsum("vnp,mp->vnm", V, G[n].reshape(len(G[n]), -1))
        torch.testing.assert_close(result["gamma"][n], gamma)
        torch.testing.assert_close(result["cross"][n], torch.einsum("vnp,wmp->vnwm", V, W))
        along = (V @ result["grad"][n].flatten()).square().sum(0)
        torch.testing.assert_close(result["along"][n], along)


def test_one_set_of_draws() -> None:
    """Whether or not somebody needs all of them at once."""

    @dataclass(frozen=True)
    class Together(tn.SqrtGGNMC):
        @property
        def propagates(self) -> tn.Propagation:
            return tn.Draws(self.mc_samples, together=True)

    problem = BY_NAME["cross_entropy_image"].build()
    program = tn.compile(
        problem.model, problem.loss, (problem.x, problem.y), [Together("one", 2), tn.SqrtGGNMC("two", 2)], check=False
    )
    assert len(program.compiled.plan.noises) == 1
    result = program(problem.x, problem.y, seed=1)
    assert_equal(result["one"], result["two"], "draws")


# -- what is refused


@dataclass(frozen=True)
class Made(tn.Quantity):
    """Its outcome is what a function makes of the totals."""

    name: str = "made"
    make: Callable[[Any], Any] = field(default=lambda totals: {"w": totals["batch_l2"]})
    read: Callable[[Any, Any], Any] = field(default=lambda J, g: g.operand("w"))

    def __post_init__(self) -> None:
        """Functions are no options of a quantity."""

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return (tn.BatchL2(),)

    def between(self, totals: Any) -> Any:
        return self.make(totals)

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return ((J.T @ g) * self.read(J, g)).sum("n")


REFUSED: dict[str, tuple[Made, type[Exception], str]] = {
    "branch": (
        Made(make=lambda t: {"w": t["batch_l2"] if t["batch_l2"].sum() > 1 else t["batch_l2"] * 2}),
        tn.UnsupportedError, r"between\(\) of quantity 'made' depends on the values of what it is given.*torch.where",
    ),
    "one size": (
        Made(make=lambda t: {"w": t["batch_l2"] + torch.ones(7, dtype=torch.float64)}),
        tn.InputError, r"between.* fails: .*7",
    ),
    "fails": (
        Made(make=lambda t: {"w": t["batch_dot"]}),
        tn.InputError, r"between.* fails: KeyError: 'batch_dot'\n  The keys are 'batch_l2'",
    ),
    "no mapping": (Made(make=lambda t: t["batch_l2"]), tn.InputError, "returns Tensor|returns Value"),
    "unread": (Made(make=lambda t: dict.fromkeys("wv", t["batch_l2"])), tn.InputError, "makes 'v', which extract"),
    "random": (
        Made(make=lambda t: {"w": torch.rand_like(t["batch_l2"])}),
        tn.UnsupportedError, "draws random numbers .aten.rand.*hand it in as an operand",
    ),
    "in place": (
        Made(make=lambda t: {"w": t["batch_l2"].mul_(2)}),
        tn.UnsupportedError, "writes over what it is given: work on a clone",
    ),
    "one sample": (
        Made(make=lambda t: {"w": t["batch_l2"] * (5 if t["batch_l2"].shape[0] > 1 else 1)}),
        tn.UnsupportedError, "does something else for one sample than for several",
    ),
    "dtype": (
        Made(make=lambda t: {"w": t["batch_l2"].float()}),
        tn.InputError, r"makes 'w' in torch.float32, and totals are in torch.float64: convert it",
    ),
    "turned round": (
        Made(make=lambda t: {"w": torch.ones(5, 3).double() * t["batch_l2"].sum()},
             read=lambda J, g: g.operand("w", (tn.Leg("a", 3), tn.Leg("b", 5))).sum("a", "b")),
        tn.InputError, r"makes 'w' as \[5, 3\], and extract reads it as \[3, 5\]",
    ),
    "other legs": (Made(make=lambda t: {"w": t["batch_l2"].sum()}), tn.InputError, r"makes 'w' as \[\], and extract"),
    "one of each": (
        Made(read=lambda J, g: J.operand("w", ("n",))),
        tn.InputError, "makes one tensor of 'w', and extract reads it as J",
    ),
    "not all": (
        Made(make=lambda t: {"w": {"a": t["batch_l2"]}}, read=lambda J, g: J.operand("w", ("n",))),
        tn.InputError, "makes nothing for parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_come_between(name: str) -> None:
    quantity, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        run(BY_NAME["linear"].build(), [quantity])


def test_refused_totals_and_propagations() -> None:
    problem = BY_NAME["linear"].build()
    for quantity, message in (
        (tn.Total(tn.Grad()), r"'grad' of parameter '\S+' is \[.*\], which has axes of the parameter"),
        (tn.Total(tn.KFAC()), "is .Kronecker factors"),
        (tn.Total(tn.BatchL2(), {"a": "*bias"}), r"is in no group of \['a'\]"),
        (tn.Total(tn.BatchL2(), {"a": "nothing*", "b": "*"}), r"'nothing\*' fits no parameter that it is summed over"),
        (tn.Total(tn.BatchL2(), lambda name: 3), r"groups gives 3 for '\S+': give a text"),
    ):
        with pytest.raises(tn.InputError, match=message):
            run(problem, [quantity])
    for make, message in (
        (lambda: tn.Total(tn.Total(tn.BatchL2())), "summed over parameters already"),
        (lambda: tn.Total(tn.BatchL2), "is no tn.Quantity"),  # type: ignore[arg-type]
        (lambda: tn.Total(tn.BatchL2(), 3), "groups=3"),  # type: ignore[arg-type]
        (lambda: tn.Total(tn.BatchL2(), {"a": str}), "group 'a' is <class 'str'>: give names or patterns"),
        (lambda: tn.ClippedGrad(max_norm=0), "max_norm=0"),
        (lambda: tn.ClippedGrad(mode="flat"), "mode='flat'"),  # type: ignore[arg-type]
        (lambda: tn.NaturalGradientSMW(damping=-1), "damping=-1"),
        (lambda: tn.NaturalGradientSMW(damping=float("inf")), "damping=inf: give a finite number"),
    ):
        with pytest.raises(tn.InputError, match=message):
            make()

    @dataclass(frozen=True)
    class Twice(Gamma):
        @property
        def propagates(self) -> tuple[tn.Propagation, ...]:
            return tn.Exact(), tn.Exact()

    with pytest.raises(tn.InputError, match="propagates Exact, Exact: give one, or several that differ"):
        run(problem, [Twice()])


def test_explained() -> None:
    problem = BY_NAME["linear"].build()
    program = tn.compile(
        problem.model, problem.loss, (problem.x, problem.y), [tn.ClippedGrad(), tn.DirectionalGrad()], check=False
    )
    text = program.explain("derive")
    assert "operands['direction'] of " in text
    assert "then, for clipped_grad:" in text and "= aten.clamp.default(" in text
    assert "sum over parameters (all) of clipped_grad: squared_norms" in text
    assert "# between, for clipped_grad" in program.source
