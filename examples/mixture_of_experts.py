"""A mixture of experts in three ways of writing it: gathered matrices, a loop with masks, all experts weighted.

All three are one function, and have the same individual gradients: those of an expert are zero for every sample of
which no token is routed to it. `main` compares them with torch.func, which sees only the forward, and prints how often
each expert is taken, its gradient noise and the size of its Kronecker factors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tnbackprop as tn

EXPERTS, CHOSEN, WIDTH, HIDDEN = 4, 2, 8, 16


class Experts(nn.Module):
    """[N, T, D] -> [N, T, D]: the k experts with the largest gates, each a perceptron with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / HIDDEN**0.5)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the chosen and which these are, [N, T, k] each."""
        values, index = self.router(x).topk(CHOSEN, dim=-1)
        return values.softmax(-1), index


class Gathered(Experts):
    """The matrices of what is chosen, [N, T, k, D, H]: no expert sees a token that is not routed to it."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gates(x)
        hidden = torch.einsum("ntd,ntkdh->ntkh", x, self.up[index]).relu()
        return torch.einsum("ntk,ntkh,ntkhd->ntd", weights, hidden, self.down[index])


class Looped(Experts):
    """Expert by expert, the tokens that a mask picks."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gates(x)
        output = torch.zeros_like(x)
        for e in range(EXPERTS):
            mask = (index == e).any(-1)
            weight = (weights * (index == e)).sum(-1, keepdim=True)
            output[mask] += weight[mask] * ((x[mask] @ self.up[e]).relu() @ self.down[e])
        return output


class Weighted(Experts):
    """All experts on all tokens: a leg e more. The gates of what is not chosen are 0."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gates(x)
        gates = torch.zeros(*x.shape[:-1], EXPERTS, dtype=x.dtype).scatter(-1, index, weights)
        hidden = torch.einsum("ntd,edh->nteh", x, self.up).relu()
        return torch.einsum("nte,nteh,ehd->ntd", gates, hidden, self.down)


def individual_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By torch.func, one sample after the other."""

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(torch.func.functional_call(model, theta, (x[None],)), y[None])

    theta = {name: p.detach() for name, p in model.named_parameters()}
    each = [torch.func.grad(loss)(theta, *sample) for sample in zip(x, y, strict=True)]
    return {name: torch.stack([gradient[name] for gradient in each]) / len(x) for name in theta}


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 2, WIDTH, dtype=torch.float64)
    state = Experts().double().state_dict()
    quantities = [tn.BatchGrad(), tn.BatchL2(), tn.Variance(), tn.KFLR()]
    for kind in (Gathered, Looped, Weighted):
        model = kind().double()
        model.load_state_dict(state)
        result = tn.compile(model, nn.MSELoss(), (x, y), quantities)(x, y)
        for name, value in individual_gradients(model, x, y).items():
            torch.testing.assert_close(result["batch_grad"][name], value)
        routed = nn.functional.one_hot(model.gates(x)[1], EXPERTS).sum((1, 2))  # [N, E]
        assert (routed == 0).any() and not result["batch_grad"]["up"][routed == 0].any()
        shapes = [list(factor.shape) for factor in result["kflr"]["up"].factors]
        print(f"{kind.__name__:9} Kronecker factors of up:", *shapes)
    noise = result["variance"]["up"].sum((1, 2))
    for e in range(EXPERTS):
        print(f"expert {e}: {int(routed[:, e].sum()):2} tokens of {int((routed[:, e] > 0).sum())} samples, ", end="")
        print(f"gradient noise {float(noise[e]):.4f}")


if __name__ == "__main__":
    main()
