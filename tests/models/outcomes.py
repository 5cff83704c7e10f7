"""What a row of the zoo is asked: each check raises, or it returns. The oracle is autograd, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.linalg import Kind

from .zoo import Problem, Row

TOLERANCE = 1e-8
"""Of float64, relative to the largest element of a parameter's result."""


def call(problem: Problem, x: Any) -> Any:
    """The model on x, which may be several inputs."""
    model = problem.model
    return model(*x) if isinstance(x, tuple) else model(**x) if isinstance(x, dict) else model(x)


def sample(batch: Any, n: int) -> Any:
    """A batch of one."""
    return pytree.tree_map(lambda t: t[n : n + 1], batch)


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
    """G_n = (1/N) grad l_n, [N, *p]."""
    parameters, count = trainable(problem), size(problem.x)
    losses = [problem.loss(call(problem, sample(problem.x, n)), sample(problem.y, n)) for n in range(count)]
    torch.testing.assert_close(sum(losses) / count, problem.loss(call(problem, problem.x), problem.y))
    each = [gradient(loss / count, parameters) for loss in losses]
    return {name: torch.stack([g[name] for g in each]) for name in parameters}


def diag_ggn(problem: Problem) -> dict[str, Tensor]:
    """diag of sum_n J_nᵀ H_n J_n, [*p], row by row of J_n; the loss's Hessian by autograd, twice."""
    parameters, count = trainable(problem), size(problem.x)
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n in range(count):
        output, y = call(problem, sample(problem.x, n)), sample(problem.y, n)
        H = torch.autograd.functional.hessian(lambda f, y=y: problem.loss(f, y) / count, output.detach())
        H = H.reshape(output.numel(), output.numel())
        rows = [gradient(o, parameters) for o in output.flatten()]
        for name in parameters:
            J = torch.stack([row[name].flatten() for row in rows])
            found[name] += torch.einsum("fp,fe,ep->p", J, H, J).view_as(found[name])
    return found


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    assert set(found) == set(wanted), f"{what}: parameters {sorted(found)}, not {sorted(wanted)}"
    scale = max(float(value.abs().max()) for value in wanted.values())
    assert math.isfinite(scale) and scale > 0, f"{what}: the oracle is {scale}; choose another model"
    for name, value in wanted.items():
        limit = TOLERANCE * max(float(value.abs().max()), 1e-6 * scale)
        assert found[name].shape == value.shape, f"{what} of {name}: shape {list(found[name].shape)}"
        difference = float((found[name].detach() - value.detach()).abs().max())
        assert difference <= limit, f"{what} of {name}: {difference:.1e} from autograd, {limit:.1e} allowed"


def first_order(row: Row) -> None:
    """Grad, BatchGrad and BatchL2 are those of autograd."""
    problem = row.problem()
    quantities = [tn.Grad(), tn.BatchGrad(), tn.BatchL2()]
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)
    result, each = program(problem.x, problem.y), individual(problem)
    close(result["batch_grad"], each, "batch_grad")
    close(result["grad"], {name: g.sum(0) for name, g in each.items()}, "grad")
    close(result["batch_l2"], {name: g.reshape(len(g), -1).square().sum(1) for name, g in each.items()}, "batch_l2")


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
    close(result["diag_ggn"], diag_ggn(problem), "diag_ggn")


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
    close(each, individual(problem), "vmap")


CHECKS: dict[str, Callable[[Row], None]] = {
    "first order": first_order, "KFAC": kfac, "DiagGGN": curvature, "vmap": vmap
}  # fmt: skip


def asked(row: Row, check: str) -> bool:
    """Whether the check has a meaning for the row."""
    return check != "DiagGGN" or (row.convex and row.exact)
