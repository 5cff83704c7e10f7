"""A quantity that reads what it is handed and comes in phases: individual gradients weighted by influence, and clipped.

How much a small step down the gradient of sample n changes the loss of a held-out set is its influence there, the inner
product of ∇ℓ_n with the gradient v of that loss, over all parameters. What pulls the other way counts for nothing, what
is longer than C is clipped, and the rest is summed:

    w_n = max(0, ⟨∇ℓ_n, v⟩) min(1, C / ‖∇ℓ_n‖),    Σ_n w_n ∇ℓ_n / Σ_n w_n

Both numbers of a sample are sums over all parameters, so they come first; then `between` makes the weights of them, and
every parameter's sum is extracted from what the same sweep has kept. No individual gradient is built.
"""

from __future__ import annotations

import runpy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import tnbackprop as tn


@dataclass(frozen=True)
class Influential(tn.Quantity):
    """The mean of the individual gradients weighted by influence, [*p]. Operand: "direction", v of each parameter."""

    name: str = "influential"
    max_norm: float = 1.0

    @property
    def needs(self) -> tuple[tn.Quantity, ...]:
        return tn.DirectionalGrad("influence"), tn.BatchL2("squares", scale=tn.Scale.UNSCALED)

    def between(self, totals: Any) -> dict[str, Tensor]:
        clipped = (self.max_norm / totals["squares"].sqrt()).clamp(max=1)
        weights = totals["influence"].clamp(min=0) * clipped
        return {"weights": weights / weights.sum()}

    def extract(self, J: tn.Uses, g: tn.Cotangents) -> tn.Diagram:
        return ((J.T @ g) / g.scale * g.operand("weights")).sum("n")


def with_all_gradients(model: nn.Module, x: Tensor, y: Tensor, v: dict[str, Tensor], C: float) -> dict[str, Tensor]:
    """The same by definition: torch.func builds every individual gradient."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, x[None]), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    G = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    influence = sum((G[name] * v[name]).flatten(1).sum(1) for name in G)
    norms = torch.stack([each.flatten(1).square().sum(1) for each in G.values()]).sum(0).sqrt()
    weights = influence.clamp(min=0) * (C / norms).clamp(max=1)
    return {name: torch.einsum("n,n...->...", weights / weights.sum(), each) for name, each in G.items()}


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()
    x, y = torch.randn(32, 1, 8, 8, dtype=torch.float64), torch.randint(10, (32,))
    loss = nn.CrossEntropyLoss()
    quantities = [Influential(max_norm=3.0), tn.Total(tn.DirectionalGrad("influence"))]
    program = tn.compile(model, loss, (x, y), quantities)

    held_out = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(10, (16,))
    v = tn.compute(model, loss, held_out, [tn.Grad()])["grad"]
    result = program(x, y, operands={"direction": v})
    influence = result["influence_total"]["all"]
    print(f"{int((influence > 0).sum())} of {len(x)} samples pull the way of the held-out loss")
    for name, want in with_all_gradients(model, x, y, v, 3.0).items():
        torch.testing.assert_close(result["influential"][name], want)

    before = loss(model(held_out[0]), held_out[1])
    step = {name: p.detach() - 0.1 * result["influential"][name] for name, p in model.named_parameters()}
    after = loss(functional_call(model, step, held_out[0]), held_out[1])
    print(f"held-out loss {before:.4f} -> {after:.4f} after one step")
    assert after < before

    shown = program.explain("derive").splitlines()
    print("\n".join(shown[shown.index("then, for influential:") :][:3]))
    check_the_file(model, loss, x, y, v, result)


def check_the_file(model: nn.Module, loss: Any, x: Tensor, y: Tensor, v: Any, result: tn.Result) -> None:
    """The program as a file that needs torch only, and is handed the same."""
    made = tn.generate(model, [Influential(max_norm=3.0)], example=(x, y), loss=loss)
    with tempfile.TemporaryDirectory() as folder:
        file = runpy.run_path(str(made.save(Path(folder) / "influential.py")))
    _, _, found = file["compute"](model, x, y, {"direction": v})
    for name, value in found["influential"].items():
        torch.testing.assert_close(value, result["influential"][name])


if __name__ == "__main__":
    main()
