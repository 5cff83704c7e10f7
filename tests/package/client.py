"""What a user writes: `installed.py` runs it, and checks it with mypy --strict against the installed package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_type

import torch

import tnbackprop as tn


@dataclass(frozen=True)
class Alignment(tn.Quantity):
    """⟨(1/N) ∇ℓₙ, ∇L⟩, shape [N]."""

    name: str = "alignment"

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        G = J.T @ g
        return (G * G.sum("n").part()).sum_parameter()


def main() -> None:
    scale = tn.einsum_layer("output[n, i] = gain[i] * input[n, i]", gain=(4,))
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), scale, torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    quantities = [tn.Grad(), tn.Variance(), tn.KFAC(mc_samples=2), Alignment()]
    program = tn.compile(model, torch.nn.CrossEntropyLoss(), (x, y), quantities)
    assert_type(program, tn.Program)
    result = program(x, y, seed=0)
    assert_type(result, tn.Result)
    assert_type(result.loss, torch.Tensor | None)
    assert_type(result["variance"], Mapping[str, torch.Tensor])
    assert_type(result["kfac"], Mapping[str, tn.KroneckerFactors])
    steps = {name: K.inverse(damping=1e-2) @ result["grad"][name] for name, K in result["kfac"].items()}
    assert_type(steps, dict[str, torch.Tensor])
    assert_type(result.flat("grad"), torch.Tensor)
    for K in result["kfac"].values():
        assert_type(K.power(-0.5, 1e-2), tn.Spectral)
        assert_type(K.split(K.inverse(1e-2) @ K.join(result["grad"])), dict[str, torch.Tensor])
        assert_type(K.clone().ema_(K, 0.9).template.of(K.tensors()), tn.KroneckerFactors)
    product = tn.ggn_product(model, torch.nn.CrossEntropyLoss(), (x, y))
    assert_type(product, tn.CurvatureProduct)
    assert_type(tn.ntk(model, x, x), torch.Tensor)
    assert_type(tn.draw(program).svg, str)
    print(result, tn.__version__)


if __name__ == "__main__":
    main()
