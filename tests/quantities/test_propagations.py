"""Propagations from outside, against torch.func: where they start, with what they go through layers, in what form."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sympy
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.diagram.algebra import squared
from tnbackprop.diagram.core import COLUMN, Product
from tnbackprop.diagram.jacobian import Jacobian
from tnbackprop.quantities.factors import kronecker

from .. import oracle
from ..cases import CASES

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "add_a_propagation.py"), run_name="example")
HutchinsonDiag, HutchinsonTrace = EXAMPLE["HutchinsonDiag"], EXAMPLE["HutchinsonTrace"]
BY_NAME = {case.name: case for case in CASES}
LAYERS = (
    "linear", "linear_rank3", "linear_one_sample", "frozen_weight", "tied_transposed", "reused_convolution", "residual",
    "position_table", "attention", "einsum_mixer", "weight_normalized", "conv2d_stride_padding", "layer_norm",
)  # fmt: skip


GRADIENT = tn.Gradient()


@dataclass(frozen=True)
class Own(tn.Propagation):
    """What it starts with is a function."""

    make: Callable[[tn.Output], Any]

    def start(self, output: tn.Output) -> Any:
        return self.make(output)


@dataclass(frozen=True)
class Free(Own):
    needs_loss: ClassVar[bool] = False


@dataclass(frozen=True)
class Weighted(Own):
    """The Hessian without residuals: the GGN of a loss that may be indefinite."""


@dataclass(frozen=True)
class Rough(Own):
    """A diagonal without residuals."""

    def through(self, J: Jacobian) -> Jacobian:
        return squared(J)


@dataclass(frozen=True)
class Pulled(tn.Quantity):
    """Jᵀ g as it is, of what is propagated."""

    name: str = "pulled"
    what: tn.Propagation = GRADIENT

    @property
    def propagates(self) -> tn.Propagation:
        return self.what

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> Any:
        return J.T @ g


@dataclass(frozen=True)
class Squares(Pulled):
    """Σ_v w_v (Jᵀ s_v)²."""

    name: str = "squares"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> Any:
        return ((J.T @ g) * g.dual(J)).sum(COLUMN, "n")


@dataclass(frozen=True)
class Factored(Pulled):
    name: str = "factored"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> Any:
        return kronecker(J, g, tn.Sharing.EXPAND, sympy.Integer(1))


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)


MODEL, X, Y = network()
LOSS = nn.MSELoss()


def pulled(model: nn.Module, x: Tensor, u: Tensor) -> dict[str, Tensor]:
    """J_nᵀ u_n, [N, *p]."""
    return dict(oracle.batch_grad(model, lambda f, _: (f * u).sum(), x, x))


def assert_close(got: Any, want: Any) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_hutchinson(name: str, samples: int) -> None:
    """For squared errors, S_v = √2 e_v: columns are signs times √2, and the signs are those of the program's noise."""
    problem = BY_NAME[name].build()
    model, x = problem.model, problem.x
    f = model(x).detach()
    quantities = [HutchinsonDiag(samples=samples), HutchinsonTrace(samples=samples)]
    program = tn.compile(model, nn.MSELoss(reduction="sum"), (x, torch.zeros_like(f)), quantities)
    result = program(x, torch.zeros_like(f), seed=7)
    noise = torch.rand((samples, f[0].numel(), len(f)), dtype=f.dtype, generator=torch.Generator().manual_seed(7))
    signs = torch.where(noise > 0.5, 1.0, -1.0).to(f.dtype).transpose(1, 2)
    diagonal: dict[str, Tensor] = {}
    trace: dict[str, Tensor] = {}
    for each in signs:
        for key, V in pulled(model, x, each.reshape(f.shape) * (2 / samples) ** 0.5).items():
            diagonal[key] = diagonal.get(key, torch.zeros(())) + V.square().sum(0)
            trace[key] = trace.get(key, torch.zeros(())) + V.flatten(1).square().sum(1)
    assert_close(result["hutchinson_diag"], diagonal)
    assert_close(result["hutchinson_trace"], trace)


def test_one_column_needs_no_luck() -> None:
    """A root of one column times a sign: the diagonal is exact."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    result = tn.compute(model, LOSS, (X, Y[:, :1]), [HutchinsonDiag(), tn.DiagGGN()])
    assert_close(result["hutchinson_diag"], result["diag_ggn"])


def test_equal_propagations_share_one_sweep() -> None:
    def noises(*quantities: tn.Quantity) -> int:
        return len(tn.compile(MODEL, LOSS, (X, Y), list(quantities)).compiled.plan.noises)

    assert noises(HutchinsonDiag(samples=2), HutchinsonTrace(samples=2)) == 1
    assert noises(HutchinsonDiag(samples=2), HutchinsonTrace(samples=3)) == 2


def test_every_call_draws_anew() -> None:
    program = tn.compile(MODEL, LOSS, (X, Y), [HutchinsonDiag()])
    one, again, other = (program(X, Y, seed=seed)["hutchinson_diag"]["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_half_precision() -> None:
    """What is made of noise is in the dtype of the output."""
    model, x, y = MODEL.bfloat16(), X.bfloat16(), Y.bfloat16()
    try:
        value = tn.compute(model, LOSS, (x, y), [HutchinsonDiag()], seed=0)["hutchinson_diag"]["0.weight"]
    finally:
        MODEL.double()
    assert value.dtype == torch.bfloat16 and value.isfinite().all()


def test_the_gradient_by_hand() -> None:
    quantities = [tn.BatchGrad(), Pulled(what=Own(lambda output: output.gradient * 3))]
    result = tn.compute(MODEL, LOSS, (X, Y), quantities)
    assert_close(result["pulled"], {name: 3 * G for name, G in result["batch_grad"].items()})


def test_of_the_output_alone() -> None:
    """Jᵀ f is the gradient of ½‖f‖²; no loss."""
    program = tn.compile(MODEL, None, (X, None), [Pulled(what=Free(lambda output: output.value))])
    assert_close(program(X)["pulled"], pulled(MODEL, X, MODEL(X).detach()))


def test_of_nothing_but_ones() -> None:
    """Jᵀ 1 is the gradient of the sum of the outputs; the report says where it comes from."""

    def ones(output: tn.Output) -> tn.Diagram:
        return tn.Diagram(output.legs, (Product(sympy.Integer(1), ()),))

    program = tn.compile(MODEL, None, (X, None), [Pulled(what=Free(ones))])
    assert_close(program(X)["pulled"], pulled(MODEL, X, torch.ones_like(Y)))
    assert "\nwhat is propagated from layer_2:\ns0_layer_2[n,o] = 1\n" in program.explain()


def test_elements_are_the_jacobian() -> None:
    quantities = [Pulled(what=Free(lambda output: output.elements())), tn.Jacobians()]
    result = tn.compile(MODEL, None, (X, None), quantities)(X)
    assert_close(result["pulled"], {name: J.transpose(0, 1) for name, J in result["jacobians"].items()})


def test_an_indefinite_loss_has_no_root() -> None:
    with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
        tn.compute(MODEL, lambda f, y: (f**3).sum(1).mean(), (X, Y), [HutchinsonDiag()])


def test_uniform_numbers() -> None:
    program = tn.compile(MODEL, None, (X, None), [Pulled(what=Free(lambda output: output.uniform(*output.legs)))])
    noise = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_close(program(X, seed=3)["pulled"], pulled(MODEL, X, noise))


def test_columns_as_they_are_are_those_of_the_library() -> None:
    quantities = [tn.DiagGGN(), Squares(what=Own(lambda output: output.root()))]
    result = tn.compute(MODEL, LOSS, (X, Y), quantities)
    assert_close(result["squares"], result["diag_ggn"])


def test_drawn_columns_are_those_of_the_library() -> None:
    program = tn.compile(MODEL, LOSS, (X, Y), [Squares(what=Own(lambda output: output.draws(4)))])
    library = tn.compile(MODEL, LOSS, (X, Y), [tn.DiagGGNMC(mc_samples=4)])
    assert_close(program(X, Y, seed=1)["squares"], library(X, Y, seed=1)["diag_ggn_mc"])


def test_weights_of_either_sign() -> None:
    """The GGN of a loss with negative curvature: Σ_n J_nᵀ H_n J_n with H_n = diag 6 f_n / N of Σ f³ / N."""
    quantity = Squares(what=Weighted(lambda output: output.hessian()[0]))
    result = tn.compute(MODEL, lambda f, y: (f**3).sum(1).mean(), (X, Y), [quantity])
    H = 6 * MODEL(X).detach() / len(X)
    want: dict[str, Tensor] = {}
    for k in range(2):
        u = torch.zeros_like(H)
        u[:, k] = 1.0
        for name, V in pulled(MODEL, X, u).items():
            weighted = H[:, k].reshape(-1, *[1] * (V.ndim - 1)) * V.square()
            want[name] = want.get(name, torch.zeros(())) + weighted.sum(0)
    assert (H < 0).any()
    assert_close(result["squares"], want)


def test_another_jacobian() -> None:
    """A diagonal that drops what layers mix and their second derivatives: h_u = (J∘J)ᵀ h_z, layer by layer."""

    def start(output: tn.Output) -> tn.Diagram:
        S, w = output.hessian()
        return (S * S * w).sum(COLUMN)

    result = tn.compute(MODEL, LOSS, (X, Y), [Pulled(what=Rough(start))])
    first, _, last = MODEL
    a = torch.tanh(first(X)).detach()
    h = torch.full_like(Y, 2 / Y.numel())
    before = (h @ last.weight.detach() ** 2) * (1 - a**2) ** 2
    want = {
        "0.weight": before.unsqueeze(2) * X.unsqueeze(1) ** 2, "0.bias": before,
        "2.weight": h.unsqueeze(2) * a.unsqueeze(1) ** 2, "2.bias": h,
    }  # fmt: skip
    assert_close(result["pulled"], want)


def test_a_matrix_for_the_batch() -> None:
    """KFRA's recursion from Σ_n g_n g_nᵀ: B of the last layer is that matrix, one layer down (1/N) Σ_n J_nᵀ Ḡ J_n."""

    def start(output: tn.Output) -> tn.Diagram:
        g = output.gradient
        return (g * output.other(g)).sum("n")

    result = tn.compute(MODEL, LOSS, (X, Y), [Factored(what=Own(start))])["factored"]
    first, _, last = MODEL
    f = MODEL(X).detach()
    g = 2 * (f - Y) / Y.numel()
    G = g.T @ g
    J = last.weight.detach() * (1 - torch.tanh(first(X)).detach() ** 2).unsqueeze(1)
    torch.testing.assert_close(result["2.bias"].to_dense(), G)
    torch.testing.assert_close(result["0.bias"].to_dense(), torch.einsum("nou,op,npw->uw", J, G, J) / len(X))


def test_in_a_program_with_the_library() -> None:
    """verify leaves out what it does not know, and draws the same numbers for the rest."""
    program = tn.compile(MODEL, LOSS, (X, Y), [HutchinsonDiag(samples=2), tn.DiagGGNMC(), tn.KFAC(mc_samples=2)])
    report = tn.verify(program, X, Y, check=False)
    assert report.ok, str(report)
    assert "HutchinsonDiag is not one of tnbackprop's" in str(report)


def test_memory_limit() -> None:
    """Slices of the batch give the same numbers."""
    x, y = X.repeat(8, 1), Y.repeat(8, 1)
    program = tn.compile(MODEL, LOSS, (x, y), [HutchinsonDiag(samples=2)], memory_limit=9000)
    whole = tn.compile(MODEL, LOSS, (x, y), [HutchinsonDiag(samples=2)])
    assert "range(" in program.source and "range(" not in whole.source
    assert_close(program(x, y, seed=2)["hutchinson_diag"], whole(x, y, seed=2)["hutchinson_diag"])
