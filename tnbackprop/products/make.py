"""Products of curvature matrices with vectors, without the matrices: GGN, Hessian and Fisher.

The model runs forward once, when a product is made. What is kept is u -> Jᵀu, from `torch.func.vjp`; being linear, it
has v -> Jv as its own vjp (the double backward trick). So both see the same random masks, and no operation needs a
forward-mode rule. Hessian: Pearlmutter 1994, Neural Computation 6(1); GGN and Fisher: Schraudolph 2002, Neural
Computation 14(7).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.utils import _pytree as pytree

from ..api import Loss, compile
from ..compiler.translate.torch_modes import Random
from ..errors import InputError, UnsupportedError, check_member
from ..quantities import BatchGrad, Fisher, Quantity, Scale, SqrtGGNMC
from ..runtime.second_derivatives import hessian_at
from .problem import Problem, vjp_of
from .product import Blocks, CurvatureProduct, Multiply, Vector

Columns = tuple[Tensor, Tensor]
AT_ONCE = 8
"""Vectors that are multiplied at once on a CPU: of convolutional nets 64 at once take twice as long for each."""
SMALL = 2**18
"""… unless their numbers, and those of as many batches, are fewer than these: then calls take longer than products."""


def ggn_product(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], *, blocks: Blocks = Blocks.FULL
) -> CurvatureProduct:
    """Products with the generalised Gauss-Newton matrix, G v = Jᵀ H J v, Schraudolph 2002.

    J is the Jacobian of the model's output on the batch, H the Hessian of the loss, as it is written, by that output:
    (1/N) Σ_n J_nᵀ ∇²ℓ_n J_n v for a loss that averages. See `CurvatureProduct` for the vectors.
    Raises `InputError` where batch, model or loss do not fit, `UnsupportedError` for complex parameters and outputs
    that are no floating point tensors.
    """
    return _product("GGN", Problem(model, loss, batch), blocks)


def hessian_product(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], *, blocks: Blocks = Blocks.FULL
) -> CurvatureProduct:
    """Products with the Hessian of the loss by the parameters, ∇²L v (Pearlmutter 1994), L as it is written.

    The derivative of a function with kinks (ReLU, max pooling) is that of the branch taken. Raises as `ggn_product`.
    """
    return _product("Hessian", Problem(model, loss, batch), blocks)


def fisher_product(
    model: nn.Module,
    loss: Loss,
    batch: tuple[Any, Any],
    *,
    fisher: Fisher = Fisher.MC,
    mc_samples: int = 1,
    seed: int | None = None,
    blocks: Blocks = Blocks.FULL,
) -> CurvatureProduct:
    """Products with the Fisher information matrix, with labels drawn from the model or with those of the batch.

    `Fisher.MC`: Σ_n J_nᵀ S_n S_nᵀ J_n v with `mc_samples` columns S_n [F, mc_samples] as `SqrtGGNMC` draws them, with
    `seed` or from torch's own generator, once: E[F] is the GGN. `Fisher.EMPIRICAL`: (1/N) Σ_n ∇ℓ_n ∇ℓ_nᵀ v for a loss
    that averages, Σ_n ∇ℓ_n ∇ℓ_nᵀ v for one that sums, as in `KFAC`.
    Raises as `ggn_product`, and `UnsupportedError` where the output is not one tensor with the batch alone on axis 0
    or the loss is not a sum over samples.
    """
    check_member("fisher", fisher, Fisher)
    if mc_samples < 1:
        raise InputError(f"mc_samples={mc_samples}: draw at least one column per sample")
    draw = partial(_columns, fisher=fisher, mc_samples=mc_samples, seed=seed)
    return _product(_TITLES[fisher], Problem(model, loss, batch), blocks, draw)


EMPIRICAL = "empirical Fisher"
_TITLES = {Fisher.MC: "MC Fisher", Fisher.EMPIRICAL: EMPIRICAL}


def _product(
    label: str, problem: Problem, blocks: Blocks, draw: Callable[[Problem, Any], Columns] | None = None
) -> CurvatureProduct:
    """v -> Jᵀ H J v, with the loss Hessian, or with the columns that `draw` gives at the output; or the Hessian."""
    check_member("blocks", blocks, Blocks)
    columns = None
    with problem.own_dtypes():
        if label == "Hessian":
            multiply = vjp_of(grad(lambda theta: problem.loss(problem.output(theta))), problem.theta)[1]
        else:
            output, push, pull = problem.linearise()
            columns = draw and draw(problem, output)
            curve = hessian_at(problem.loss, output) if columns is None else partial(_outer, columns, problem.size)
            multiply = lambda v: pull(curve(push(v)))  # noqa: E731
    chosen = multiply if blocks is Blocks.FULL else _blockwise(multiply, problem.theta)

    def product(v: Any) -> Any:
        with problem.own_dtypes():
            return chosen(v)

    return CurvatureProduct(
        label,
        blocks,
        problem.size,
        2 if label == EMPIRICAL else 1,
        problem.theta,
        product,
        _others(problem.model),
        lambda: (_made_again, *problem.recipe(label), columns),
        problem.parts,
        _at_once(problem),
    )


def _at_once(problem: Problem) -> int | None:
    """How many vectors are multiplied at once; None: all of them."""
    tensors = [
        *problem.theta.values(),
        *(leaf for leaf in pytree.tree_leaves(problem.batch) if isinstance(leaf, Tensor)),
    ]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return max(AT_ONCE, SMALL // sum(tensor.numel() for tensor in tensors))


def _outer(columns: Columns, size: int, u: Tensor) -> Tensor:
    """Σ_v R_vn S_vnᵀ u_n for every sample."""
    left, right = columns
    inner = torch.einsum("vnf,nf->vn", right, u.reshape(size, -1))
    return torch.einsum("vn,vnf->nf", inner, left).reshape(u.shape)


def _made_again(
    label: str,
    blocks: Blocks,
    functions: bytes,
    batch: tuple[Any, Any],
    named: bool,
    theta: dict[str, Tensor],
    buffers: dict[str, Tensor],
    random: Random,
    columns: Columns | None,
) -> CurvatureProduct:
    """The product that was pickled: of the same values, and of the same draws where the state of torch's was kept."""
    model, loss = pickle.loads(functions)
    problem = Problem(model, loss, batch, named)
    problem.theta, problem.buffers, problem.random = theta, buffers, random
    with random.again():
        return _product(label, problem, blocks, None if columns is None else lambda problem, output: columns)


def _columns(problem: Problem, output: Any, fisher: Fisher, mc_samples: int, seed: int | None) -> Columns:
    """R and S [V, N, F] at the output: Σ_v R_vn S_vnᵀ stands for sample n's block of the loss Hessian."""
    if not isinstance(output, Tensor) or output.shape[:1] != (problem.size,):
        shown = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedError(
            f"the Fisher needs one output tensor with the {problem.size} samples on axis 0, and the model gives "
            f"{shown}: reshape it in the loss instead, or use ggn_product"
        )
    shifted = _Shifted(output).train(problem.model.training)
    quantities: list[Quantity]
    if fisher is Fisher.MC:
        quantities = [SqrtGGNMC(mc_samples=mc_samples)]
    else:
        quantities = [BatchGrad("scaled"), BatchGrad("unscaled", Scale.UNSCALED)]
    result = compile(shifted, problem.given_loss, (output, problem.y), quantities)(output, problem.y, seed=seed)
    roots = [result[q.name]["shift"].reshape(-1, problem.size, output[0].numel()) for q in quantities]
    return roots[0], roots[-1]


class _Shifted(nn.Module):
    """The output plus a parameter of one sample's shape, whose individual gradients and roots are the output's."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(output[0]))

    def forward(self, output: Tensor) -> Tensor:
        return output + self.shift


def _blockwise(multiply: Multiply, theta: Vector) -> Multiply:
    """Every parameter's entries alone, one after the other."""

    def one(name: str, part: Tensor) -> Tensor:
        """Where several come at once, the zeros beside them are as many: some kernels write one into the other."""
        zeros = {other: part.new_zeros(p.shape, dtype=p.dtype) for other, p in theta.items()}
        return multiply(zeros | {name: part})[name]

    return lambda vector: {name: one(name, part) for name, part in vector.items()}


def _others(model: nn.Module) -> dict[str, str]:
    """The names of parameters that have no entry of their own, and why."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    why = {name: f"is tied to {first[id(p)]!r}" if p.requires_grad else "is frozen" for name, p in every}
    return {name: reason for name, reason in why.items() if name not in first.values() or reason == "is frozen"}
