"""What every derivative is, by torch.func on the plain forward: simple, slow, and nothing of tnbackprop is used.

Individual gradients are those of copies of the parameters, one for each sample: with θ_n = θ for every n,
G_n = ∂L/∂θ_n. That is (1/N) ∇ℓ_n for a loss that averages, also where a divisor couples the samples (ignored targets).
J_n is the Jacobian of the output of sample n, H_n the block of the loss's Hessian in that output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.utils import _pytree as pytree

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model as a function of its trainable parameters, a loss, and a batch with the samples along axis 0."""

    forward: Callable[[Mapping[str, Tensor], Any], Tensor]
    loss: Callable[[Tensor, Any], Tensor] | None
    theta: Mapping[str, Tensor]
    x: Any
    y: Any
    size: int

    def sample(self, n: int) -> Any:
        """Sample n of x, as a batch of one."""
        return pytree.tree_map(lambda t: t[n : n + 1] if isinstance(t, Tensor) and t.ndim else t, self.x)

    def value(self, theta: Mapping[str, Tensor]) -> Tensor:
        """L of these parameters."""
        assert self.loss is not None
        return self.loss(self.forward(theta, self.x), self.y)

    @property
    def scale(self) -> float:
        """c of L = c Σ_n ℓ_n: 1/N for a loss that averages, which a doubled batch leaves as it is; else 1."""
        assert self.loss is not None
        output = self.output
        before, after = self.loss(output, self.y), self.loss(torch.cat([output] * 2), _twice(self.y))
        return 1.0 if torch.isclose(after, 2 * before) and not torch.isclose(after, before) else 1 / self.size

    @property
    def output(self) -> Tensor:
        """The model's output, one sample at a time."""
        each = [self.forward(self.theta, self.sample(n)) for n in range(self.size)]
        return torch.cat(each).detach()


def _twice(tree: Any) -> Any:
    return pytree.tree_map(lambda t: torch.cat([t] * 2) if isinstance(t, Tensor) and t.ndim else t, tree)


def jacobian(function: Callable[[Any], Tensor], at: Any) -> Any:
    """∂function/∂at, [*output, *at], for a tensor or a mapping of them."""
    # Row by row: of some operations vmap knows no derivative, or gives another one (cdist, linalg.solve).
    return pytree.tree_map(Tensor.detach, jacrev(function, chunk_size=1)(at))


def vjp(function: Callable[[Tensor], Tensor], at: Tensor, cotangent: Tensor) -> Tensor:
    """Jᵀ cotangent, shaped as `at`."""
    found: Tensor = torch.func.vjp(function, at)[1](cotangent)[0]
    return found.detach()


# -- first order


def gradient(problem: Problem) -> Values:
    """∇L, [*p]."""
    found: Values = grad(problem.value)(dict(problem.theta))
    return found


def individual(problem: Problem) -> dict[str, Tensor]:
    """G_n, [N, *p]."""
    copies = {name: p.expand(problem.size, *p.shape).clone() for name, p in problem.theta.items()}

    def value(theta: dict[str, Tensor]) -> Tensor:
        own = [{name: p[n] for name, p in theta.items()} for n in range(problem.size)]
        outputs = [problem.forward(own[n], problem.sample(n)) for n in range(problem.size)]
        assert problem.loss is not None
        return problem.loss(torch.cat(outputs), problem.y)

    found: dict[str, Tensor] = grad(value)(copies)
    return found


def squared_norms(problem: Problem) -> Values:
    """‖G_n‖², [N]."""
    return {name: G.reshape(len(G), -1).square().sum(1) for name, G in individual(problem).items()}


def dot_products(problem: Problem) -> Values:
    """⟨G_n, G_m⟩, [N, N]."""
    flat = {name: G.reshape(len(G), -1) for name, G in individual(problem).items()}
    return {name: G @ G.T for name, G in flat.items()}


def second_moment(problem: Problem) -> Values:
    """(1/N) Σ_n [∇ℓ_n]², [*p]."""
    return {name: (G / problem.scale).square().mean(0) for name, G in individual(problem).items()}


def variance(problem: Problem) -> Values:
    """(1/N) Σ_n [∇ℓ_n - mean]², [*p]."""
    each = {name: G / problem.scale for name, G in individual(problem).items()}
    return {name: (G - G.mean(0)).square().mean(0) for name, G in each.items()}


# -- the Jacobian of the output


def jacobians(problem: Problem) -> dict[str, Tensor]:
    """J_n, [N, F, *p] with the F numbers of a sample's output in row-major order."""
    found: dict[str, list[Tensor]] = {name: [] for name in problem.theta}
    for n in range(problem.size):
        sample = problem.sample(n)

        def output(theta: Mapping[str, Tensor], sample: Any = sample) -> Tensor:
            return problem.forward(theta, sample).reshape(-1)

        for name, own in jacobian(output, dict(problem.theta)).items():
            found[name].append(own)
    return {name: torch.stack(each) for name, each in found.items()}


def ntk(problem: Problem) -> Values:
    """⟨J_n[c], J_m[d]⟩, [N, F, N, F]."""
    flat = {name: J.reshape(*J.shape[:2], -1) for name, J in jacobians(problem).items()}
    return {name: torch.einsum("ncp,mdp->ncmd", J, J) for name, J in flat.items()}


# -- curvature


def loss_hessians(problem: Problem, output: Tensor | None = None, rows: int = 0) -> Tensor:
    """H_n, [N, F, F]; at another output; or of each of `rows` parts of the output."""
    output, rows = problem.output if output is None else output, rows or problem.size
    assert problem.loss is not None
    loss = problem.loss
    full = jacobian(grad(lambda f: loss(f, problem.y)), output).reshape(rows, output.numel() // rows, rows, -1)
    return torch.stack([full[n, :, n] for n in range(rows)])


def ggn_blocks(problem: Problem) -> dict[str, Tensor]:
    """J_nᵀ H_n J_n of each parameter, [N, P, P]."""
    H, J = loss_hessians(problem), jacobians(problem)
    flat = {name: own.reshape(*own.shape[:2], -1) for name, own in J.items()}
    return {name: own.mT @ H @ own for name, own in flat.items()}


def ggn_diagonal(problem: Problem, per_sample: bool) -> Values:
    """diag of the GGN, [*p], or of each sample's share, [N, *p]."""
    found = {}
    for name, G in ggn_blocks(problem).items():
        each = G.diagonal(dim1=1, dim2=2).reshape(-1, *problem.theta[name].shape)
        found[name] = each if per_sample else each.sum(0)
    return found


def ggn_traces(problem: Problem) -> Values:
    """tr of each sample's share of the GGN block, [N]."""
    return {name: G.diagonal(dim1=1, dim2=2).sum(1) for name, G in ggn_blocks(problem).items()}


def hessian_diagonal(problem: Problem, per_sample: bool) -> Values:
    """diag ∇²L, [*p]; or each sample's share, [N, *p]: with parameters of its own for every sample."""
    found = {}
    for name, p in problem.theta.items():
        copies = p.expand(problem.size, *p.shape).clone()

        def value(own: Tensor, name: str = name) -> Tensor:
            theta = [dict(problem.theta) | {name: own[n]} for n in range(problem.size)]
            each = [problem.forward(theta[n], problem.sample(n)) for n in range(problem.size)]
            assert problem.loss is not None
            return problem.loss(torch.cat(each), problem.y)

        def shared(own: Tensor, name: str = name) -> Tensor:
            return problem.value(dict(problem.theta) | {name: own})

        function, at = (value, copies) if per_sample else (shared, p)
        H = jacobian(grad(function), at).reshape(at.numel(), at.numel())
        found[name] = H.diagonal().reshape(at.shape)
    return found
