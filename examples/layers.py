"""Layers from outside, each declared in at most ten lines; every one has every quantity.

Most are one formula and the shapes of its parameters. `Score` declares nothing: it is written with einsum. `GatedUnit`
is a module that has its formula passed along. `main` compares the individual gradients of each with torch.func, which
sees only the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tnbackprop as tn


def cp_linear(rows: int, columns: int, outputs: int, rank: int) -> nn.Module:
    """[N, I, J] -> [N, O] with a weight of CP rank R: (O + I + J) R numbers for O I J."""
    return tn.einsum_layer(
        "output[n, o] = A[o, r] * B[i, r] * C[j, r] * input[n, i, j] + bias[o]",
        A=(outputs, rank), B=(rows, rank), C=(columns, rank), bias=(outputs,),
    )  # fmt: skip


class Score(nn.Module):
    """[N, T, D] -> [N, T, T]: attention scores x_q Q Kᵀ x_kᵀ with a product Q Kᵀ of low rank."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.Q, self.K = (nn.Parameter(torch.randn(width, rank) / width) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("nqi,ir,jr,nkj->nqk", input, self.Q, self.K, input)


def graph_convolution(adjacency: Tensor, inputs: int, outputs: int) -> nn.Module:
    """[N, V, I] -> [N, V, O]: D^(-1/2) (A + 1) D^(-1/2) X W + b on a fixed graph (Kipf & Welling 2017, 1609.02907)."""
    loops = adjacency + torch.eye(len(adjacency))
    return tn.einsum_layer(
        "output[n, v, o] = scale[v] * graph[v, u] * scale[u] * input[n, u, i] * weight[i, o] + bias[o]",
        graph=loops, scale=loops.sum(1) ** -0.5, weight=(inputs, outputs), bias=(outputs,),
    )  # fmt: skip


def locally_connected(inputs: int, outputs: int, height: int, width: int, kernel: int) -> nn.Module:
    """[N, I, H + K - 1, W + K - 1] -> [N, O, H, W]: a convolution that has a kernel of its own at each position."""
    return tn.einsum_layer(
        "output[n, o, h, w] = weight[o, h, w, i, k, l] * input[n, i, h + k, w + l] + bias[o]",
        weight=(outputs, height, width, inputs, kernel, kernel), bias=(outputs,),
    )  # fmt: skip


def rotary(tokens: int, width: int) -> nn.Module:
    """[N, T, 2 P]: p and P + p turned by position · frequency (Su et al. 2021, 2104.09864), which is learned."""
    return tn.einsum_layer(
        """angle[t, p] = position[t] * frequency[p]
           output[n, t, a.p] = cos(angle[t, p]) * x[n, t, a.p] + sin(angle[t, p]) * turn[a, b] * x[n, t, b.p]""",
        position=torch.arange(tokens) * 1.0, turn=torch.tensor([[0.0, -1.0], [1.0, 0.0]]),
        frequency=((width // 2,), nn.init.uniform_),
    )  # fmt: skip


class GatedUnit(nn.Module):
    """[N, *, I] -> [N, *, O]: (V x) · sigmoid(G x) (Dauphin et al. 2017, 1612.08083)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.V, self.G = (nn.Parameter(torch.randn(outputs, inputs) / inputs) for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        return (input @ self.V.T) * torch.sigmoid(input @ self.G.T)


RULES = tn.RULES | {GatedUnit: """value[n, *s, o] = V[o, i] * input[n, *s, i]
                                  gate[n, *s, o] = G[o, i] * input[n, *s, i]
                                  output[n, *s, o] = value[n, *s, o] * sigmoid(gate[n, *s, o])"""}  # fmt: skip


RING = torch.eye(5).roll(1, 0) + torch.eye(5).roll(-1, 0)
LAYERS = {
    "cp_linear": (lambda: cp_linear(3, 4, outputs=5, rank=2), (3, 4)),
    "Score": (lambda: Score(4, rank=2), (3, 4)),
    "graph_convolution": (lambda: graph_convolution(RING, 3, 2), (5, 3)),
    "locally_connected": (lambda: locally_connected(2, 3, height=2, width=3, kernel=2), (2, 3, 4)),
    "rotary": (lambda: rotary(4, 6), (4, 6)),
    "GatedUnit": (lambda: GatedUnit(4, 3), (2, 4)),
}
"""Each with the shape of one sample."""


def individual_gradients(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(1/N) ∇ℓ_n by torch.func, [N, *p]."""
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, theta, (x[None],)), y[None]) / batch

    batch = len(x)
    return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(theta, x, y)


def main() -> None:
    torch.manual_seed(0)
    loss = nn.MSELoss()
    for name, (layer, shape) in LAYERS.items():
        model, x = nn.Sequential(nn.Linear(shape[-1], shape[-1]), layer(), nn.Tanh()).double(), torch.randn(8, *shape)
        x = x.double()
        y = torch.randn_like(model(x))
        result = tn.compile(model, loss, (x, y), [tn.BatchGrad(), tn.DiagGGN(), tn.KFLR()], rules=RULES)(x, y)
        for parameter, gradient in individual_gradients(model, loss, x, y).items():
            torch.testing.assert_close(result["batch_grad"][parameter], gradient, rtol=1e-9, atol=1e-12)
        factors = {p.removeprefix("1."): len(k.factors) for p, k in result["kflr"].items() if p.startswith("1.")}
        print(f"{name:18} agrees with torch.func; Kronecker factors {factors}")


if __name__ == "__main__":
    main()
