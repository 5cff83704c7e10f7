"""Declare a layer and get every quantity: a linear map on matrices whose weight is a CP decomposition.

    output[n, o] = Σ_{r, i, j} A[o, r] B[i, r] C[j, r] input[n, i, j] + bias[o]

The rule is the formula. Nothing else is written: the Jacobians by A, B, C, bias and input are derived from it, so the
layer can stand anywhere in a network. The values are compared with torch.func, which sees only the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tnbackprop as tn


class CPLinear(nn.Module):
    """[N, I, J] -> [N, O] with a weight of rank R: (O + I + J) R numbers for O I J."""

    def __init__(self, rows: int, columns: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(outputs, rank))
        self.B = nn.Parameter(torch.randn(rows, rank) / rows**0.5)
        self.C = nn.Parameter(torch.randn(columns, rank) / columns**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("or,ir,jr,nij->no", self.A, self.B, self.C, input) + self.bias


def cp_linear(layer: CPLinear) -> str:
    """The row: a function of the module, so that a formula may depend on its options."""
    return "output[n, o] = A[o, r] * B[i, r] * C[j, r] * input[n, i, j] + bias[o]"


RULES = tn.RULES | {CPLinear: cp_linear}


def individual_gradients(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(1/N) ∇ℓ_n by torch.func, [N, *p]."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, theta, (x.unsqueeze(0),)), y.unsqueeze(0))

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, x, y)
    return {name: gradient / len(x) for name, gradient in each.items()}


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), CPLinear(5, 6, outputs=4, rank=3)).double()
    loss = nn.CrossEntropyLoss()
    x, y = torch.randn(8, 5, 6, dtype=torch.float64), torch.randint(4, (8,))

    quantities = [tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance()]
    program = tn.compile(model, loss, (x, y), quantities, rules=RULES)
    result = program(x, y)

    for name, G in individual_gradients(model, loss, x, y).items():
        flat = G.flatten(1)
        wanted = {
            "grad": G.sum(0),
            "batch_grad": G,
            "batch_l2": flat.square().sum(1),
            "batch_dot": flat @ flat.T,
            "second_moment": len(x) * G.square().sum(0),
            "variance": len(x) * (G - G.mean(0)).square().sum(0),
        }
        for key, value in wanted.items():
            torch.testing.assert_close(result[key][name], value, rtol=1e-10, atol=1e-12)
        print(f"{name:8} {tuple(G.shape[1:])!s:8} {len(wanted)} quantities agree with torch.func")


if __name__ == "__main__":
    main()
