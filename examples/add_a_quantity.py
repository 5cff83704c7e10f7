"""Two quantities from outside, each a few lines of algebra that never see a layer. They serve every layer.

`J.T @ g` are the individual gradients G_n = (1/N) ∇ℓ_n with legs [n, *parameter]. `*`, `+`, `-`, `/` by a number,
`.sum(leg)`, `.sum_parameter()` and `.relabel(n="m")` are all there is; the compiler finds out how to compute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import tnbackprop as tn


@dataclass(frozen=True)
class Alignment(tn.Quantity):
    """⟨G_n, ∇L⟩, [N]: how far each sample pulls the way the batch goes. Its sum over n is ‖∇L‖²."""

    name: str = "alignment"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = J.T @ g
        return (G * G.sum("n").part()).sum_parameter()


@dataclass(frozen=True)
class GradientNoise(tn.Quantity):
    """tr Cov of the ∇ℓ_n, a number: over ‖∇L‖² it is the simple noise scale (McCandlish et al. 2018, 1812.06162)."""

    name: str = "gradient_noise"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = (J.T @ g) / g.scale
        D = (G - G.sum("n") / tn.N).part()
        return (D * D).sum_parameter().sum("n") / tn.N


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(10, (16,))
    quantities = [tn.Grad(), tn.BatchGrad(), tn.BatchL2(), Alignment(), GradientNoise()]
    result = tn.compute(model, nn.CrossEntropyLoss(), (x, y), quantities)

    for name, G in result["batch_grad"].items():
        gradient = result["grad"][name]
        cosine = result["alignment"][name] / (result["batch_l2"][name].sqrt() * gradient.norm())
        noise_scale = result["gradient_noise"][name] / gradient.square().sum()
        print(f"{name:8} cosine {cosine.min():+.2f} … {cosine.max():+.2f}   noise scale {noise_scale:.1f}")

        each = len(x) * (G - G.mean(0))
        torch.testing.assert_close(result["alignment"][name], (G * gradient).flatten(1).sum(1))
        torch.testing.assert_close(result["gradient_noise"][name], each.square().flatten(1).sum(1).mean())


if __name__ == "__main__":
    main()
