"""What a row of the zoo is asked: each check raises, or it returns. The oracle is autograd, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.linalg import Kind

from .zoo import Problem, Row

TOLERANCE = {torch.float64: (1e-8, 1e-6), torch.float32: (1e-5, 1e-1)}
"""By the dtype that a model computes in: relative to the largest element of a parameter's result, or, where that is
smaller, to this share of the largest of all."""


def call(problem: Problem, x: Any) -> Any:
    """The model on x, which may be several inputs."""
    model = problem.model
    return model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)


def sample(batch: Any, n: int) -> Any:
    """A batch of one."""
    return pytree.tree_map(lambda t: t[n : n + 1] if isinstance(t, Tensor) else t, batch)


def pair(batch: Any, n: int) -> Any:
    """A batch of two that are the same."""
    return pytree.tree_map(lambda t: t[[n, n]], batch)


def size(x: Any) -> int:
    return len(pytree.tree_leaves(x)[0])


def trainable(problem: Problem) -> dict[str, Tensor]:
    return {name: p for name, p in problem.model.named_parameters() if p.requires_grad}


def gradient(value: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero for what the value does not read; the graph is kept."""
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def individual(problem: Problem) -> dict[str, Tensor]:
    """G_n = (1/N) grad l_n, [N, *p].

    Of two copies of a sample: for one, torch's gradient through a batch norm in evaluation mode is wrong where the
    cotangent lies in memory with the channels last.
    """
    parameters, count = trainable(problem), size(problem.x)
    losses = [problem.loss(call(problem, pair(problem.x, n)), pair(problem.y, n)) for n in range(count)]
    torch.testing.assert_close(sum(losses) / count, problem.loss(call(problem, problem.x), problem.y))
    each = [gradient(loss / count, parameters) for loss in losses]
    return {name: torch.stack([g[name] for g in each]) for name in parameters}


def read(problem: Problem, output: Any, y: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensors of an output that the loss reads, as one vector [F]; and the loss as a function of it."""
    leaves, tree = pytree.tree_flatten(output)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def loss(parts: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
        given = dict(zip(chosen, parts, strict=True))
        return problem.loss(pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], tree), y)

    inputs = [leaves[i].detach().requires_grad_() for i in places]
    used = torch.autograd.grad(loss(inputs, places), inputs, allow_unused=True)
    kept = [i for i, found in zip(places, used, strict=True) if found is not None]

    def of_vector(f: Tensor) -> Tensor:
        parts = f.split([leaves[i].numel() for i in kept])
        return loss([part.view_as(leaves[i]) for part, i in zip(parts, kept, strict=True)], kept)

    return torch.cat([leaves[i].flatten() for i in kept]), of_vector


def diag_ggn(problem: Problem) -> dict[str, Tensor]:
    """diag of sum_n J_nᵀ H_n J_n, [*p], row by row of J_n; the loss's Hessian by autograd, twice.

    J_n is of the first of two copies of a sample, as in `individual`.
    """
    parameters, count = trainable(problem), size(problem.x)
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n in range(count):
        output, y = sample(call(problem, pair(problem.x, n)), 0), sample(problem.y, n)
        f, loss = read(problem, output, y)
        H = torch.autograd.functional.hessian(loss, f.detach()).double() / count
        rows = [gradient(o, parameters) for o in f]
        for name in parameters:
            J = torch.stack([row[name].flatten() for row in rows]).double()
            found[name] += torch.einsum("fp,fe,ep->p", J, H, J).view_as(found[name])
    return found


def close(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, dtype: torch.dtype = torch.float64
) -> None:
    relative, share = TOLERANCE[dtype]
    assert set(found) == set(wanted), f"{what}: parameters {sorted(found)}, not {sorted(wanted)}"
    scale = max(float(value.abs().max()) for value in wanted.values())
    assert math.isfinite(scale) and scale > 0, f"{what}: the oracle is {scale}; choose another model"
    for name, value in wanted.items():
        limit = relative * max(float(value.abs().max()), share * scale)
        assert found[name].shape == value.shape, f"{what} of {name}: shape {list(found[name].shape)}"
        difference = float((found[name].detach() - value.detach()).abs().max())
        assert difference <= limit, f"{what} of {name}: {difference:.1e} from autograd, {limit:.1e} allowed"


def first_order(row: Row) -> None:
    """Grad, BatchGrad and BatchL2 are those of autograd."""
    problem = row.problem()
    quantities = [tn.Grad(), tn.BatchGrad(), tn.BatchL2()]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    result, each = program(problem.x, problem.y), individual(problem)
    close(result["batch_grad"], each, "batch_grad", row.inside)
    close(result["grad"], {name: g.sum(0) for name, g in each.items()}, "grad", row.inside)
    norms = {name: g.reshape(len(g), -1).square().sum(1) for name, g in each.items()}
    close(result["batch_l2"], norms, "batch_l2", row.inside)


def kfac(row: Row) -> None:
    """Every parameter has factors that are finite, of its shape, and no dense one is larger than the limit."""
    problem = row.problem()
    result = tn.compute(problem.model, problem.loss, (problem.x, problem.y), [row.kfac], seed=0)["kfac"]
    parameters = trainable(problem)
    assert set(result) == set(parameters), f"kfac: parameters {sorted(result)}, not {sorted(parameters)}"
    for name, p in parameters.items():
        block = result[name]
        assert isinstance(block, tn.KroneckerFactors) and block.shape == tuple(p.shape), f"kfac of {name}: {block}"
        assert all(bool(factor.isfinite().all()) for factor in block.factors), f"kfac of {name} is not finite"
        dense = [f.shape[-1] for f, kind in zip(block.factors, block.kinds, strict=True) if kind is Kind.FULL]
        assert max(dense, default=0) <= row.kfac.largest, f"kfac of {name}: dense factors of {dense} rows"


def curvature(row: Row) -> None:
    """DiagGGN is that of the definition."""
    problem = row.problem()
    result = tn.compute(problem.model, problem.loss, (problem.x, problem.y), [tn.DiagGGN()])
    close(result["diag_ggn"], diag_ggn(problem), "diag_ggn", row.inside)


def vmap(row: Row) -> None:
    """What `torch.func.vmap(torch.func.grad(…))` gives as individual gradients."""
    problem = row.problem()
    count = size(problem.x)

    def loss(parameters: dict[str, Tensor], x: Any, y: Any) -> Tensor:
        one, target = pytree.tree_map(lambda t: t.unsqueeze(0), (x, y))
        args, kwargs = ((), one) if isinstance(one, dict) else (one if isinstance(one, tuple) else (one,), {})
        return problem.loss(torch.func.functional_call(problem.model, parameters, args, kwargs), target) / count

    parameters = {name: p.detach() for name, p in trainable(problem).items()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, problem.x, problem.y)
    close(each, individual(row.problem()), "vmap", row.inside)  # another: vmap leaves on it what a forward keeps


CHECKS: dict[str, Callable[[Row], None]] = {
    "first order": first_order, "KFAC": kfac, "DiagGGN": curvature, "vmap": vmap
}  # fmt: skip


def asked(row: Row, check: str) -> bool:
    """Whether the check has a meaning for the row."""
    return check != "DiagGGN" or (row.convex and row.exact)
