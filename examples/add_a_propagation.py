"""A propagation from outside: where a sweep starts, as a diagram. It serves every layer, and every quantity.

`Hutchinson` mixes all columns S of the root of the loss Hessian with random signs ε into few, u = Σ_v ε_v S_v. They
stand for the same matrix, E[u uᵀ] = S Sᵀ, and one backward pass of one column estimates what takes one for each of the
C - 1 columns of a softmax: the diagonal and the trace of the GGN (Hutchinson 1989; Martens, Sutskever & Swersky 2012,
arXiv:1206.6464, with signs in place of their normal numbers). `DiagGGNMC` draws labels for the same purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.diagram.core import COLUMN


@dataclass(frozen=True)
class Hutchinson(tn.Propagation):
    """`samples` columns u = Σ_v ε_v S_v / √samples, with signs ε that are new for every sample and call."""

    samples: int = 1

    def start(self, output: tn.Output) -> tn.Diagram:
        S = output.root()  # legs [ν, n, *output]
        signs = output.signs(S.leg(COLUMN), S.leg("n"), draw=self.samples)
        return (S * signs).sum(COLUMN).relabel(draw=COLUMN) / sympy.sqrt(self.samples)

    @property
    def alone(self) -> tn.Propagation:
        """A layer on its own is handed in columns that are mixed already."""
        return tn.Exact()


@dataclass(frozen=True)
class HutchinsonDiag(tn.Quantity):
    """Estimate of the diagonal of the GGN, Σ_vn (Jᵀu)², shape [*p]. Its mean is `DiagGGN`."""

    name: str = "hutchinson_diag"
    samples: int = 1

    @property
    def propagates(self) -> tn.Propagation:
        return Hutchinson(self.samples)

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        V = J.T @ g
        return (V * V).sum(COLUMN, "n")


@dataclass(frozen=True)
class HutchinsonTrace(tn.Quantity):
    """Estimate of `GGNTrace` from the same columns, shape [N]. Two quantities that propagate alike share a sweep."""

    name: str = "hutchinson_trace"
    samples: int = 1

    @property
    def propagates(self) -> tn.Propagation:
        return Hutchinson(self.samples)

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        V = J.T @ g
        return (V * V).sum_parameter().sum(COLUMN)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(10, (16,))
    samples, calls = 8, 200
    quantities = [tn.DiagGGN(), tn.GGNTrace(), HutchinsonDiag(samples=samples), HutchinsonTrace(samples=samples)]
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities)

    runs = [program(x, y, seed=seed) for seed in range(calls)]
    for exact, estimate in (("diag_ggn", "hutchinson_diag"), ("ggn_trace", "hutchinson_trace")):
        for name, want in runs[0][exact].items():
            each = torch.stack([run[estimate][name] for run in runs])
            error = each.std(0) / calls**0.5  # of the mean
            assert ((each.mean(0) - want).abs() <= 6 * error + 1e-12).all(), name
            one = (each.std(0) / want.clamp(min=1e-12)).median()
            print(f"{estimate:16} {name:8} one call is off by {one:4.0%}, the mean of {calls} within 6 standard errors")


if __name__ == "__main__":
    main()
