"""Three from outside: signal to noise, cosine to the gradient of the other samples, blocks of the empirical Fisher.

The algebra is made of sums and products, so a quantity is what stands in a numerator or a denominator; the ratio is a
line of torch on the result. None sees a layer. `main` compares all with torch.func, which sees only the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.quantities.factors import Factors


@dataclass(frozen=True)
class Signal(tn.Quantity):
    """[E ∇ℓ]², [*p], estimated without bias: the mean of ∇ℓ_n ∇ℓ_m over all pairs n ≠ m, for N ≥ 2."""

    name: str = "signal"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = (J.T @ g) / g.scale
        M = G.sum("n").part()
        return (M * M - (G * G).sum("n")) / (tn.N * (tn.N - 1))


@dataclass(frozen=True)
class TowardsOthers(tn.Quantity):
    """⟨G_n, Σ_{m≠n} G_m⟩, [N]: how far each sample pulls the way of the others; its own pull does not count."""

    name: str = "towards_others"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = J.T @ g
        return (G * (G.sum("n").part() - G)).sum_parameter()


@dataclass(frozen=True)
class OthersL2(tn.Quantity):
    """‖Σ_{m≠n} G_m‖², [N]: the squared norm of what is left of the gradient without each sample."""

    name: str = "others_l2"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = J.T @ g
        R = (G.sum("n").part() - G).part()
        return (R * R).sum_parameter()


@dataclass(frozen=True)
class FisherBlock(tn.Quantity):
    """(1/N) Σ_n ∇ℓ_n ∇ℓ_nᵀ, the parameter's block of the empirical Fisher, [P, P]: for small parameters.

    One factor and no assumption. The value is a matrix on p, with `@`, `inverse(damping)`, `eigh()`, `to_dense()`.
    """

    name: str = "fisher_block"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> Factors:
        G = (J.T @ g) / g.scale
        other = G.relabel(**{leg.name: f"{leg.name}_copy" for leg in J.legs})
        block = (G * other).sum("n") / tn.N
        return Factors((block,), (), (J.legs,), J.legs, assumption="none: the block itself")


QUANTITIES = (Signal(), tn.Variance(), TowardsOthers(), OthersL2(), tn.BatchL2(), FisherBlock())


def signal_to_noise(result: tn.Result) -> dict[str, Tensor]:
    """[E ∇ℓ]² / Var ∇ℓ, [*p] (Liu et al. 2020, arXiv:2001.07384); an estimate below 0 is all noise."""
    return {name: signal / result["variance"][name] for name, signal in result["signal"].items()}


def cosine(result: tn.Result) -> Tensor:
    """Of each sample's gradient and the sum of the others', [N], over all parameters together."""
    keys = ("towards_others", "batch_l2", "others_l2")
    dot, own, others = (torch.stack(list(result[key].values())).sum(0) for key in keys)
    return dot / (own * others).sqrt()


def individual_gradients(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """∇ℓ_n by torch.func, [N, *p]."""
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, theta, (x[None],)), y[None])

    return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(theta, x, y)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    x, y = torch.randn(16, 1, 6, 6, dtype=torch.float64), torch.randint(3, (16,))
    result = tn.compute(model, nn.CrossEntropyLoss(), (x, y), QUANTITIES)

    gradients = individual_gradients(model, nn.CrossEntropyLoss(), x, y)
    for name, ratio in signal_to_noise(result).items():
        G = gradients[name].flatten(1)
        block = result["fisher_block"][name].to_dense()
        torch.testing.assert_close(block, G.T @ G / len(x))
        pairs = (G.sum(0) ** 2 - (G**2).sum(0)) / (len(x) * (len(x) - 1))
        torch.testing.assert_close(ratio.flatten(), pairs / G.var(0, correction=0))
        rank = int(torch.linalg.matrix_rank(block, hermitian=True))
        print(f"{name:8} signal/noise {ratio.median():+.3f}   Fisher block of rank {rank} in {len(block)}")

    every = torch.cat([G.flatten(1) for G in gradients.values()], 1)
    wanted = torch.cosine_similarity(every, every.sum(0) - every)
    torch.testing.assert_close(cosine(result), wanted)
    print("cosine to the others", *(f"{value:+.2f}" for value in wanted))


if __name__ == "__main__":
    main()
