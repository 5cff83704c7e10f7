"""Products of curvature matrices with vectors, without the matrices: GGN, Hessian and Fisher.

The model runs forward once, when a product is made. What is kept is u -> Jᵀu, from `torch.func.vjp`; being linear, it
has v -> Jv as its own vjp (the double backward trick). So both see the same random masks, and no operation needs a
forward-mode rule. Hessian: Pearlmutter 1994, Neural Computation 6(1); GGN and Fisher: Schraudolph 2002, Neural
Computation 14(7).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.utils import _pytree as pytree

from .api import Loss, compile
from .compiler.capture.export import batch_size, model_arguments, plain, takes_names
from .compiler.running.torch_quiet import UNWARNED
from .compiler.translate.torch_modes import Random, check_constant, own_dtypes, twice_differentiable
from .errors import InputError, UnsupportedError, check_member
from .quantities import BatchGrad, Fisher, Quantity, Scale, SqrtGGNMC
from .runtime.fingerprint import fingerprint
from .runtime.second_derivatives import ClosedForm, hessian_at

Vector = Mapping[str, Tensor]
Multiply = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Linear = Callable[[Any], Any]
Columns = tuple[Tensor, Tensor]
Recipe = Callable[[], tuple[Any, ...]]
"""What a product is made from once more where it is unpickled, the arguments of `_made_again`."""


class Blocks(Enum):
    """Which part of the matrix a product has: all of it, or one diagonal block per parameter and zeros elsewhere."""

    FULL = "full"
    PARAMETER = "parameter"


@dataclass(frozen=True, eq=False, repr=False)
class CurvatureProduct:
    """v -> M v for a symmetric matrix M [P, P] on the P elements of the trainable parameters, in the model's order.

    ``product(vector)``, or ``product @ vector``, with {name: [*p]}, {name: [..., *p]} (several vectors along leading
    axes), [P] (all parameters flattened, one after the other) or [P, K]; the result has the same form.
    M stays that of the parameters, the batch and the random draws with which it was made. It keeps the values of that
    forward pass. With `Blocks.PARAMETER` a call multiplies once per parameter.

    Raises `InputError` where the vector does not fit, `UnsupportedError` where an operation has no second derivative.
    """

    label: str
    blocks: Blocks
    _theta: Mapping[str, Tensor]
    _multiply: Multiply
    _others: Mapping[str, str]  # other names of parameters -> why they have no entry
    _recipe: Recipe

    def __deepcopy__(self, memo: object) -> CurvatureProduct:
        """Nothing in it changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """As model, loss, batch and what was drawn: where it is unpickled the model runs forward once more."""
        return _made_again, (self.label, self.blocks, *self._recipe())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._theta)

    @property
    def shape(self) -> tuple[int, int]:
        size = sum(p.numel() for p in self._theta.values())
        return size, size

    def __repr__(self) -> str:
        kind = "full" if self.blocks is Blocks.FULL else "one block per parameter"
        return f"CurvatureProduct({self.label}: {list(self.shape)}, {kind}, {len(self._theta)} parameters)"

    @overload
    def __call__(self, vector: Tensor) -> Tensor: ...

    @overload
    def __call__(self, vector: Vector) -> dict[str, Tensor]: ...

    def __call__(self, vector: Tensor | Vector) -> Tensor | dict[str, Tensor]:
        return self._flat(vector) if isinstance(vector, Tensor) else self._by_name(vector)

    __matmul__ = __call__

    def to_dense(self) -> Tensor:
        """M [P, P], by as many products at once: for small models."""
        like = next(iter(self._theta.values()))
        return self._flat(torch.eye(self.shape[0], dtype=like.dtype, device=like.device))

    def _flat(self, vector: Tensor) -> Tensor:
        """[P] or [P, K], by way of the parameters."""
        size = self.shape[0]
        if len({(p.dtype, p.device) for p in self._theta.values()}) > 1:
            raise InputError(f"{self.label}: the parameters differ in dtype or device: give the vector by name")
        if vector.ndim not in (1, 2) or len(vector) != size:
            raise InputError(f"{self.label}: the vector has shape {list(vector.shape)}: give [{size}] or [{size}, K]")
        rows = vector.movedim(0, -1)
        pieces = torch.split(rows, [p.numel() for p in self._theta.values()], dim=-1)
        shapes = zip(pieces, self._theta.items(), strict=True)
        found = self._by_name({name: piece.reshape(*rows.shape[:-1], *p.shape) for piece, (name, p) in shapes})
        flat = [value.reshape(piece.shape) for value, piece in zip(found.values(), pieces, strict=True)]
        return torch.cat(flat, dim=-1).movedim(-1, 0)

    def _by_name(self, vector: Vector) -> dict[str, Tensor]:
        lead = self._leading_axes(vector)
        ordered = {name: vector[name].detach() for name in self._theta}
        count = math.prod(lead)
        stacked = {name: v.reshape(count, *self._theta[name].shape) if lead else v for name, v in ordered.items()}
        try:
            with UNWARNED:
                found = (vmap(self._multiply) if lead else self._multiply)(stacked)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise UnsupportedError(f"{self.label}: {error}. Write that operation with others of torch.") from error
        # Copies: a derivative may share memory, with the vector or with itself where it was expanded.
        return {name: value.detach().clone().reshape(ordered[name].shape) for name, value in found.items()}

    def _leading_axes(self, vector: Vector) -> tuple[int, ...]:
        """The axes before the parameters' own, which every entry has in common. Raises `InputError`."""
        if not isinstance(vector, Mapping):
            raise InputError(f"{self.label}: the vector is {type(vector).__name__}: give a tensor or {{name: tensor}}")
        for name in vector:
            if name not in self._theta:
                why = self._others.get(name, "is no parameter of the model")
                raise InputError(f"{self.label}: {name!r} {why}: give the vector for product.names and no other")
        lead = {name: self._lead(name, vector) for name in self._theta}
        first = next(iter(lead))
        for name, axes in lead.items():
            if axes != lead[first]:
                raise InputError(
                    f"{self.label}: {name!r} has the leading axes {list(axes)}, but {first!r} has {list(lead[first])}: "
                    "give as many vectors for every parameter"
                )
        return lead[first]

    def _lead(self, name: str, vector: Vector) -> tuple[int, ...]:
        p, v = self._theta[name], vector.get(name)
        if v is None:
            raise InputError(f"{self.label}: the vector has no {name!r}: give every parameter an entry, or zeros")
        if not isinstance(v, Tensor):
            raise InputError(f"{self.label}: the vector's {name!r} is {type(v).__name__}, not a tensor")
        if (v.dtype, v.device) != (p.dtype, p.device):
            raise InputError(
                f"{self.label}: the vector's {name!r} is {v.dtype} on {v.device}, but the parameter is {p.dtype} on "
                f"{p.device}: convert it with .to(...)"
            )
        check_constant(f"{self.label}: the vector's {name!r}", v)
        axes = v.ndim - p.ndim
        if axes < 0 or v.shape[axes:] != p.shape:
            raise InputError(
                f"{self.label}: the vector's {name!r} has shape {list(v.shape)}: give {list(p.shape)}, "
                "or several along leading axes"
            )
        return tuple(v.shape[:axes])


def ggn_product(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], *, blocks: Blocks = Blocks.FULL
) -> CurvatureProduct:
    """Products with the generalised Gauss-Newton matrix, G v = Jᵀ H J v, Schraudolph 2002.

    J is the Jacobian of the model's output on the batch, H the Hessian of the loss, as it is written, by that output:
    (1/N) Σ_n J_nᵀ ∇²ℓ_n J_n v for a loss that averages. See `CurvatureProduct` for the vectors.
    Raises `InputError` where batch, model or loss do not fit, `UnsupportedError` for complex parameters and outputs
    that are no floating point tensors.
    """
    return _product("GGN", _Problem(model, loss, batch), blocks)


def hessian_product(
    model: nn.Module, loss: Loss, batch: tuple[Any, Any], *, blocks: Blocks = Blocks.FULL
) -> CurvatureProduct:
    """Products with the Hessian of the loss by the parameters, ∇²L v (Pearlmutter 1994), L as it is written.

    The derivative of a function with kinks (ReLU, max pooling) is that of the branch taken. Raises as `ggn_product`.
    """
    return _product("Hessian", _Problem(model, loss, batch), blocks)


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
    return _product(f"{_TITLES[fisher]} Fisher", _Problem(model, loss, batch), blocks, draw)


_TITLES = {Fisher.MC: "MC", Fisher.EMPIRICAL: "empirical"}


def _product(
    label: str, problem: _Problem, blocks: Blocks, draw: Callable[[_Problem, Any], Columns] | None = None
) -> CurvatureProduct:
    """v -> Jᵀ H J v, with the loss Hessian, or with the columns that `draw` gives at the output; or the Hessian."""
    check_member("blocks", blocks, Blocks)
    columns = None
    with problem.own_dtypes():
        if label == "Hessian":
            multiply = _vjp(grad(lambda theta: problem.loss(problem.output(theta))), problem.theta)[1]
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
        label, blocks, problem.theta, product, _others(problem.model), lambda: (*problem.recipe(label), columns)
    )


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
    problem = _Problem(model, loss, batch, named)
    problem.theta, problem.buffers, problem.random = theta, buffers, random
    with random.again():
        return _product(label, problem, blocks, None if columns is None else lambda problem, output: columns)


def _columns(
    problem: _Problem, output: Any, fisher: Fisher, mc_samples: int, seed: int | None
) -> Columns:
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


class _Problem:
    """Output and loss as functions of the trainable parameters, on one batch of `size` samples."""

    def __init__(self, model: nn.Module, loss: Loss, batch: tuple[Any, Any], named: bool | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model is {type(model).__name__}, not a torch.nn.Module")
        if not callable(loss):
            raise InputError(f"loss is {type(loss).__name__}: pass a function (output, y) -> scalar, or a module")
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError("the batch must be the pair (x, y)")
        self.batch = pytree.tree_map_only(Tensor, Tensor.detach, (plain(batch[0]), plain(batch[1])))
        x, self.y = self.batch
        self.model, self.given_loss, self.size = model, loss, batch_size((x, self.y))
        self.named = takes_names(model, batch[0]) if named is None else named
        self.args, self.kwargs = model_arguments(model, x, self.named)
        self.theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.seen = partial(fingerprint, model, loss, pytree.tree_leaves(self.batch))
        self.state = self.seen()
        if not self.theta:
            raise InputError("the model has no trainable parameter: requires_grad_(True) on those of the matrix")
        for name, p in self.theta.items():
            if p.is_complex():
                raise UnsupportedError(f"{name!r} is complex: complex tensors are not supported")
        self.random = Random.of(next(iter(self.theta.values())).device)

    def output(self, theta: dict[str, Tensor]) -> Any:
        """The model's output. Buffers are copies; kernels are used that have second derivatives."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        with twice_differentiable():
            output = functional_call(self.model, theta | buffers, self.args, self.kwargs)
        for leaf in pytree.tree_leaves(output):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise UnsupportedError(f"the model's output has a {kind} in it: return floating point tensors only")
        return output

    def own_dtypes(self) -> AbstractContextManager[object]:
        """Whatever autocast says, as a program."""
        return own_dtypes(next(iter(self.theta.values())).device)

    def loss(self, output: Any) -> Tensor:
        with twice_differentiable(), ClosedForm():
            value = self.given_loss(output, self.y)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the loss returns {shown}: it must be a floating point scalar. Take the mean or the sum over the batch"
            )
        return value

    def linearise(self) -> tuple[Any, Linear, Linear]:
        """The output, v -> Jv, u -> Jᵀu."""
        output, pull = _vjp(self.output, self.theta)
        ones = pytree.tree_map(lambda leaf: leaf.new_ones(()).expand_as(leaf), output)
        _, push = _vjp(pull, ones)  # any point: some kernels have none at zero
        return output, push, pull

    def recipe(self, label: str) -> tuple[Any, ...]:
        """What the product is made from, for pickle. Raises `TypeError` where that is gone, or cannot be pickled."""
        now = self.seen()
        if self.state is None or now is None or not self.state.matches(now):
            raise TypeError(
                f"{label}: model, loss or batch changed since the product was made, or hide what they hold:\n"
                "  pickle the product before they change, or model, loss and batch instead"
            )
        try:
            functions = pickle.dumps((self.model, self.given_loss))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{label}: a product is pickled as its model and loss, and one of them is not: {error}.\n"
                "  Define functions and classes in a module, not inside a function; no lambda"
            ) from error
        return functions, self.batch, self.named, self.theta, self.buffers, self.random


def _vjp(function: Callable[[Any], Any], primal: Any) -> tuple[Any, Linear]:
    """The value and u -> Jᵀu, for a function of one tree of tensors."""
    value, pull = vjp(function, primal)[:2]
    return value, lambda u: pull(u)[0]


def _blockwise(multiply: Multiply, theta: Vector) -> Multiply:
    """Every parameter's entries alone, one after the other."""
    zeros = {name: torch.zeros_like(p) for name, p in theta.items()}
    return lambda vector: {name: multiply(zeros | {name: part})[name] for name, part in vector.items()}


def _others(model: nn.Module) -> dict[str, str]:
    """The names of parameters that have no entry of their own, and why."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    why = {name: f"is tied to {first[id(p)]!r}" if p.requires_grad else "is frozen" for name, p in every}
    return {name: reason for name, reason in why.items() if name not in first.values() or reason == "is frozen"}
